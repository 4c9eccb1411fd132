"""The optimizer's section of a run: AdamW's fields and Muon's. Plain dataclasses, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import LARGE, MOST_STEPS, knob

MUON_LEAST, ADAMW_MOST = 1e-3, 1e-2  # peak rates of Muon: at most AdamW's size, at least its own


@dataclass
class MuonConfig:
    """Muon's fields, with the names and defaults of ``torch.optim.Muon`` except ``lr`` (Keller Jordan's 0.02)."""

    lr: float = knob(
        0.02,
        "learning rate of the blocks' matrices; scaled with the batch as optim.lr is (scale_lr)",
        above=0,
        high=LARGE,
    )
    weight_decay: float = knob(0.1, "decoupled weight decay of the blocks' matrices", low=0, high=LARGE)
    momentum: float = knob(0.95, "decay of the momentum buffer", low=0, below=1)
    nesterov: bool = knob(True, "Nesterov momentum")
    ns_steps: int = knob(5, "Newton-Schulz iterations", low=1, high=99)
    eps: float = knob(1e-7, "least norm that a matrix is divided by before the first iteration", above=0, high=1)
    adjust_lr_fn: str = knob(
        "original",
        "factor of lr for an A x B matrix: original: sqrt(max(1, A / B)); match_rms_adamw: 0.2 sqrt(max(A, B)), for a lr of "
        "AdamW's size",
        choices=("original", "match_rms_adamw"),
    )
    ns_dtype: str = knob(
        "auto",
        "type of the Newton-Schulz iterations: bf16 as torch.optim.Muon, fp32, or auto: that of train.dtype",
        choices=("auto", "bf16", "fp32"),
    )
    split_qkv: bool = knob(
        True, "orthogonalize q, k and v each for itself; false: the fused (3 D, D) weight as one matrix"
    )

    def type_of(self, dtype: str) -> str:
        """The type of the iterations in a run of compute type ``dtype``, bf16 or fp32."""
        return dtype if self.ns_dtype == "auto" else self.ns_dtype


@dataclass
class OptimConfig:
    """AdamW, or Muon for the blocks' matrices with AdamW for the rest, on fp32 master weights."""

    name: str = knob(
        "adamw",
        "adamw, or muon: Muon for the 2-D weights of the blocks, AdamW for embeddings, head, norms and projector",
        choices=("adamw", "muon"),
    )
    lr: float = knob(
        1e-4, "learning rate at a global batch of 256 images; scaled linearly with the batch [P]", above=0, high=LARGE
    )
    scale_lr: bool = knob(True, "multiply lr by global_batch / 256; false: use lr as is")
    beta1: float = knob(0.9, "AdamW beta 1 [P]", low=0, below=1)
    beta2: float = knob(0.95, "AdamW beta 2 [P; printed as 0.05, read as a misprint]", low=0, below=1)
    eps: float = knob(1e-8, "AdamW epsilon [C]", above=0, high=1)
    weight_decay: float = knob(0.05, "weight decay of tensors with two or more dimensions [P]", low=0, high=LARGE)
    grad_clip: float = knob(1.0, "maximum gradient norm; 0: no clipping [P]", low=0, high=LARGE)
    schedule: str = knob(
        "constant", "constant [L], cosine (to min_lr_ratio), or linear", choices=("constant", "cosine", "linear")
    )
    warmup_steps: int = knob(0, "steps of linear warm-up", low=0, high=MOST_STEPS)
    min_lr_ratio: float = knob(0.01, "final lr of cosine and linear, as a fraction of the peak", low=0, high=1)
    layer_decay: float = knob(
        1.0,
        "factor of the learning rate per layer below the head: block i of L has layer_decay^(L - 1 - i), the embeddings "
        "layer_decay^L; 1: the same rate everywhere",
        above=0,
        high=1,
    )
    muon: MuonConfig = knob(MuonConfig, "Muon, where name is muon; schedule, warm-up and clipping are those of optim")

    @property
    def of_matrices(self) -> MuonConfig | None:
        """Muon's fields where Muon updates the blocks' matrices, else None."""
        return self.muon if self.name == "muon" else None


def rate_warning(optim: OptimConfig, peak: float) -> str:
    """A sentence about a peak rate of Muon that has the size usual for AdamW; empty if the rate has its usual size.

    Per unit of the rate, an A x B update has a root mean square of about 1 / sqrt(B) under ``original``, and of 0.2, which
    is AdamW's, under ``match_rms_adamw``.
    """
    if optim.name != "muon":
        return ""
    fn = optim.muon.adjust_lr_fn
    if fn == "original" and peak <= MUON_LEAST:
        return (
            f"optim.muon.lr gives a peak rate of {peak:g}, which is of AdamW's size, and optim.muon.adjust_lr_fn is "
            "original: use about 0.02, or adjust_lr_fn=match_rms_adamw"
        )
    if fn == "match_rms_adamw" and peak >= ADAMW_MOST:
        return (
            f"optim.muon.lr gives a peak rate of {peak:g}, and optim.muon.adjust_lr_fn is match_rms_adamw: use a rate of "
            "AdamW's size, or adjust_lr_fn=original"
        )
    return ""
