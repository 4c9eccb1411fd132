"""Learning rate and run length, as pure functions of the configuration and the step."""

from __future__ import annotations

import math
import re

from megastar.config.schema import TrainConfig
from megastar.config.sections.optim import OptimConfig

EMBEDDINGS = ("transformer.tok_embeddings.", "transformer.cls_embedding.")
TARGETS = "transformer.target_embeddings."  # of a random token order
BLOCK = re.compile(r"transformer\.layers\.(\d+)\.")


def total_steps(train: TrainConfig, samples: int) -> int:
    """Optimizer steps of the run: ``train.steps``, or epochs over ``samples`` images."""
    return train.total_steps(samples)


def row_due(train: TrainConfig, step: int, steps: int) -> bool:
    """Whether the step after ``step`` finished ones is written to metrics.jsonl."""
    return (step + 1) % train.log_every == 0 or step + 1 == steps


def peak_rate(optim: OptimConfig, global_batch: int) -> float:
    """The maximum rate of the run; scaled with global_batch / 256 when ``scale_lr`` [P]."""
    return scaled(optim.lr, optim, global_batch)


def scaled(lr: float, optim: OptimConfig, global_batch: int) -> float:
    return lr * (global_batch / 256 if optim.scale_lr else 1.0)


def learning_rate(optim: OptimConfig, global_batch: int, step: int, steps: int) -> float:
    """Rate of the step after ``step`` finished ones."""
    return at_step(peak_rate(optim, global_batch), optim, step, steps)


def muon_rate(optim: OptimConfig, global_batch: int, step: int, steps: int) -> float:
    """That of the matrices that Muon updates: its own peak, with the same schedule."""
    return at_step(scaled(optim.muon.lr, optim, global_batch), optim, step, steps)


def rates_at(optim: OptimConfig, global_batch: int, step: int, steps: int) -> dict[str, float]:
    """The rates of that step by their names in metrics.jsonl."""
    muon = {"lr_muon": muon_rate(optim, global_batch, step, steps)} if optim.of_matrices else {}
    return {"lr": learning_rate(optim, global_batch, step, steps)} | muon


def layer_scale(name: str, n_layer: int, decay: float) -> float:
    """Factor of the learning rate of the weight ``name`` of the student: ``optim.layer_decay``."""
    if name.startswith((*EMBEDDINGS, TARGETS)):
        return decay**n_layer
    block = BLOCK.match(name)
    return decay ** (n_layer - 1 - int(block.group(1))) if block else 1.0


def is_frozen(name: str, train: TrainConfig) -> bool:
    """Whether ``train.freeze_blocks`` keeps the weight ``name`` of the student unchanged. Class embeddings that are not all
    those of ``train.init`` are trained."""
    block = BLOCK.match(name)
    if block:
        return int(block.group(1)) < train.freeze_blocks
    embeddings = EMBEDDINGS if train.init_classes == "same" else EMBEDDINGS[:1]
    return train.freeze_blocks > 0 and name.startswith(embeddings)


def at_step(peak: float, optim: OptimConfig, step: int, steps: int) -> float:
    o = optim
    if step < o.warmup_steps:
        return peak * (step + 1) / o.warmup_steps
    progress = min(1.0, (step - o.warmup_steps) / max(1, steps - o.warmup_steps))
    if o.schedule == "cosine":
        return peak * (o.min_lr_ratio + (1 - o.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    if o.schedule == "linear":
        return peak * (1 - (1 - o.min_lr_ratio) * progress)
    return peak
