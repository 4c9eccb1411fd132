"""Checks of the method on a run's metrics, while it trains: warnings, each with a remedy. No torch.

A check is a pure function of the configuration and the rows of metrics.jsonl; `megastar status` runs the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from megastar.config.load import resolve_batch
from megastar.config.schema import RunConfig, SelfGuidedConfig, TrainConfig
from megastar.config.sections.optim import OptimConfig
from megastar.run_dir.jsonl import read_ends
from megastar.run_dir.layout import METRICS

Rows = Sequence[dict[str, Any]]

RECENT = 10  # rows that are averaged: one step's accuracy or loss is noisy
FIRST, KEPT = 10, 50  # first and newest rows of the run: all that the checks use
SETTLED = 200  # steps after optim.warmup_steps before a lack of learning counts. The demo is above chance after 10
CHANCE = 2.0  # times the accuracy of guessing; the demo reaches 10 times that after 10 steps
FEW_IMAGES = 8  # with fewer images, guessing cannot be distinguished from learning
COLLAPSED = 0.1  # spread: the mean cosine between two images is then about 1 - 0.1^2 = 0.99
TRIVIAL = 1e-4  # L_MIM: bf16 rounds a feature by 4e-3 of it, which makes 1 - cos about 1e-5
MAX_INITIAL_SHARE = math.exp(-1)  # of the initial weights in the last teacher: 1 / (1 - decay) steps are the whole run
MIN_STEPS = 100  # a shorter run is a trial, in which the teacher does not matter
FOLLOWED = 0.05  # share of the initial weights below which the teacher's distance is its lag, not its initialisation
TOO_FAR = 0.5  # teacher_distance: relative to the student's norm
GROWING = 1.2  # growth of teacher_distance over KEPT rows, with each fifth of them above the one before
NEAR = 0.01  # teacher_distance below which its growth does not matter; a teacher with decay 0 has 0
CONSTANTS = 5  # times 1 / (1 - decay) steps, after which the distance should be stationary
GUESSING = 0.05  # nats below ln V, or below the run's first rows


# Numbers -----------------------------------------------------------------------------------------------------------
def values(rows: Rows, name: str, count: int = RECENT) -> list[float]:
    """The newest ``count`` values; empty where there are fewer, or one is not finite."""
    found = [r[name] for r in rows[-KEPT:] if name in r][-count:]
    finite = all(type(v) in (int, float) and abs(v) < 1e300 for v in found)  # false for NaN
    return found if finite and len(found) == count else []


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run folder that the checks and `megastar status` use."""
    return read_ends(run / METRICS, FIRST, KEPT)


def training_rows(rows: Rows) -> list[dict[str, Any]]:
    """Without the rows of validations and saves."""
    return [r for r in rows if "loss_ar" in r and isinstance(r.get("step"), int)]


def past_warmup(optim: OptimConfig, rows: Rows, count: int = RECENT) -> bool:
    """Whether the newest ``count`` rows are all from steps after which something should have been learned."""
    return len(rows) >= count and rows[-count]["step"] >= optim.warmup_steps + SETTLED


def initial_weight_share(cfg: SelfGuidedConfig, steps: int) -> float:
    """Weight of the initial weights in the teacher after ``steps`` steps: the product of decay_at (teacher/schedule.py)."""
    d, warm = cfg.teacher_decay, 0
    if cfg.teacher_warmup:  # (1 + t) / (10 + t) until it reaches the decay
        warm = steps if d == 1 else min(steps, max(0, math.ceil((10 * d - 1) / (1 - d))))
    rest = d ** (steps - warm)
    return rest * math.exp(math.lgamma(warm + 1) + math.lgamma(10) - math.lgamma(warm + 10))


def contrastive_images(cfg: RunConfig, ranks: int) -> int:
    """Number of images that a contrastive anchor is compared with: those of a step, or of one forward pass of all data
    ranks."""
    if not compares_one_pass(cfg.self_guided):
        return cfg.train.global_batch
    micro, _ = resolve_batch(cfg.train, cfg.parallel.tensor_parallel, ranks)
    return micro * (ranks // cfg.parallel.tensor_parallel)


def uses_contrastive(cfg: SelfGuidedConfig) -> bool:
    return cfg.enabled and bool(cfg.beta and (cfg.step_loss or cfg.view_loss))


def compares_one_pass(cfg: SelfGuidedConfig) -> bool:
    """Whether an anchor is compared with the images of one forward pass of all data ranks, not of the step."""
    return uses_contrastive(cfg) and cfg.negatives == "micro_batch"


def uses_teacher(cfg: SelfGuidedConfig) -> bool:
    return uses_contrastive(cfg) or (cfg.enabled and bool(cfg.alpha))


# Checks: "" or one sentence ------------------------------------------------------------------------------------------
def slow_teacher(g: SelfGuidedConfig, init: str, steps: int) -> str:
    """Known before the first step. Skipped for a run that starts from trained weights: its teacher is trained too."""
    if not uses_teacher(g) or steps < MIN_STEPS or init:
        return ""
    if (left := initial_weight_share(g, steps)) <= MAX_INITIAL_SHARE:
        return ""
    time = f"follows in about {1 / (1 - g.teacher_decay):,.0f} steps" if g.teacher_decay < 1 else "never moves"
    return (
        f"the teacher hardly moves: with self_guided.teacher_decay {g.teacher_decay:g} it {time}, the run has {steps:,}, and "
        f"{left:.0%} of the last teacher are still the random initial weights: set self_guided.teacher_warmup=true, or "
        f"teacher_decay to {1 - 10 / steps:.3g} or less"
    )


def few_negatives(g: SelfGuidedConfig, train: TrainConfig, images: int, steps: int) -> str:
    """Also known before the first step."""
    if not uses_contrastive(g) or steps < MIN_STEPS or images >= FEW_IMAGES:
        return ""
    few = {1: "no other, so nothing is learned from it", 2: "1 other"}
    among = few.get(images, f"{images - 1} others")
    start = f"the contrastive terms have few negatives: each anchor distinguishes its image from {among} "
    if not compares_one_pass(g):
        return start + f"(train.global_batch {train.global_batch}): raise it, or set self_guided.beta=0"
    return start + (
        f"(a forward pass of all data ranks; train.global_batch {train.global_batch}, train.micro_batch {train.micro_batch}): "
        "raise them or use more ranks, since accumulated micro-batches do not add negatives, or set self_guided.beta=0"
    )


def problems_at_start(cfg: RunConfig, images: int, steps: int) -> dict[str, str]:
    """Kind of problem -> message, of what is known before the first of ``steps`` steps."""
    g, train = cfg.self_guided, cfg.train
    problems = {
        "slow_teacher": slow_teacher(g, train.init, steps),
        "few_negatives": few_negatives(g, train, images, steps),
    }
    return {kind: text for kind, text in problems.items() if text}


def accuracy_at_chance(cfg: RunConfig, images: int, rows: Rows) -> str:
    if images < FEW_IMAGES or not past_warmup(cfg.optim, rows):
        return ""
    low = {n: mean(v) for n in ("acc_step", "acc_view") if (v := values(rows, n)) and mean(v) < CHANCE / images}
    if not low:
        return ""
    what = " and ".join(f"{n} {v:.2g}" for n, v in low.items())
    remedy = "raise optim.lr or lower self_guided.temperature"
    if not_learning(cfg, images, rows):
        remedy = "change optim.lr: the next-token loss does not fall either"
    return (
        f"contrastive accuracy is at chance level: {what} over {RECENT} rows, guessing gives {1 / images:.2g} (1 of {images} "
        f"images): check that the stored views of a sample show the same image (megastar data stats), then {remedy}"
    )


def collapse(cfg: RunConfig, images: int, rows: Rows) -> str:
    if not past_warmup(cfg.optim, rows):  # an untrained projector returns its biases, the same for all images
        return ""
    both = {n: mean(v) for n in ("student", "teacher") if (v := values(rows, f"spread_{n}"))}
    low = [f"spread_{n} {v:.2g}" for n, v in both.items() if v < COLLAPSED]
    if not low:
        return ""
    remedy = (
        "restart from an earlier checkpoint (train.init, another run=...) with a lower optim.lr or a larger "
        "train.global_batch"
    )
    if not_learning(cfg, images, rows):  # an untrained projector looks the same: the rate may also be near 0
        remedy = f"change optim.lr (now {cfg.optim.lr:g}) first, the next-token loss does not fall either"
    return f"features collapse: {' and '.join(low)} over {RECENT} rows, spread-out features have about 1: {remedy}"


def far_teacher(cfg: RunConfig, images: int, rows: Rows) -> str:
    g, away = cfg.self_guided, values(rows, "teacher_distance")
    if not away or mean(away) < TOO_FAR or initial_weight_share(g, rows[-RECENT]["step"]) > FOLLOWED:
        return ""
    return (
        f"the teacher does not keep up: teacher_distance is {mean(away):.2g} over {RECENT} rows, so the student's targets "
        f"come from a different network: lower self_guided.teacher_decay (now {g.teacher_decay:g}) if the losses fall, else optim.lr"
    )


def growing_teacher(cfg: RunConfig, images: int, rows: Rows) -> str:
    g, away = cfg.self_guided, values(rows, "teacher_distance", KEPT)
    rest = cfg.optim.warmup_steps + CONSTANTS / max(1 - g.teacher_decay, 1e-9)
    if not away or rows[-KEPT]["step"] < rest:
        return ""
    fifth = KEPT // 5
    means = [mean(away[i : i + fifth]) for i in range(0, KEPT, fifth)]
    if means != sorted(means) or means[-1] < max(NEAR, GROWING * means[0]):
        return ""
    return (
        f"the teacher falls behind: teacher_distance grew from {means[0]:.2g} to {means[-1]:.2g} within {KEPT} rows, long "
        "after it should be stationary: the student drifts, lower optim.lr"
    )


def trivial_mim(cfg: RunConfig, images: int, rows: Rows) -> str:
    loss, g = values(rows, "loss_mim"), cfg.self_guided
    if not loss or mean(loss) >= TRIVIAL:
        return ""
    return (
        f"the MIM loss is trivially small: {mean(loss):.2g} over {RECENT} rows, student and teacher compute the same features: "
        f"raise self_guided.mask_ratio (now {g.mask_ratio:g}) or teacher_decay (now {g.teacher_decay:g}), or set alpha=0 "
        "to save the computation"
    )


def always_clipped(cfg: RunConfig, images: int, rows: Rows) -> str:
    norms, clip = values(rows, "grad_norm", KEPT), cfg.optim.grad_clip
    if not clip or not norms or min(norms) <= clip or not past_warmup(cfg.optim, rows, KEPT):
        return ""
    return (
        f"every gradient is clipped: grad_norm was {min(norms):.2g} to {max(norms):.2g} in {KEPT} rows, optim.grad_clip is "
        f"{clip:g}: harmless while the loss falls, else lower optim.lr or lengthen optim.warmup_steps"
    )


def not_learning(cfg: RunConfig, images: int, rows: Rows) -> str:
    now, first = values(rows, "loss_ar"), values(rows[:FIRST], "loss_ar", FIRST)
    if not now or not past_warmup(cfg.optim, rows):
        return ""
    guess = math.log(cfg.model.vocab_size)
    reference, name = guess, f"guessing gives ln {cfg.model.vocab_size} = {guess:.2f}"
    if first and mean(first) < guess and not cfg.train.init:  # trained weights may not improve much further
        reference, name = mean(first), f"the first {FIRST} rows had {mean(first):.2f}"
    if mean(now) < reference - GUESSING:
        return ""
    return (
        f"the next-token loss does not fall: loss_ar is {mean(now):.2f} over {RECENT} rows, {name}: check that optim.lr "
        "is neither near 0 nor too high, and that the shards are intact (megastar data verify)"
    )


CHECKS: tuple[Callable[[RunConfig, int, Rows], str], ...] = (
    accuracy_at_chance, collapse, far_teacher, growing_teacher, trivial_mim, always_clipped, not_learning,
)  # fmt: skip


def find_problems(cfg: RunConfig, images: int, rows: Rows) -> dict[str, str]:
    """Kind of problem -> message with the remedy. rows: of metrics.jsonl, oldest first; images: ``contrastive_images``."""
    rows = training_rows(rows)
    found = {check.__name__: text for check in CHECKS if (text := check(cfg, images, rows))}
    if "collapse" in found:
        found.pop("accuracy_at_chance", None)  # a consequence, for which a higher learning rate is no remedy
    return found
