"""The teacher's forward pass: for one micro-batch, or for all of a step before the student's first.

B images of a micro-batch, B_global images of the step, M views, Ms student views, T image tokens, K positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megastar.config.schema import RunConfig
from megastar.data.token_order import draw_orders
from megastar.engine.context import Context
from megastar.engine.input_pipeline.compute_timer import ComputeTimer
from megastar.engine.phase import PHASE
from megastar.engine.zero.engines import Engines
from megastar.model.token_order import Placement, slots_of
from megastar.model.transformer import Output
from megastar.objectives.self_guided import at_positions, draw_positions
from megastar.objectives.spread import feature_spread
from megastar.parallel.budget import runs_teacher_first
from megastar.parallel.collectives import gather_rows
from megastar.utils.device import to_device


@dataclass
class StepTargets:
    """What the teacher computed before the student's first pass of a step; ``last`` and ``index`` differ by micro-batch."""

    last: Tensor | None  # (B * Ms, T, D) of this micro-batch; None: not kept
    targets: Tensor  # (B_global, M, K, D) of the step, micro-batch by micro-batch, rows of each in rank order
    index: int  # of this micro-batch
    count: int  # of micro-batches
    anchors: list[Tensor] = field(default_factory=list)  # shared: those of the micro-batches so far, for the spread

    def spreads(self, anchors: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Spread of all anchors and targets of the step, with its last micro-batch; a collective there."""
        self.anchors.append(anchors.detach())
        if self.index + 1 < self.count or len(self.targets) < 2:
            return {}
        student = feature_spread(gather_rows(torch.cat(self.anchors), ctx.data_group))
        return {"spread_student": student, "spread_teacher": feature_spread(self.targets)}


def orders_of(cfg: RunConfig, batch: dict[str, Any], device: torch.device) -> Tensor | None:
    """The token orders of a batch, (B, M, T) int64; None for raster order. A batch without any, as those of a dry run, gets
    those that the loader would draw before any annealing."""
    if cfg.token_order.kind != "random":
        return None
    orders = batch.get("orders")
    if orders is None:
        ids, epochs = batch["ids"].numpy(), batch["epochs"].numpy()
        orders = torch.from_numpy(draw_orders(cfg.train.seed, epochs, ids, *batch["codes"].shape[1:]))
    return to_device(orders, device).long()


def codes_of(cfg: RunConfig, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The codes of a batch, (B, M, T), in the order in which the networks read them, and ``orders_of`` it."""
    codes, orders = to_device(batch["codes"], device), orders_of(cfg, batch, device)
    return (codes if orders is None else codes.gather(-1, orders)), orders


def placement_of(orders: Tensor | None) -> Placement | None:
    """orders (B, M, T) -> of their B * M sequences."""
    return None if orders is None else Placement.of(orders.flatten(0, 1))


def places_of(positions: Tensor | None, orders: Tensor | None) -> Tensor | None:
    """Image positions (K,) -> their places in the sequences: (K,) in raster order, else (B, M, K)."""
    return positions if positions is None or orders is None else slots_of(orders, positions)


def step_positions(cfg: RunConfig, step: int, device: torch.device) -> Tensor:
    """(K,) int64 on ``device``: the same for all micro-batches and ranks."""
    return to_device(draw_positions(cfg.train.seed, step, cfg.model.image_tokens, cfg.self_guided.positions), device)


def teacher_labels(cfg: RunConfig, batch: dict[str, Any], device: torch.device) -> Tensor:
    """(B,) int64: the student's, or the classes without label drop."""
    return to_device(batch["labels" if cfg.self_guided.share_label_drop else "true_labels"], device)


def teacher_first(
    cfg: RunConfig,
    engines: Engines,
    ctx: Context,
    batches: Iterable[dict[str, Any]],
    step: int,
    timer: ComputeTimer | None = None,
) -> Iterator[dict[str, Any]]:
    """The micro-batches of a step, for ``losses``, with ``StepTargets`` as ``teacher`` where the step requires them.

    With several micro-batches and ``self_guided.negatives`` of the whole batch, the teacher runs on all of them first,
    and one collective gathers its features over the data ranks. Otherwise the batches pass unchanged, one by one.
    """
    if not runs_teacher_first(cfg.self_guided, engines.accumulation):
        yield from batches
        return
    keep = cfg.parallel.teacher_features == "keep" and cfg.self_guided.alpha > 0
    positions, held, mine = step_positions(cfg, step, ctx.device), [], []
    for batch in batches:
        (codes, orders), labels = codes_of(cfg, batch, ctx.device), teacher_labels(cfg, batch, ctx.device)
        last, targets = teacher_pass(cfg, engines, codes, labels, places_of(positions, orders), keep, orders)
        assert targets is not None
        mine.append(targets)
        held.append((batch, last))
        del last
        if timer is not None:
            timer.computed()
    ranks, count = ctx.mesh.data, len(held)
    gathered = gather_rows(torch.stack(mine).flatten(0, 1), ctx.data_group)  # rank by rank
    every = gathered.unflatten(0, (ranks, count, -1)).transpose(0, 1).flatten(0, 2)
    anchors: list[Tensor] = []
    del mine, gathered
    for index in range(count):
        batch, last = held.pop(0)
        if timer is not None:
            timer.arrived()
        PHASE.at("forward")
        yield {**batch, "teacher": StepTargets(last, every, index, count, anchors)}


@torch.no_grad()
def teacher_pass(
    cfg: RunConfig,
    engines: Engines,
    codes: Tensor,
    labels: Tensor,
    positions: Tensor | None,
    need_last: bool = True,
    orders: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Unmasked teacher on codes (B, M, T), in the order ``orders`` (B, M, T): last-layer features of the student's views
    (B * Ms, T, D), or None unless ``need_last``, and the contrastive block's of all views at the positions (K,), or
    (B, M, K) of each sequence: (B, M, K, D), or None without positions."""
    M, Ms, block = codes.shape[1], cfg.self_guided.student_views, cfg.self_guided.contrastive_block
    teacher, features_at = engines.teacher, None if positions is None else block
    assert teacher is not None

    def see(views: slice, last_block: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Last features and, with positions, those of the contrastive block at these: (B * m, T, D), (B, m, K, D)."""
        inputs = codes[:, views].flatten(0, 1)[:, :-1]
        repeated, m = labels.repeat_interleave(codes[:, views].shape[1]), codes[:, views].shape[1]
        placement = placement_of(None if orders is None else orders[:, views])
        out: Output = teacher(
            repeated, inputs, features_at=features_at, last_block=last_block, need_logits=False, placement=placement
        )
        assert out.last is not None
        if positions is None:
            return out.last, None
        assert out.features is not None
        own = positions if positions.ndim == 1 else positions[:, views].flatten(0, 1)
        return out.last, at_positions(out.features, own, m)

    if positions is None:
        return see(slice(Ms))[0], None
    if not need_last:
        return None, see(slice(M), last_block=block)[1]
    last, features = see(slice(Ms))
    if Ms == M:
        return last, features
    # The views that the student does not see are needed no deeper than the contrastive block.
    _, rest = see(slice(Ms, M), last_block=block)
    assert features is not None and rest is not None
    return last, torch.cat([features, rest], dim=1)
