"""Every field of a configuration, with its default and meaning. Plain dataclasses, no torch.

``metadata["help"]`` is what ``megastar train --help`` prints; [P] marks values from the ST-AR paper, [L] LlamaGen's
settings, which the paper adopts as "the same setting", [C] our choices where neither gives one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megastar.config.knob import LARGE, MOST_BATCH, MOST_SECONDS, MOST_SEED, MOST_STEPS, MOST_THREADS, knob
from megastar.config.sections.evaluation import EvaluationConfig
from megastar.config.sections.optim import OptimConfig
from megastar.config.sections.profile import ProfileConfig as ProfileConfig
from megastar.config.sections.rank_faults import RankFaultsConfig
from megastar.config.sections.repa import RepaConfig as RepaConfig
from megastar.config.sections.self_guided import SelfGuidedConfig as SelfGuidedConfig
from megastar.config.sections.token_order import TokenOrderConfig
from megastar.config.sections.tokenizer import TokenizerConfig as TokenizerConfig
from megastar.config.sections.tokenizer import TokenizerTrainConfig as TokenizerTrainConfig
from megastar.config.sections.trackers import TRACKER_NAMES, TRACKERS_HELP


@dataclass
class ModelConfig:
    """LlamaGen's AR transformer (autoregressive/models/gpt.py)."""

    name: str = knob("b", "name of the size, for logs")
    n_layer: int = knob(12, "transformer blocks", low=1, high=1024)
    n_head: int = knob(12, "attention heads H", low=1, high=1024)
    dim: int = knob(768, "width D; the head dimension D / H must be a multiple of 4 (2-D RoPE)", low=1, high=65536)
    multiple_of: int = knob(256, "the SwiGLU width int(8 D / 3) is rounded up to a multiple of this", low=1, high=65536)
    vocab_size: int = knob(16384, "codebook size V of the tokenizer; unless set: that of the shards", low=2, high=2**18)
    num_classes: int = knob(
        1000,
        "classes, with one more row in the table, the null class; unless set: those of the shards",
        low=1,
        high=10**6,
    )
    image_tokens: int = knob(
        256, "tokens per image T, a square number; unless set: that of the shards", low=4, high=65536
    )
    rope_base: float = knob(10000.0, "base of the 2-D rotary embedding", above=0, high=LARGE)
    norm_eps: float = knob(1e-5, "epsilon of RMSNorm", above=0, high=1)
    initializer_range: float = knob(
        0.02, "standard deviation of the initial weights; the output head starts at zero", above=0, high=100
    )
    class_dropout_prob: float = knob(0.1, "probability of training a sample with the null class [L]", low=0, high=1)
    token_dropout_p: float = knob(0.1, "dropout after the embeddings [L]", low=0, below=1)
    resid_dropout_p: float = knob(0.1, "dropout after the attention output projection [L]", low=0, below=1)
    ffn_dropout_p: float = knob(0.1, "dropout after the SwiGLU [L]", low=0, below=1)
    head: str = knob(
        "full",
        "full: one embedding and one output per code; factorised: a code is predicted as sub-codes, one after the other",
        choices=("full", "factorised"),
    )
    head_factors: list[int] = knob(
        [],
        "factorised: number of values of each sub-code, whose product is V, as [512, 512]",
        low=2,
        high=65536,
        fewest=0,
    )
    target_position: str = knob(
        "none",
        "how the network is given the position of the token to predict, which a random order needs (token_order.kind sets "
        "rotary): embedding: a learned one, added to the input (RAR); rotary: also, RoPE turns queries by that position",
        choices=("none", "embedding", "rotary"),
    )
    unset = frozenset[str]()  # no field: sizes that the user has not set, see config/model_sizes.py

    def __setattr__(self, name: str, value: object) -> None:
        """Whoever sets a size, in Python too, has chosen it."""
        super().__setattr__(name, value)
        if name in self.unset:
            self.leave_unset(self.unset - {name})

    def leave_unset(self, names: frozenset[str]) -> None:
        """Mark the sizes that the shards determine."""
        object.__setattr__(self, "unset", names)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        hidden = int(2 * 4 * self.dim / 3)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return round(math.sqrt(self.image_tokens))


@dataclass
class DataConfig:
    """The token shards."""

    shards: str = knob(
        "", "folder of token shards with a manifest.json (made by megastar pretokenize), or s3://bucket/prefix"
    )
    val_shards: str = knob("", "token shards of the validation split; empty: no validation loss")
    tokenizer: str = knob("", "tokenizer .safetensors that decodes samples; its hash is compared with the manifest's")
    window: int = knob(16, "shards whose samples are shuffled together", low=1, high=10**6)
    cache: str = knob("", "local folder for shards read from s3://; empty: a per-user directory under $TMPDIR")
    cache_gib: float = knob(
        64.0,
        "cache limit in GiB; evicts the least recently used shards first, never shards in use",
        above=0,
        high=10**9,
    )
    patience: float = knob(
        1800.0, "seconds that an outage of s3:// may last before the run stops", low=0, high=MOST_SECONDS
    )


@dataclass
class AttentionConfig:
    """The attention kernel. It affects only the speed: a run may resume with another one."""

    backend: str = knob(
        "auto",
        "auto (the fastest of those that megastar check-gpu measured here), sdpa, flex, flash or triton; "
        "others are checked against sdpa on first use",
        choices=("auto", "sdpa", "flex", "flash", "triton"),
    )


@dataclass
class ParallelConfig:
    """How the work is split over ranks. World size = tensor_parallel x data ranks."""

    deepspeed: str = knob(
        "configs/ds/zero3.json",
        "DeepSpeed JSON, or zero0 (fp32 only), zero1, zero2, zero3, zero3_offload; it sets ZeRO stage and offload, not batch, clipping or dtype",
    )
    tensor_parallel: int = knob(
        1, "ranks that split each layer; must divide the heads, the ffn width and the vocabulary", low=1, high=1024
    )
    check_batches: bool = knob(False, "debugging: compare the batches of the ranks of a tensor group at each step")
    activation_checkpointing: bool = knob(False, "recompute the activations of each block in the backward pass")
    teacher_features: str = knob(
        "keep",
        "the teacher's last features, when it runs on several micro-batches first: keep them, or recompute them",
        choices=("keep", "recompute"),
    )


@dataclass
class FaultsConfig(RankFaultsConfig):
    """What a run does when a fault occurs (docs/faults.md)."""

    spike_sigma: float = knob(
        6.0,
        "skip a step whose loss is this many standard deviations above the last spike_window losses; 0: never. The paper's "
        "configurations skip such steps too, which the paper does not mention [C]",
        low=0,
        high=LARGE,
    )
    spike_window: int = knob(128, "number of last steps whose losses a loss is compared with", low=2, high=10**6)
    max_skips: int = knob(
        3,
        "maximum skipped steps per spike_window; one more triggers a rollback to the last good checkpoint",
        low=0,
        high=10**6,
    )
    max_rollbacks: int = knob(2, "maximum rollbacks of a run; one more stops it", low=0, high=10**6)
    checksum_every: int = knob(
        0,
        "steps between bitwise comparisons of the state that must be equal on several ranks; 0: never",
        low=0,
        high=MOST_STEPS,
    )
    memory_every: int = knob(
        0,
        "steps between checkpoints in the memory of another node, for runs of megastar elastic; 0: never",
        low=0,
        high=MOST_STEPS,
    )
    memory_copies: int = knob(
        1, "nodes that keep a copy of each of these; as many nodes may be lost at once", low=1, high=8
    )
    slow_ratio: float = knob(
        1.5, "warn about a rank whose compute time per step is this many times the median; 0: never", low=0, high=LARGE
    )
    save_patience: float = knob(
        600.0,
        "seconds to retry writing the last checkpoint, or the record of a rollback, before the run ends without it",
        low=0,
        high=MOST_SECONDS,
    )


@dataclass
class TrainConfig:
    """Length, batch, precision, logging, checkpoints."""

    global_batch: int = knob(256, "images (not views) per optimizer step, over all ranks [C]", low=1, high=MOST_BATCH)
    micro_batch: int = knob(
        0,
        "images per rank and forward pass, the rest is gradient accumulation; 0: global_batch / data ranks",
        low=0,
        high=MOST_BATCH,
    )
    steps: int = knob(0, "optimizer steps; 0: set by epochs", low=0, high=MOST_STEPS)
    epochs: float = knob(50, "passes over the shards when steps is 0; 50 or 300 [P]", low=0, high=10**8)
    dtype: str = knob(
        "bf16", "bf16 [L], fp32, or auto: bf16 where the hardware supports it", choices=("bf16", "fp32", "auto")
    )
    seed: int = knob(0, "seed of all random numbers", low=0, high=MOST_SEED)
    init: str = knob(
        "",
        "weights to start from: a .safetensors file, LlamaGen's .pt file, a run folder, a folder of convert --to hf, or "
        "hf://owner/name[@revision]; empty: random weights. The projector always starts at random",
    )
    init_weights: str = knob(
        "", "of a run ema (empty: this) or student; of a .pt file with several sets of weights the name of one"
    )
    init_classes: str = knob(
        "same",
        "class embeddings of train.init: same: by number; fresh: new ones; map: by init_class_map, or by equal names",
        choices=("same", "fresh", "map"),
    )
    init_class_map: str = knob("", "YAML file of new class: old class, each a name or a number; null: a new embedding")
    init_resize: bool = knob(False, "allow train.init to have another model.image_tokens; RoPE is recomputed")
    init_any_order: bool = knob(False, "allow train.init to be trained in another token order (token_order.kind)")
    init_any_tokenizer: bool = knob(False, "allow train.init to be trained on the codes of another tokenizer")
    freeze_blocks: int = knob(
        0,
        "keep the first blocks of train.init, this many, and its token and (init_classes: same) class embeddings unchanged",
        low=0,
        high=1024,
    )
    log_every: int = knob(10, "steps between rows of metrics", low=1, high=MOST_STEPS)
    trackers: list[str] = knob(["tensorboard"], TRACKERS_HELP, choices=TRACKER_NAMES)
    val_every: int = knob(1000, "steps between validation losses; 0: never", low=0, high=MOST_STEPS)
    val_images: int = knob(
        1024, "images of the validation split that the loss is computed on, always the same", low=1, high=10**9
    )
    save_every: int = knob(1000, "steps between checkpoints; the last step is always saved", low=1, high=MOST_STEPS)
    keep_last: int = knob(
        2, "number of checkpoints to keep; older ones are removed once a newer one is complete", low=1, high=MOST_STEPS
    )
    keep_every: int = knob(0, "also keep checkpoints whose step is a multiple of this; 0: none", low=0, high=MOST_STEPS)
    keep_best: bool = knob(False, "also keep the checkpoint with the lowest validation loss at its step")
    upload: str = knob("", "s3://bucket/prefix to copy each complete checkpoint to; empty: no copy")
    compile: str = knob(
        "auto",
        "torch.compile each block: auto: on a GPU without tensor parallelism, if compiled and eager blocks agree at the "
        "start; on; off (true and false mean on and off)",
        choices=("auto", "on", "off"),
    )
    deterministic: bool = knob(
        False, "use deterministic operations only, slower; refuse an attention backend that has none"
    )
    fused_ops: str = knob(
        "auto",
        "auto: on a GPU, RoPE by Triton, SwiGLU of Liger and RMSNorm of NVIDIA apex where installed, checked against "
        "torch's on first use; off: torch's",
        choices=("auto", "off"),
    )
    threads: int = knob(
        0, "CPU threads per rank; 0: cores / local ranks on a CPU, torch's default on a GPU", low=0, high=MOST_THREADS
    )
    profile: ProfileConfig = knob(ProfileConfig, "record some steps with torch.profiler (docs/profiling.md)")

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the run: ``steps``, or ``epochs`` over ``samples`` images."""
        return self.steps or max(1, round(self.epochs * samples / self.global_batch))


@dataclass
class RunConfig:
    """A whole run: what a run folder's config.yaml records. Files in configs/run hold what differs."""

    run: str = knob("runs/run", "run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/")
    model: ModelConfig = knob(
        ModelConfig, "the network; in YAML fields, a path, or both as {base: configs/model/b.yaml, n_layer: 6}"
    )
    data: DataConfig = knob(DataConfig, "the token shards")
    self_guided: SelfGuidedConfig = knob(
        SelfGuidedConfig, "the ST-AR objectives and the teacher; method: configs/method/star.yaml sets them"
    )
    repa: RepaConfig = knob(RepaConfig, "representation alignment; method: configs/method/repa.yaml sets it")
    token_order: TokenOrderConfig = knob(TokenOrderConfig, "the order of an image's tokens")
    attention: AttentionConfig = knob(AttentionConfig, "the attention kernel")
    optim: OptimConfig = knob(OptimConfig, "the optimizer")
    parallel: ParallelConfig = knob(ParallelConfig, "the split over GPUs")
    faults: FaultsConfig = knob(FaultsConfig, "what a run does when a fault occurs")
    train: TrainConfig = knob(TrainConfig, "length, batch, precision, logging, checkpoints")
    eval: EvaluationConfig = knob(EvaluationConfig, "scores of samples while the run trains")

    @property
    def views(self) -> int:
        """Crops M of an image per step."""
        return self.self_guided.views if self.self_guided.enabled else self.self_guided.baseline_views

    @property
    def student_views(self) -> int:
        """Sequences of an image that the student processes per step."""
        return self.self_guided.sequences

    @property
    def method_name(self) -> str:
        """ar, or the parts of the method joined by +: star (self-guided), repa, random (token order)."""
        parts = {
            "star": self.self_guided.enabled,
            "repa": self.repa.active,
            "random": self.token_order.kind == "random",
        }
        return "+".join(name for name, used in parts.items() if used) or "ar"

    @property
    def objective(self) -> str:
        """The method in words."""
        if not self.repa.active:
            return "ST-AR (self-guided)" if self.self_guided.enabled else "next token (AR baseline)"
        return "ST-AR (self-guided) and REPA" if self.self_guided.enabled else "next token and REPA"
