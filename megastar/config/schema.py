"""Every knob of megastar, with its default and meaning. Plain dataclasses, no torch.

``metadata["help"]`` is what ``megastar train --help`` prints; [P] marks what the ST-AR paper states, [C] what
we choose where it is silent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def knob(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its meaning; lists are copied for each instance.

    Metadata that config/load.py checks: ``choices`` (allowed values), ``low``/``high`` (inclusive bounds),
    ``above``/``below`` (exclusive ones). A list's bounds hold for its members.
    """
    metadata["help"] = help
    if isinstance(default, (list, dict, type)):
        factory = default if isinstance(default, type) else lambda: type(default)(default)
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TokenizerConfig:
    """The VQ auto-encoder. Defaults are LlamaGen's VQ-16."""

    image_size: int = knob(256, "side of the square pictures, pixels", low=1)
    channels: int = knob(128, "width at full resolution; each level multiplies it", low=1)
    channel_multipliers: list[int] = knob([1, 1, 2, 2, 4], "one a level; n levels shrink the picture by 2^(n-1)", low=1)
    res_blocks: int = knob(2, "residual blocks a level in the encoder; the decoder has one more", low=1)
    z_channels: int = knob(256, "width between the networks and the code book", low=1)
    codebook_size: int = knob(16384, "number of codes V", low=2)
    codebook_embed_dim: int = knob(8, "dimensions of a code", low=1)
    codebook_l2_norm: bool = knob(True, "compare codes on the unit sphere")
    norm_groups: int = knob(32, "groups of every GroupNorm; LlamaGen: 32", low=1)
    dropout: float = knob(0.0, "dropout in the residual blocks", low=0, below=1)

    @property
    def downsample(self) -> int:
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.downsample


@dataclass
class TokenizerTrainConfig:
    """``megastar train-tokenizer``: how the tokenizer is trained."""

    tokenizer: TokenizerConfig = knob(TokenizerConfig, "the network")
    pictures: str = knob("", "folder of class folders, a .tar, or a folder of tars")
    subset: str = knob("", "use only pictures below this top folder, e.g. train")
    val_subset: str = knob("", "score on the pictures below this top folder")
    test_subset: str = knob("", "score once more, at the end, on the pictures below this top folder")
    out: str = knob("runs/tokenizer", "run folder")
    init: str = knob("", "tokenizer file to go on from, with continuous_steps 0; empty: random weights")
    steps: int = knob(20000, "optimizer steps", low=1)
    batch: int = knob(64, "pictures a step", low=1)
    lr: float = knob(1e-3, "peak learning rate (AdamW), cosine to a hundredth", above=0)
    warmup: int = knob(200, "steps of linear warm-up", low=0)
    weight_decay: float = knob(1e-4, "AdamW weight decay", low=0)
    ema_decay: float = knob(0.999, "decay of the averaged weights, which are the ones saved", low=0, below=1)
    commitment: float = knob(0.25, "weight of the commitment loss", low=0)
    perceptual: float = knob(0.1, "weight of the perceptual loss; 0 turns it off", low=0)
    adversarial: float = knob(0.0, "weight of the PatchGAN hinge loss; 0 turns it off", low=0)
    adversarial_start: int = knob(10000, "step at which the adversarial loss begins", low=0)
    continuous_steps: int = knob(500, "steps without quantization before the code book is set by k-means", low=0)
    revive_every: int = knob(250, "steps between revivals of dead codes; the last fifth of the run has none", low=1)
    max_scale: float = knob(1.25, "largest random enlargement before the random crop", low=1)
    seed: int = knob(0, "seed of weights and data order", low=0)
    dtype: str = knob("auto", "fp32, bf16, or auto: bf16 where the hardware has it", choices=("bf16", "fp32", "auto"))
    threads: int = knob(0, "CPU threads; 0 leaves torch's choice", low=0)
    eval_every: int = knob(1000, "steps between scores on val_subset", low=1)
    save_every: int = knob(500, "steps between checkpoints", low=1)


@dataclass
class ModelConfig:
    """LlamaGen's AR transformer (autoregressive/models/gpt.py)."""

    name: str = knob("b", "label of the size, for logs")
    n_layer: int = knob(12, "blocks", low=1)
    n_head: int = knob(12, "attention heads H", low=1)
    dim: int = knob(768, "width D; the head dimension D / H must be a multiple of 4 (2-D RoPE)", low=1)
    multiple_of: int = knob(256, "the SwiGLU width int(8 D / 3) is rounded up to a multiple of this", low=1)
    vocab_size: int = knob(16384, "codes V of the tokenizer", low=2, high=65536)
    num_classes: int = knob(1000, "classes; the table has one more row, the null class", low=1)
    image_tokens: int = knob(256, "tokens a picture T, a square number; the sequence is class + T - 1 tokens", low=4)
    rope_base: float = knob(10000.0, "base of the 2-D rotary embedding", above=0)
    norm_eps: float = knob(1e-5, "epsilon of RMSNorm", above=0)
    initializer_range: float = knob(0.02, "standard deviation of the initial weights; the head starts at zero", above=0)
    class_dropout_prob: float = knob(0.1, "probability that a sample trains with the null class [P]", low=0, high=1)
    token_dropout_p: float = knob(0.1, "dropout after the embeddings [P]", low=0, below=1)
    resid_dropout_p: float = knob(0.1, "dropout after the attention's output projection [P]", low=0, below=1)
    ffn_dropout_p: float = knob(0.1, "dropout after the SwiGLU [P]", low=0, below=1)

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
    """Which token shards are read."""

    shards: str = knob(
        "", "folder of token shards with a manifest.json (megastar pretokenize makes it), or s3://bucket/prefix"
    )
    val_shards: str = knob("", "token shards of the validation split, likewise; empty: no validation loss")
    tokenizer: str = knob(
        "", "tokenizer .safetensors; its hash is compared with the manifest's, samples are decoded with it"
    )
    window: int = knob(16, "shards that are mixed sample by sample", low=1)
    cache: str = knob("", "folder of this node that keeps shards read from s3://; empty: one a user in the temp folder")
    cache_gib: float = knob(
        64.0, "bound of the cache, GiB; the shards in use stay, the least recently used go first", above=0
    )
    patience: float = knob(1800.0, "seconds that an outage of s3:// may stall the run before it stops", low=0)


@dataclass
class SelfGuidedConfig:
    """The ST-AR objectives. ``enabled: false`` is the LlamaGen baseline: next-token loss only, no mask, no teacher."""

    enabled: bool = knob(True, "self-guided training; false is the AR baseline")
    alpha: float = knob(1.0, "weight of the masked-image loss [P]", low=0)
    beta: float = knob(0.5, "weight of the mean of the two contrastive losses [P]", low=0)
    mask_ratio: float = knob(0.25, "share of the T - 1 image-token keys hidden from the student [P]", low=0, below=1)
    views: int = knob(2, "crops M of an image a step [P]; they are distinct stored crops [C]", low=1)
    baseline_views: int = knob(
        1,
        "crops of an image a step, each a sequence, when enabled is false; 2: the control for doubled sequences",
        low=1,
    )
    student_views: int = knob(
        2, "views that go through the student, 1 or 2; the paper's text says 2, its figure 1 [C]", choices=(1, 2)
    )
    contrastive_block: int = knob(
        6, "block, counted from 1, whose output feeds the contrastive losses [P: B 6, L 18, XL 18]", low=1
    )
    positions: int = knob(
        4, "positions K drawn once a step, shared by the batch and the views [P]; never the class's [C]", low=1
    )
    temperature: float = knob(0.2, "tau of both InfoNCE losses [C]", above=0)
    projector_dim: int = knob(2048, "hidden width of the student's projector [C]", low=1)
    step_loss: bool = knob(True, "the agreement between positions (L_step); false for the ablation")
    view_loss: bool = knob(True, "the agreement between views (L_view); false for the ablation")
    share_label_drop: bool = knob(True, "the teacher uses the student's label-drop decisions [C]")
    teacher_decay: float = knob(0.9999, "EMA decay of the teacher [P]", low=0, high=1)
    teacher_warmup: bool = knob(False, "decay min(decay, (1+t)/(10+t)): for short runs [C]")


@dataclass
class AttentionConfig:
    """Which kernel attends. Speed only: a run resumes with another one."""

    backend: str = knob(
        "auto",
        "auto (the fastest that megastar check-gpu measured here), sdpa, flex, flash or triton; "
        "a fast one is compared with sdpa when first used",
        choices=("auto", "sdpa", "flex", "flash", "triton"),
    )


@dataclass
class OptimConfig:
    """AdamW on fp32 master weights."""

    lr: float = knob(1e-4, "learning rate at a global batch of 256 images; scaled linearly with the batch [P]", above=0)
    scale_lr: bool = knob(True, "scale lr by global_batch / 256; false takes lr as it is")
    beta1: float = knob(0.9, "AdamW beta 1 [P]", low=0, below=1)
    beta2: float = knob(0.95, "AdamW beta 2 [P; printed as 0.05, taken as a misprint]", low=0, below=1)
    eps: float = knob(1e-8, "AdamW epsilon [C]", above=0)
    weight_decay: float = knob(0.05, "decay on tensors of two or more dimensions [P]", low=0)
    grad_clip: float = knob(1.0, "gradient norm bound; 0 turns it off [P]", low=0)
    schedule: str = knob(
        "constant", "constant [P], cosine (to min_lr_ratio), or linear", choices=("constant", "cosine", "linear")
    )
    warmup_steps: int = knob(0, "steps of linear warm-up", low=0)
    min_lr_ratio: float = knob(0.01, "last lr of cosine and linear, as a share of the peak", low=0, high=1)


@dataclass
class ParallelConfig:
    """How the work is split. The world size is tensor_parallel x data ranks."""

    deepspeed: str = knob(
        "configs/ds/zero3.json",
        "DeepSpeed JSON, or zero1, zero2, zero3, zero3_offload; it says ZeRO stage and offload, never batch, clip or dtype",
    )
    tensor_parallel: int = knob(
        1, "ranks that share one copy of each layer; must divide heads, ffn and vocabulary", low=1
    )
    check_batches: bool = knob(
        False, "debugging aid: compare, each step, the batches that the ranks of a tensor group see"
    )
    activation_checkpointing: bool = knob(False, "recompute each block's activations in the backward pass")


@dataclass
class FaultsConfig:
    """What is done when something goes wrong in the middle of a run (docs/faults.md)."""

    hang_timeout: float = knob(
        600.0,
        "seconds without progress after which each rank's watchdog writes all stacks down and ends the rank; 0: never",
        low=0,
    )
    lost_timeout: float = knob(
        60.0, "seconds of silence after which a rank counts as lost, and the others end and name it; 0: never", low=0
    )
    spike_sigma: float = knob(
        6.0,
        "a step whose loss is this many standard deviations above the last spike_window steps' is skipped; 0: none is",
        low=0,
    )
    spike_window: int = knob(128, "steps whose losses a spike is measured against", low=2)
    max_skips: int = knob(
        3,
        "skipped steps within spike_window that are borne; one more and the run goes back to its last good checkpoint",
        low=0,
    )
    max_rollbacks: int = knob(2, "times that a run goes back, over its whole length, before it stops instead", low=0)
    checksum_every: int = knob(
        0, "steps between comparisons of what must be equal on several ranks, bit for bit; 0: never", low=0
    )
    slow_ratio: float = knob(
        1.5, "a rank whose steps take this many times the median's own time is named in a warning; 0: none is", low=0
    )
    save_patience: float = knob(
        600.0,
        "seconds for which the run's last checkpoint, or a roll-back's record, is tried again where it cannot be "
        "written, before the run ends without it",
        low=0,
    )


@dataclass
class TrainConfig:
    """Length, batch, precision, housekeeping."""

    global_batch: int = knob(256, "images (not views) an optimizer step, over all ranks [C]", low=1)
    micro_batch: int = knob(
        0, "images a rank and forward pass; 0: global_batch / data ranks. The rest is gradient accumulation", low=0
    )
    steps: int = knob(0, "optimizer steps; 0: epochs decide", low=0)
    epochs: float = knob(50, "passes over the shards when steps is 0", low=0)
    dtype: str = knob("bf16", "bf16, fp32, or auto: bf16 where the hardware has it", choices=("bf16", "fp32", "auto"))
    seed: int = knob(0, "seed of every draw", low=0)
    init: str = knob("", "weights file to start from instead of random weights; the projector starts at random")
    log_every: int = knob(10, "steps between lines of metrics", low=1)
    val_every: int = knob(1000, "steps between validation losses; 0: never", low=0)
    val_images: int = knob(1024, "images of the fixed validation split that are scored", low=1)
    save_every: int = knob(1000, "steps between checkpoints; one is always written at the end", low=1)
    keep_last: int = knob(2, "checkpoints kept; older ones are removed after a newer one is complete", low=1)
    keep_every: int = knob(0, "also keep each checkpoint whose step is a multiple of this; 0: none", low=0)
    keep_best: bool = knob(False, "also keep the checkpoint with the lowest validation loss at its step")
    upload: str = knob("", "s3://bucket/prefix to copy each complete checkpoint to; empty: nowhere")
    compile: bool = knob(
        False, "torch.compile each block, at ZeRO stages 0 to 2 without tensor parallelism; compare losses first"
    )
    fused_ops: str = knob(
        "auto",
        "auto: on a GPU, SwiGLU by Liger and RMSNorm by NVIDIA apex where installed, compared with torch's when first "
        "used; off: torch's",
        choices=("auto", "off"),
    )
    threads: int = knob(0, "CPU threads a rank; 0: cores / local ranks on CPU, torch's choice on a GPU", low=0)


@dataclass
class RunConfig:
    """A whole run: what configs/run/*.yaml holds."""

    run: str = knob("runs/run", "run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/")
    model: ModelConfig = knob(ModelConfig, "the network; in YAML a path to configs/model/*.yaml, or the fields")
    data: DataConfig = knob(DataConfig, "the token shards")
    self_guided: SelfGuidedConfig = knob(SelfGuidedConfig, "the ST-AR objectives and the teacher")
    attention: AttentionConfig = knob(AttentionConfig, "the attention kernel")
    optim: OptimConfig = knob(OptimConfig, "the optimizer")
    parallel: ParallelConfig = knob(ParallelConfig, "the split over GPUs")
    faults: FaultsConfig = knob(FaultsConfig, "when something goes wrong")
    train: TrainConfig = knob(TrainConfig, "length, batch, precision, housekeeping")

    @property
    def views(self) -> int:
        """Crops M of an image that a step reads."""
        return self.self_guided.views if self.self_guided.enabled else self.self_guided.baseline_views

    @property
    def student_views(self) -> int:
        """Sequences of an image that go through the student."""
        return self.self_guided.student_views if self.self_guided.enabled else self.self_guided.baseline_views
