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
from megastar.engine.context import Context
from megastar.engine.input_pipeline.compute_timer import ComputeTimer
from megastar.engine.phase import PHASE
from megastar.engine.zero.engines import Engines
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
        codes, labels = to_device(batch["codes"], ctx.device), teacher_labels(cfg, batch, ctx.device)
        last, targets = teacher_pass(cfg, engines, codes, labels, positions, need_last=keep)
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
) -> tuple[Tensor | None, Tensor | None]:
    """Unmasked teacher on codes (B, M, T): last-layer features of the student's views (B * Ms, T, D), or None unless
    ``need_last``, and the contrastive block's of all views at the positions, (B, M, K, D), or None without positions."""
    M, Ms, block = codes.shape[1], cfg.self_guided.student_views, cfg.self_guided.contrastive_block
    teacher, features_at = engines.teacher, None if positions is None else block
    assert teacher is not None

    def see(views: Tensor, last_block: int | None = None) -> tuple[Tensor, Tensor | None]:  # views (B, m, T)
        inputs = views.flatten(0, 1)[:, :-1]
        repeated = labels.repeat_interleave(views.shape[1])
        out: Output = teacher(repeated, inputs, features_at=features_at, last_block=last_block, need_logits=False)
        assert out.last is not None
        return out.last, out.features

    def at(features: Tensor | None, m: int) -> Tensor:
        assert features is not None and positions is not None
        return at_positions(features, positions, m)

    if positions is None:
        return see(codes[:, :Ms])[0], None
    if not need_last:
        return None, at(see(codes, last_block=block)[1], M)
    last, features = see(codes[:, :Ms])
    if Ms == M:
        return last, at(features, M)
    # The views that the student does not see are needed no deeper than the contrastive block.
    _, rest = see(codes[:, Ms:], last_block=block)
    return last, torch.cat([at(features, Ms), at(rest, M - Ms)], dim=1)
