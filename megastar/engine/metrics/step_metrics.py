"""What a row of metrics says beside losses: how far the teacher is from the student, memory, and the share of the peak."""

from __future__ import annotations

import resource

import torch

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.zero.ema_teacher import PREFIX
from megastar.engine.zero.engines import Engines, owned
from megastar.parallel.collectives import gather_rows
from megastar.parallel.cost import peak_tflops, step_flops

CHUNK = 1 << 26  # elements whose difference exists at once
CACHED = 1 << 18  # of a CPU: the difference is still in its cache when its norm is taken


def step_metrics(ctx: Context, engines: Engines) -> dict[str, float]:
    """After a step, on all ranks together: one small gather. ``memory_gib`` is the largest rank's peak since its start;
    ``teacher_distance`` is ||teacher - student|| / ||student|| over all weights that both have, in fp32.
    """
    away, norm = teacher_distance_squares(ctx, engines) if engines.teacher is not None else (0.0, 0.0)
    mine = torch.tensor([[away, norm, peak_bytes(ctx.device)]], dtype=torch.float64, device=ctx.device)
    every = gather_rows(mine, torch.distributed.group.WORLD if ctx.world > 1 else None).cpu()
    row = {"memory_gib": every[:, 2].max().item() / 2**30}
    if engines.teacher is not None:
        away, norm = every[:, 0].sum().item(), every[:, 1].sum().item()
        row["teacher_distance"] = (away / norm) ** 0.5
    return row


@torch.no_grad()
def teacher_distance_squares(ctx: Context, engines: Engines) -> tuple[float, float]:
    """||teacher - student||^2 and ||student||^2 of this rank's part of the fp32 masters and their average.

    Each element is some rank's, and no other's: the sums over all ranks are the whole networks'.
    """
    shards = [s for s in owned(engines, ctx) if s.name.startswith(PREFIX)]
    if not shards:
        return 0.0, 0.0
    away, norm = [], []
    for shard in shards:
        ema, fp32 = shard.view("ema"), shard.view("fp32")
        most = CHUNK if fp32.is_cuda else CACHED
        for e, s in zip(ema.split(most), fp32.split(most), strict=True):
            difference = e - s
            away.append(torch.dot(difference, difference))  # on a CPU five times as fast as a norm
            norm.append(torch.dot(s, s))
    both = torch.stack([torch.stack(away), torch.stack(norm)]).double().sum(1)  # (2,)
    return both[0].item(), both[1].item()


def peak_bytes(device: torch.device) -> float:
    """Most memory at once: of the GPU, what torch allocated; without one, what the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ideal_seconds(cfg: RunConfig, ctx: Context) -> float | None:
    """Seconds of a step whose arithmetic runs at the devices' bf16 peak; None in fp32, and for an unknown peak."""
    if ctx.device.type != "cuda" or ctx.dtype != torch.bfloat16:
        return None
    peak = peak_tflops(torch.cuda.get_device_name(ctx.device))
    flops = step_flops(cfg)  # recomputing is no part of MFU
    return (flops["student"] + flops["teacher"]) / (peak * 1e12 * ctx.world) if peak else None
