"""Metrics beside the losses: the teacher's distance from the student, memory, and the share of the peak FLOPs."""

from __future__ import annotations

import resource
from typing import Any

import torch

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.zero.compiled_blocks import compilations
from megastar.engine.zero.ema_teacher import PREFIX
from megastar.engine.zero.engines import Engines, owned
from megastar.model.kernels.select import chosen
from megastar.parallel.collectives import gather_rows
from megastar.parallel.cost import step_flops
from megastar.parallel.gpus import peak_tflops

GPU_CHUNK = 1 << 26  # elements whose difference exists at once
CPU_CHUNK = 1 << 18  # the difference is still in the cache when its norm is taken


def step_metrics(ctx: Context, engines: Engines) -> dict[str, Any]:
    """After a step; collective, one small gather. ``memory_gib`` is the largest rank's peak since its start;
    On a GPU ``compilations`` counts the compiled graphs of this rank, constant in a healthy run, and ``attention`` names the
    kernels in use.
    ``teacher_distance`` is ||teacher - student|| / ||student|| over all weights that both have, in fp32.
    """
    away, norm = teacher_distance_squares(ctx, engines) if engines.teacher is not None else (0.0, 0.0)
    mine = torch.tensor([[away, norm, peak_bytes(ctx.device)]], dtype=torch.float64, device=ctx.device)
    every = gather_rows(mine, torch.distributed.group.WORLD if ctx.world > 1 else None).cpu()
    row: dict[str, Any] = {"memory_gib": every[:, 2].max().item() / 2**30}
    if ctx.device.type == "cuda":
        row |= {"compilations": compilations(), "attention": ", ".join(sorted(set(chosen().values())))}
    if engines.teacher is not None:
        away, norm = every[:, 0].sum().item(), every[:, 1].sum().item()
        row["teacher_distance"] = (away / norm) ** 0.5
    return row


@torch.no_grad()
def teacher_distance_squares(ctx: Context, engines: Engines) -> tuple[float, float]:
    """||teacher - student||^2 and ||student||^2 of this rank's part of the fp32 masters and their average.

    Each element belongs to exactly one rank: the sums over all ranks are those of the whole networks.
    """
    shards = [s for s in owned(engines, ctx) if s.name.startswith(PREFIX)]
    if not shards:
        return 0.0, 0.0
    away, norm = [], []
    for shard in shards:
        ema, fp32 = shard.view("ema"), shard.view("fp32")
        chunk = GPU_CHUNK if fp32.is_cuda else CPU_CHUNK
        for e, s in zip(ema.split(chunk), fp32.split(chunk), strict=True):
            difference = e - s
            away.append(torch.dot(difference, difference))  # on a CPU five times as fast as torch.norm
            norm.append(torch.dot(s, s))
    both = torch.stack([torch.stack(away), torch.stack(norm)]).double().sum(1)  # (2,)
    return both[0].item(), both[1].item()


def peak_bytes(device: torch.device) -> int:
    """Peak memory: allocated by torch on the GPU; without one, resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ideal_seconds(cfg: RunConfig, ctx: Context) -> float | None:
    """Seconds per step at the devices' bf16 peak FLOPs; None in fp32, and for an unknown peak."""
    if ctx.device.type != "cuda" or ctx.dtype != torch.bfloat16:
        return None
    peak = peak_tflops(torch.cuda.get_device_name(ctx.device))
    flops = step_flops(cfg)  # MFU does not count recomputation
    return (flops["student"] + flops["teacher"]) / (peak * 1e12 * ctx.world) if peak else None
