"""Every field of a configuration, with its default and meaning. Plain dataclasses, no torch.

``metadata["help"]`` is what ``megastar train --help`` prints; [P] marks values from the ST-AR paper, [C]
our choices where the paper gives none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megastar.config.knob import LARGE, MOST_BATCH, MOST_SECONDS, MOST_SEED, MOST_STEPS, MOST_THREADS, knob
from megastar.config.optim import OptimConfig


@dataclass
class TokenizerConfig:
    """The auto-encoder and its quantizer. Defaults are LlamaGen's VQ-16."""

    image_size: int = knob(256, "side of the square images in pixels", low=1, high=4096)
    channels: int = knob(128, "width at full resolution; each level multiplies it", low=1, high=4096)
    channel_multipliers: list[int] = knob(
        [1, 1, 2, 2, 4], "one per level; n levels downsample the image by 2^(n-1)", low=1, high=64
    )
    res_blocks: int = knob(2, "residual blocks per level of the encoder; the decoder has one more", low=1, high=64)
    z_channels: int = knob(256, "channels between the networks and the codebook", low=1, high=4096)
    codebook_size: int = knob(16384, "number of codes V", low=2, high=2**20)
    codebook_embed_dim: int = knob(8, "dimension of a code; lfq: log2 of V; fsq: number of levels", low=1, high=4096)
    codebook_l2_norm: bool = knob(True, "vq: L2-normalize codes before comparing them")
    norm_groups: int = knob(32, "groups of every GroupNorm; LlamaGen: 32", low=1, high=4096)
    dropout: float = knob(0.0, "dropout in the residual blocks", low=0, below=1)
    quantizer: str = knob(
        "vq",
        "vq: nearest code of a codebook; lfq: signs (arXiv 2310.05737); fsq: levels of each channel (arXiv 2309.15505); "
        "ibq: codebook with gradients to all codes (arXiv 2412.02692)",
        choices=("vq", "lfq", "fsq", "ibq"),
    )
    fsq_levels: list[int] = knob(
        [], "fsq: values of each channel, whose product is V, as [8, 8, 8, 6, 5]", low=2, high=1024, fewest=0
    )

    @property
    def downsample(self) -> int:
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.downsample


@dataclass
class TokenizerTrainConfig:
    """Training of the tokenizer (``megastar train-tokenizer``)."""

    tokenizer: TokenizerConfig = knob(TokenizerConfig, "the network")
    pictures: str = knob("", "images: a folder of class folders, a .tar, or a folder of tars")
    subset: str = knob("", "use only images below this top-level folder, e.g. train")
    val_subset: str = knob("", "evaluate on the images below this top-level folder")
    test_subset: str = knob("", "evaluate at the end on the images below this top-level folder")
    out: str = knob("runs/tokenizer", "run folder")
    init: str = knob("", "tokenizer file to continue from, with continuous_steps 0; empty: random weights")
    steps: int = knob(20000, "optimizer steps", low=1, high=MOST_STEPS)
    batch: int = knob(64, "images per step", low=1, high=MOST_BATCH)
    lr: float = knob(1e-3, "peak learning rate of AdamW", above=0, high=LARGE)
    schedule: str = knob(
        "cosine", "after the warm-up: cosine decay to 1 % of lr, or constant", choices=("cosine", "constant")
    )
    warmup: int = knob(200, "steps of linear warm-up", low=0, high=MOST_STEPS)
    weight_decay: float = knob(1e-4, "AdamW weight decay", low=0, high=LARGE)
    ema_decay: float = knob(0.999, "decay of the EMA weights, which are what is saved", low=0, below=1)
    commitment: float = knob(0.25, "weight of the commitment loss; fsq has none", low=0, high=LARGE)
    entropy: float = knob(0.1, "weight of the entropy loss of lfq and ibq", low=0, high=LARGE)
    entropy_temperature: float = knob(0.01, "temperature of the code probabilities in it", above=0, high=LARGE)
    perceptual: float = knob(0.1, "weight of the perceptual loss; 0: off", low=0, high=LARGE)
    lpips_vgg: str = knob(
        "",
        "VGG-16 weights of torchvision (.pth or .safetensors): the perceptual loss is LPIPS; empty: EfficientNet-Lite0",
    )
    lpips_linear: str = knob("", "learned weights of LPIPS 0.1 for VGG (vgg.pth), given with lpips_vgg")
    adversarial: float = knob(0.0, "weight of the PatchGAN hinge loss; 0: off", low=0, high=LARGE)
    discriminator: str = knob(
        "small",
        "small: width 32, GroupNorm; llamagen: width 64, BatchNorm, trained as there (Adam betas 0.9 and 0.95, its loss "
        "times adversarial, gradient norm at most 1)",
        choices=("small", "llamagen"),
    )
    adversarial_start: int = knob(10000, "first step with the adversarial loss", low=0, high=MOST_STEPS)
    continuous_steps: int = knob(
        500, "vq: steps without quantization, before k-means initializes the codebook", low=0, high=MOST_STEPS
    )
    revive_every: int = knob(
        250,
        "steps between counts of dead codes; vq replaces them, except in the last fifth of the run; 0: never",
        low=0,
        high=MOST_STEPS,
    )
    max_scale: float = knob(1.25, "maximum random upscaling before the random crop", low=1, high=16)
    seed: int = knob(0, "seed of the weights and the data order", low=0, high=MOST_SEED)
    dtype: str = knob(
        "auto", "fp32, bf16, or auto: bf16 where the hardware supports it", choices=("bf16", "fp32", "auto")
    )
    threads: int = knob(0, "CPU threads; 0: torch's default", low=0, high=MOST_THREADS)
    eval_every: int = knob(1000, "steps between evaluations on val_subset", low=1, high=MOST_STEPS)
    save_every: int = knob(500, "steps between checkpoints", low=1, high=MOST_STEPS)


@dataclass
class ModelConfig:
    """LlamaGen's AR transformer (autoregressive/models/gpt.py)."""

    name: str = knob("b", "name of the size, for logs")
    n_layer: int = knob(12, "transformer blocks", low=1, high=1024)
    n_head: int = knob(12, "attention heads H", low=1, high=1024)
    dim: int = knob(768, "width D; the head dimension D / H must be a multiple of 4 (2-D RoPE)", low=1, high=65536)
    multiple_of: int = knob(256, "the SwiGLU width int(8 D / 3) is rounded up to a multiple of this", low=1, high=65536)
    vocab_size: int = knob(16384, "codebook size V of the tokenizer", low=2, high=2**18)
    num_classes: int = knob(1000, "classes; the embedding table has one more row, the null class", low=1, high=10**6)
    image_tokens: int = knob(
        256, "tokens per image T, a square number; the sequence is class + T - 1 tokens", low=4, high=65536
    )
    rope_base: float = knob(10000.0, "base of the 2-D rotary embedding", above=0, high=LARGE)
    norm_eps: float = knob(1e-5, "epsilon of RMSNorm", above=0, high=1)
    initializer_range: float = knob(
        0.02, "standard deviation of the initial weights; the output head starts at zero", above=0, high=100
    )
    class_dropout_prob: float = knob(0.1, "probability of training a sample with the null class [P]", low=0, high=1)
    token_dropout_p: float = knob(0.1, "dropout after the embeddings [P]", low=0, below=1)
    resid_dropout_p: float = knob(0.1, "dropout after the attention output projection [P]", low=0, below=1)
    ffn_dropout_p: float = knob(0.1, "dropout after the SwiGLU [P]", low=0, below=1)
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
class SelfGuidedConfig:
    """The ST-AR objectives. ``enabled: false`` is the LlamaGen baseline: next-token loss only, no mask, no teacher."""

    enabled: bool = knob(True, "self-guided training; false is the AR baseline")
    alpha: float = knob(1.0, "weight of the masked-image loss [P]", low=0, high=LARGE)
    beta: float = knob(0.5, "weight of the mean of the two contrastive losses [P]", low=0, high=LARGE)
    mask_ratio: float = knob(0.25, "share of the T - 1 image-token keys hidden from the student [P]", low=0, below=1)
    views: int = knob(2, "crops M of an image per step [P]; distinct stored crops [C]", low=1, high=1024)
    baseline_views: int = knob(
        1,
        "crops of an image per step, each a sequence, when enabled is false; 2: control for twice as many sequences",
        low=1,
        high=1024,
    )
    student_views: int = knob(
        2, "views that the student processes, 1 or 2; the paper has 2 in its text, 1 in its figure [C]", choices=(1, 2)
    )
    contrastive_block: int = knob(
        6, "block, counted from 1, whose output feeds the contrastive losses [P: B 6, L 18, XL 18]", low=1, high=1024
    )
    positions: int = knob(
        4,
        "positions K drawn once per step, shared by the batch and the views [P]; never that of the class [C]",
        low=1,
        high=65536,
    )
    temperature: float = knob(0.2, "tau of both InfoNCE losses [C]", above=0, high=LARGE)
    projector_dim: int = knob(2048, "hidden width of the student's projector [C]", low=1, high=65536)
    step_loss: bool = knob(True, "contrastive loss between positions (L_step); false: ablation")
    view_loss: bool = knob(True, "contrastive loss between views (L_view); false: ablation")
    negatives: str = knob(
        "auto",
        "images that an anchor is compared with: global_batch, all of the step, however it is cut; micro_batch, those of "
        "one forward pass of all data ranks; auto: what the run folder has (before this field: micro_batch), else global_batch",
        choices=("auto", "global_batch", "micro_batch"),
    )
    share_label_drop: bool = knob(True, "drop the same class labels in teacher and student [C]")
    teacher_decay: float = knob(0.9999, "EMA decay of the teacher [P]", low=0, high=1)
    teacher_warmup: bool = knob(False, "use the decay min(teacher_decay, (1+t)/(10+t)), for short runs [C]")

    @property
    def sequences(self) -> int:
        """Crops of an image that the student processes per step."""
        return self.student_views if self.enabled else self.baseline_views


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
class FaultsConfig:
    """What a run does when a fault occurs (docs/faults.md)."""

    hang_timeout: float = knob(
        600.0,
        "seconds without progress after which the watchdog of each rank writes all stacks and ends the rank; 0: never",
        low=0,
        high=MOST_SECONDS,
    )
    lost_timeout: float = knob(
        60.0,
        "seconds without a heartbeat after which a rank counts as lost; the others name it and end; 0: never",
        low=0,
        high=MOST_SECONDS,
    )
    join_timeout: float = knob(
        600.0,
        "seconds that a starting rank waits for the others to join; then it names them and ends",
        low=1,
        high=MOST_SECONDS,
    )
    spike_sigma: float = knob(
        6.0,
        "skip a step whose loss is this many standard deviations above the last spike_window losses; 0: never",
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
    epochs: float = knob(50, "passes over the shards when steps is 0", low=0, high=10**8)
    dtype: str = knob(
        "bf16", "bf16, fp32, or auto: bf16 where the hardware supports it", choices=("bf16", "fp32", "auto")
    )
    seed: int = knob(0, "seed of all random numbers", low=0, high=MOST_SEED)
    init: str = knob("", "weights file to start from; empty: random weights. The projector always starts at random")
    log_every: int = knob(10, "steps between rows of metrics", low=1, high=MOST_STEPS)
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


@dataclass
class RunConfig:
    """A whole run: what a run folder's config.yaml records. Files in configs/run hold what differs."""

    run: str = knob("runs/run", "run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/")
    model: ModelConfig = knob(
        ModelConfig, "the network; in YAML fields, a path, or both as {base: configs/model/b.yaml, n_layer: 6}"
    )
    data: DataConfig = knob(DataConfig, "the token shards")
    self_guided: SelfGuidedConfig = knob(
        SelfGuidedConfig, "the ST-AR objectives and the teacher; method: configs/method/{star,ar}.yaml sets them"
    )
    attention: AttentionConfig = knob(AttentionConfig, "the attention kernel")
    optim: OptimConfig = knob(OptimConfig, "the optimizer")
    parallel: ParallelConfig = knob(ParallelConfig, "the split over GPUs")
    faults: FaultsConfig = knob(FaultsConfig, "what a run does when a fault occurs")
    train: TrainConfig = knob(TrainConfig, "length, batch, precision, logging, checkpoints")

    @property
    def views(self) -> int:
        """Crops M of an image per step."""
        return self.self_guided.views if self.self_guided.enabled else self.self_guided.baseline_views

    @property
    def student_views(self) -> int:
        """Sequences of an image that the student processes per step."""
        return self.self_guided.sequences
