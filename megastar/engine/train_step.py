"""One forward pass of the method: batch -> student and teacher -> losses. Legend: B images, M views, N = B * views,
T image tokens, S = T positions, K sampled positions, D width, V codes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.lr_schedule import learning_rate, muon_rate
from megastar.engine.phase import PHASE, VALIDATION
from megastar.engine.student import StudentOutput
from megastar.engine.teacher_pass import (
    StepTargets,
    codes_of,
    placement_of,
    places_of,
    step_positions,
    teacher_labels,
    teacher_pass,
)
from megastar.engine.zero.engines import Engines
from megastar.errors import UserError
from megastar.model.masks import MaskSpec, draw_hidden
from megastar.model.token_order import Placement
from megastar.objectives.alignment import alignment_loss, target_patches
from megastar.objectives.contrastive import identity
from megastar.objectives.self_guided import total
from megastar.parallel.collectives import gather_rows
from megastar.parallel.tensor_hash import hash_tensor
from megastar.teacher.schedule import decay_at
from megastar.utils.device import to_device


def hidden_mask(cfg: RunConfig, batch: dict[str, Any], views: int, device: torch.device) -> MaskSpec | None:
    """One set of hidden keys a sequence, a function of (seed, epoch, sample, view): (B * views, S)."""
    seed, T, ratio = cfg.train.seed, cfg.model.image_tokens, cfg.self_guided.mask_ratio
    if ratio == 0:
        return None
    draws = [draw_hidden(seed, batch["epochs"], batch["ids"], T, ratio, view=m) for m in range(views)]
    return MaskSpec.hidden(to_device(torch.stack(draws, dim=1).flatten(0, 1), device))


def losses(
    cfg: RunConfig, engines: Engines, ctx: Context, batch: dict[str, Any], step: int, spreads: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss of one micro-batch, with a graph through the student only, and its parts.

    ``batch``: codes (B, M, T) int64, labels (B,) with dropped ones already the null class, ids and epochs (B,); from
    ``teacher_first`` also ``teacher``, ``StepTargets``. Without it the contrastive losses compare this micro-batch's images.
    ``spreads``: the features' spread among the parts; asked for where a row of metrics is due. Under representation
    alignment ``batch`` also holds the encoder's ``features`` (B, M, T, C).
    """
    if cfg.parallel.check_batches:
        check_batch(ctx, batch, step)
    (codes, orders), labels = codes_of(cfg, batch, ctx.device), to_device(batch["labels"], ctx.device)
    B, M = codes.shape[:2]
    guided, align = cfg.self_guided, cfg.repa.active
    if not guided.enabled:
        inputs = labels.repeat_interleave(M), codes.flatten(0, 1)
        out = engines.student(*inputs, placement=placement_of(orders), align=align)
        return with_alignment(cfg, batch, out, M, *total(guided, loss_ar=out.loss))

    assert engines.teacher is not None
    Ms = guided.student_views
    contrastive = engines.student.module.contrastive  # false in the ablation without both contrastive losses
    positions = step_positions(cfg, step, ctx.device) if contrastive else None  # (K,)
    places = places_of(positions, orders)  # (K,) or (B, M, K)
    mask = hidden_mask(cfg, batch, Ms, ctx.device)
    student_codes = codes[:, :Ms].flatten(0, 1)  # (B*Ms, T)
    student_labels = labels.repeat_interleave(Ms)
    own = places if places is None or places.ndim == 1 else places[:, :Ms].flatten(0, 1)  # (K,) or (B*Ms, K)
    placement = placement_of(None if orders is None else orders[:, :Ms])
    out = engines.student(student_labels, student_codes, mask=mask, positions=own, placement=placement, align=align)
    anchors = None if out.anchors is None else out.anchors.unflatten(0, (B, Ms))  # (B, Ms, K, D)
    seen: StepTargets | None = batch.get("teacher")
    last, targets = (None, None) if seen is None else (seen.last, seen.targets)
    if seen is None or (last is None and guided.alpha):
        at = places if seen is None else None
        last, mine = teacher_pass(cfg, engines, codes, teacher_labels(cfg, batch, ctx.device), at, orders=orders)
        targets = mine if seen is None else targets
    ranks, rank = ctx.mesh.data, ctx.mesh.data_rank
    loss, metrics = total(
        guided,
        loss_ar=out.loss,
        student_last=out.last,
        teacher_last=last,
        anchors=anchors,
        targets=targets,
        gather=(lambda x: gather_rows(x, ctx.data_group)) if seen is None else identity,
        rank_offset=rank if seen is None else seen.index * ranks + rank,
        spreads=spreads and seen is None,
    )
    if seen is not None and spreads and anchors is not None:
        metrics |= seen.spreads(anchors, ctx)
    return with_alignment(cfg, batch, out, Ms, loss, metrics)


def with_alignment(
    cfg: RunConfig, batch: dict[str, Any], out: StudentOutput, views: int, loss: Tensor, metrics: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts with that of representation alignment, where it is active. ``views``: of the student."""
    if out.aligned is None:
        return loss, metrics
    features = to_device(batch["features"], out.aligned.device)[:, :views].flatten(0, 1)  # (N, T, C)
    value, parts = alignment_loss(out.aligned, target_patches(features, cfg.repa.match))
    loss = loss + cfg.repa.weight * value
    return loss, metrics | parts | {"loss": loss.detach()}


def check_batch(ctx: Context, batch: dict[str, Any], step: int) -> None:
    """Raise ``UserError`` on all ranks of a tensor group when their batches differ; a batch of zeros is a substitute."""
    if ctx.tensor_group is None:
        return
    parts = [batch[name].flatten().to("cpu", torch.int64) for name in ("codes", "labels", "ids", "epochs")]
    total = hash_tensor(torch.cat(parts))  # 0 for a batch of zeros
    seen = gather_rows(total.view(1).to(ctx.device), ctx.tensor_group)
    seen = seen[seen != 0]
    if (seen != seen[:1]).any():
        raise UserError(
            f"step {step}: the ranks of a tensor group (rank {ctx.rank} among them) got different batches "
            f"({seen.tolist()}): the loader must be given the data rank, not the rank"
        )


@torch.no_grad()
def validation_loss(engines: Engines, ctx: Context, batches: list[dict[str, Any]]) -> float:
    """Mean next-token loss of the student on fixed images: one view, no mask, no dropout, true classes; in the order of the
    batch, or in raster order."""
    engines.student.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ctx.device)
    for batch in batches:
        PHASE.at(VALIDATION)
        codes, orders = batch["codes"][:, 0].to(ctx.device), batch.get("orders")
        placement = None
        if orders is not None:
            order = orders[:, 0].to(ctx.device).long()
            codes, placement = codes.gather(-1, order), Placement.of(order)
        loss = engines.student(batch["labels"].to(ctx.device), codes, placement=placement).loss
        sums += torch.stack([loss.double() * len(codes), torch.full_like(loss, len(codes), dtype=torch.float64)])
    if ctx.world > 1:
        dist.all_reduce(sums)
    engines.student.train()
    return (sums[0] / sums[1]).item()


def set_schedules(cfg: RunConfig, engines: Engines, step: int, steps: int) -> None:
    place = (cfg.optim, cfg.train.global_batch, step, steps)
    engines.set_schedules(learning_rate(*place), decay_at(step, cfg.self_guided), muon_rate(*place))


def average_over_ranks(ctx: Context, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    stacked = torch.stack(list(sums.values()))
    if ctx.world > 1:
        dist.all_reduce(stacked)
    return dict(zip(sums, (stacked / ctx.world).tolist(), strict=True))
