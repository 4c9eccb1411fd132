"""The planned memory of a run against that of its GPU, before anything is built."""

from __future__ import annotations

import logging

import torch

from megastar.config.deepspeed import read_deepspeed
from megastar.config.load import resolve_batch
from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.errors import UserError
from megastar.parallel.budget import GIB, Zero, memory_bytes, state_bytes
from megastar.parallel.evaluation_memory import evaluation_bytes, held_bytes
from megastar.tokenizer.io import read_tokenizer_metadata

logger = logging.getLogger(__name__)


def planned_bytes(cfg: RunConfig, world: int, dtype: str) -> tuple[int, int, int]:
    """Of one of ``world`` ranks' devices, as ``megastar plan`` computes them: the states, the peak of a step, and that of
    an evaluation (0 without ``eval.every``)."""
    p = cfg.parallel
    zero, tensor = Zero.read(read_deepspeed(p.deepspeed), p.deepspeed), p.tensor_parallel
    micro, accumulation = resolve_batch(cfg.train, tensor, world)
    data, compiled = world // tensor, cfg.train.compile != "off" and tensor == 1
    states, _ = state_bytes(
        cfg.model, cfg.self_guided, zero.stage, tensor, data, dtype, zero.offload, cfg.optim.name == "muon",
        cfg.repa,
    )  # fmt: skip
    memory, _ = memory_bytes(
        cfg.model, cfg.self_guided, zero, tensor, data, micro, p.activation_checkpointing, dtype,
        compiled, accumulation, p.teacher_features == "keep", cfg.optim.of_matrices, cfg.repa,
    )  # fmt: skip
    evaluating = 0
    if cfg.eval.every:
        tokenizer, _ = read_tokenizer_metadata(cfg.data.tokenizer)
        found = evaluation_bytes(cfg, tokenizer, dtype)
        evaluating = held_bytes(memory, zero.stage, data) + sum(found.values())
    return sum(states.values()), sum(memory.values()), evaluating


def check_run(cfg: RunConfig, ctx: Context) -> Context:
    """``ctx``. Raises ``UserError`` if the world size does not divide the batch, or if the states alone exceed the GPU's memory.

    Warns if the planned peak of a step or of an evaluation does.
    """
    micro, _ = resolve_batch(cfg.train, ctx.tensor, ctx.world)
    if ctx.device.type != "cuda":
        return ctx
    states, peak, evaluating = planned_bytes(cfg, ctx.world, "bf16" if ctx.dtype == torch.bfloat16 else "fp32")
    gpu = torch.cuda.get_device_properties(ctx.device)
    plan = f"{cfg.parallel.deepspeed}, {ctx.mesh.data} data x {ctx.tensor} tensor ranks, {micro} images per pass"
    remedy = "megastar plan compares other splits"
    if states > gpu.total_memory:
        raise UserError(
            f"weights, gradients, optimizer and teacher need {states / GIB:.1f} GiB on each GPU ({plan}), {gpu.name} has "
            f"{gpu.total_memory / GIB:.1f} GiB: use more GPUs or another ZeRO stage; {remedy}"
        )
    if peak > gpu.total_memory and ctx.main:
        message = "a step is planned to need %.1f GiB on each GPU (%s), %s has %.1f GiB: lower train.micro_batch; %s"
        logger.warning(message, peak / GIB, plan, gpu.name, gpu.total_memory / GIB, remedy)
    if evaluating > gpu.total_memory and ctx.main:
        images = min(cfg.eval.batch, cfg.eval.samples)
        message = "an evaluation of %d images at once is planned to need %.1f GiB on each GPU, %s has %.1f GiB: lower eval.batch"
        logger.warning(message, images, evaluating / GIB, gpu.name, gpu.total_memory / GIB)
    return ctx
