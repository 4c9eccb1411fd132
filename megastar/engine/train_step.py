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
from megastar.engine.zero.engines import Engines
from megastar.errors import UserError
from megastar.model.masks import MaskSpec, draw_hidden
from megastar.model.transformer import Output
from megastar.objectives.self_guided import at_positions, draw_positions, total
from megastar.parallel.collectives import gather_rows
from megastar.parallel.tensor_hash import hash_tensor
from megastar.teacher.schedule import decay_at


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; a copy to a GPU is made from pinned memory, and the host does not wait for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


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

    ``batch``: codes (B, M, T) int64, labels (B,) with dropped ones already the null class, ids and epochs (B,).
    ``spreads``: the features' spread among the parts; asked for where a row of metrics is due.
    """
    if cfg.parallel.check_batches:
        check_batch(ctx, batch, step)
    codes, labels = to_device(batch["codes"], ctx.device), to_device(batch["labels"], ctx.device)
    B, M, T = codes.shape
    guided = cfg.self_guided
    if not guided.enabled:
        return total(guided, loss_ar=engines.student(labels.repeat_interleave(M), codes.flatten(0, 1)).loss)

    assert engines.teacher is not None
    Ms = guided.student_views
    contrastive = engines.student.module.contrastive  # false in the ablation without both contrastive losses
    block = guided.contrastive_block if contrastive else None
    positions = None
    if contrastive:
        positions = to_device(draw_positions(cfg.train.seed, step, T, guided.positions), ctx.device)  # (K,)
    mask = hidden_mask(cfg, batch, Ms, ctx.device)
    student_codes = codes[:, :Ms].flatten(0, 1)  # (B*Ms, T)
    student_labels = labels.repeat_interleave(Ms)
    out = engines.student(student_labels, student_codes, mask=mask, positions=positions)
    teacher_labels = labels if guided.share_label_drop else to_device(batch["true_labels"], ctx.device)
    last, targets = teacher_pass(engines, codes, teacher_labels, Ms, block, positions)
    anchors = None if out.anchors is None else out.anchors.unflatten(0, (B, Ms))  # (B, Ms, K, D)
    return total(
        guided,
        loss_ar=out.loss,
        student_last=out.last,
        teacher_last=last,
        anchors=anchors,
        targets=targets,
        gather=lambda x: gather_rows(x, ctx.data_group),
        rank_offset=ctx.mesh.data_rank,
        spreads=spreads,
    )


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
def teacher_pass(
    engines: Engines, codes: Tensor, labels: Tensor, student_views: int, block: int | None, positions: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Unmasked teacher on codes (B, M, T): last-layer features of the student's views (B * Ms, T, D), and block
    ``block``'s of all views at the positions, (B, M, K, D), or None without positions."""
    M, Ms = codes.shape[1], student_views
    teacher = engines.teacher
    assert teacher is not None

    def see(views: Tensor, last_block: int | None = None) -> tuple[Tensor, Tensor | None]:  # views (B, m, T)
        inputs = views.flatten(0, 1)[:, :-1]
        repeated = labels.repeat_interleave(views.shape[1])
        out: Output = teacher(repeated, inputs, features_at=block, last_block=last_block, need_logits=False)
        assert out.last is not None
        return out.last, out.features

    def at(features: Tensor | None, m: int) -> Tensor:
        assert features is not None and positions is not None
        return at_positions(features, positions, m)

    if positions is None:
        return see(codes[:, :Ms])[0], None
    last, features = see(codes[:, :Ms])
    if Ms == M:
        return last, at(features, M)
    # The views that the student does not see are needed no deeper than the contrastive block.
    _, rest = see(codes[:, Ms:], last_block=block)
    return last, torch.cat([at(features, Ms), at(rest, M - Ms)], dim=1)


@torch.no_grad()
def validation_loss(engines: Engines, ctx: Context, batches: list[dict[str, Any]]) -> float:
    """Mean next-token loss of the student on fixed images: one view, no mask, no dropout, true classes."""
    engines.student.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ctx.device)
    for batch in batches:
        PHASE.at(VALIDATION)
        codes = batch["codes"][:, 0].to(ctx.device)
        loss = engines.student(batch["labels"].to(ctx.device), codes).loss
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
