"""The fields of the section eval: scores while a run trains. Plain dataclasses, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import LARGE, MOST_BATCH, MOST_STEPS, knob

METRICS = ("fd", "fid", "fd_dinov2")
LEAST_FID = 2049  # images: with fewer, the covariance of 2048 features is singular


@dataclass
class EvaluationConfig:
    """Samples are drawn and scored on the ranks of the run; it does not change any value of the training."""

    every: int = knob(0, "steps between evaluations, and one at the last step; 0: never", low=0, high=MOST_STEPS)
    samples: int = knob(5000, "images that are sampled; papers use 50000", low=4, high=10**9)
    metric: str = knob(
        "fd",
        "fd: FD-EffLite0, which needs no file; fid: needs eval.inception; fd_dinov2: needs eval.dinov2",
        choices=METRICS,
    )
    inception: str = knob("", "file with FID's Inception weights (docs/evaluation.md)")
    dinov2: str = knob("", "file with DINOv2's weights, of the ViT-L/14 for FD-DINOv2")
    against: str = knob(
        "",
        "reference: ADM's VIRTUAL_*.npz, or a folder, tar or .npz of images; empty: the run's training shards, decoded",
    )
    against_subset: str = knob("", "use only reference images in this top-level folder")
    against_images: int = knob(
        50000, "images of the training shards that are the reference, the first ones; 0: all", low=0, high=10**9
    )
    weights: str = knob(
        "ema",
        "weights to sample from: ema, which every run has (ST-AR's teacher), or student",
        choices=("ema", "student"),
    )
    cfg_scale: float = knob(1.0, "classifier-free guidance; 1: none", low=1, high=10**6)
    labels: str = knob(
        "data", "classes of the samples: as frequent as in data.shards, or balanced", choices=("data", "balanced")
    )
    batch: int = knob(64, "images that a rank samples at once", low=1, high=MOST_BATCH)
    thresholds: list[float] = knob(
        [],
        "scores k of the columns `epochs to <= k` of megastar status and compare, as [50, 20, 10]",
        above=0,
        high=LARGE,
    )

    def due(self, step: int, steps: int) -> bool:
        """Whether the weights after ``step`` of ``steps`` steps are scored."""
        return bool(self.every and step and (step == steps or step % self.every == 0))
