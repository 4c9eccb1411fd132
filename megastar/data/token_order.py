"""The order in which a sample's tokens are read: functions of (seed, epoch, sample), as its crops (views.py).

The order of the samples is another thing: order.py. B samples, M views, T image tokens.
"""

from __future__ import annotations

import numpy as np

from megastar.config.schema import RunConfig
from megastar.data.views import random_bits

_ORDER, _DECISION, _VALIDATION = 3, 4, 5  # independent random streams; views.py has the first ones


def random_shares(cfg: RunConfig, steps: np.ndarray, samples: int) -> np.ndarray:
    """Share of permuted images at each of ``steps`` (n,), of a run over shards of ``samples`` images: (n,) float64."""
    per_step = cfg.train.global_batch / samples  # passes over the shards
    epochs = cfg.train.total_steps(samples) * per_step
    return np.array([cfg.token_order.random_share(int(step) * per_step, epochs) for step in steps])


def validates_permuted(cfg: RunConfig, samples: int) -> bool:
    """Whether validation permutes the tokens: for a run that never reads them in raster order."""
    epochs = cfg.train.total_steps(samples) * cfg.train.global_batch / samples
    return cfg.token_order.kind == "random" and not cfg.token_order.anneals(epochs)


def schedule_change(cfg: RunConfig, samples: int, step: int, planned: int) -> str:
    """What another length of the run changes in the orders at ``step``; ``planned``: its steps when the checkpoint was saved.
    Empty if nothing changes."""
    order, steps, per_step = cfg.token_order, cfg.train.total_steps(samples), cfg.train.global_batch / samples
    if order.kind != "random" or planned == steps:
        return ""
    before, now = (order.random_share(step * per_step, total * per_step) for total in (planned, steps))
    flips = order.anneals(planned * per_step) != order.anneals(steps * per_step)
    parts = []
    if abs(before - now) > 1e-9:
        parts.append(
            f"the share of permuted images at step {step} changes from {before:.0%} to {now:.0%}, because token_order.anneal_start "
            "and anneal_end are fractions of the run (anneal_unit=epochs does not depend on its length)"
        )
    if flips:
        kinds = ("random", "raster") if order.anneals(steps * per_step) else ("raster", "random")
        parts.append(
            "val_loss_ar was measured in {} order and is now measured in {} order; the values are not comparable".format(
                *kinds
            )
        )
    return f"the run has {steps} steps instead of {planned}: {'; '.join(parts)}" if parts else ""


def draw_orders(
    seed: int, epochs: np.ndarray, ids: np.ndarray, views: int, tokens: int, share: float | np.ndarray = 1.0
) -> np.ndarray:
    """(B,), (B,) -> (B, M, T) int32: entry t is the grid position of the token that comes at place t.

    Each view of a sample has its own permutation. With probability 1 - ``share`` all views of a sample are in raster order
    instead, drawn independently of the permutations: a larger share only permutes more samples. ``share``: one, or (B,).
    """
    bits = random_bits(seed, _ORDER, epochs, ids, views * tokens).reshape(len(ids), views, tokens)
    orders = np.argsort(bits, axis=-1, kind="stable").astype(np.int32)
    if np.min(share) < 1:
        uniform = (random_bits(seed, _DECISION, epochs, ids, 1)[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        orders[uniform >= share] = np.arange(tokens, dtype=np.int32)
    return orders


def validation_orders(ids: np.ndarray, tokens: int) -> np.ndarray:
    """(B,) -> (B, 1, T) int32: the permutation in which an image is validated, the same for all seeds and steps."""
    bits = random_bits(0, _VALIDATION, np.zeros_like(ids), ids, tokens)
    return np.argsort(bits, axis=-1, kind="stable").astype(np.int32)[:, None]
