"""The fields of the tokenizer and of its training (``megastar train-tokenizer``)."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import LARGE, MOST_BATCH, MOST_SEED, MOST_STEPS, MOST_THREADS, knob
from megastar.config.sections.rank_faults import RankFaultsConfig
from megastar.config.sections.trackers import TRACKER_NAMES, TRACKERS_HELP


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
    log_every: int = knob(50, "steps between rows of metrics.jsonl", low=1, high=MOST_STEPS)
    trackers: list[str] = knob(["tensorboard"], TRACKERS_HELP, choices=TRACKER_NAMES)
    faults: RankFaultsConfig = knob(RankFaultsConfig, "hung and lost ranks")
