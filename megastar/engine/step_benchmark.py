"""Training speed of one process on random codes: images/s, MFU and its parts, peak memory."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from typing import Any

import torch

from megastar.config.schema import ModelConfig, RunConfig
from megastar.config.sections.repa import RepaConfig
from megastar.engine.context import Context
from megastar.engine.teacher_pass import teacher_first
from megastar.engine.train_step import losses
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.setup import build, chosen_kernels
from megastar.parallel.alignment import encoder_width
from megastar.parallel.cost import step_flops


def step_speed(
    cfg: RunConfig, ctx: Context, images: int, steps: int = 8, peak_tflops: float | None = None
) -> dict[str, Any]:
    """Build ``cfg`` for one process and train: median of ``steps`` steps of ``images`` images after three warm-up steps.

    ``mfu`` (share of ``peak_tflops``, None without it) is split into student, teacher and heads (output head and
    projectors), by FLOPs counted from shapes; the loss is that of the last step. Memory in GiB, GPU only.
    """
    cfg = dataclasses.replace(
        cfg,
        train=dataclasses.replace(cfg.train, global_batch=images, micro_batch=0),
        parallel=dataclasses.replace(cfg.parallel, tensor_parallel=1),
    )
    cuda = ctx.device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(ctx.device)
        return time.perf_counter()

    if cuda:
        torch.cuda.reset_peak_memory_stats(ctx.device)
    engines = build(cfg, ctx)
    try:
        engines.student.train()
        batch = random_batch(cfg.model, cfg.views, images, repa=cfg.repa)
        times = []
        loss = torch.zeros(())
        for step in range(steps + 3):
            batch["epochs"].fill_(step)  # new hidden keys
            start = now()
            loss = one_step(cfg, ctx, engines, batch, step)
            times.append(now() - start)
        seconds = statistics.median(times[3:])
        flops = step_flops(cfg)
        heads = flops["student"] - 3 * flops["recompute"]
        parts = {"student": flops["student"] - heads, "teacher": flops["teacher"], "heads": heads}
        peak = peak_tflops * 1e12 * seconds if peak_tflops else None
        return {
            "compiled": chosen_kernels(engines.student.module.transformer)["compiled"],
            "images": images, "step_s": seconds, "images_per_s": images / seconds, "loss": float(loss),
            "tflops": sum(parts.values()) / seconds / 1e12,
            "mfu": sum(parts.values()) / peak if peak else None,
            "mfu_parts": {name: value / peak for name, value in parts.items()} if peak else None,
            "peak_gib": torch.cuda.max_memory_allocated(ctx.device) / 2**30 if cuda else None,
        }  # fmt: skip
    finally:
        engines.student.destroy()
        del engines
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def one_step(cfg: RunConfig, ctx: Context, engines: Engines, batch: dict[str, Any], step: int) -> torch.Tensor:
    """An optimizer step in which each micro-batch is ``batch``; returns the last loss."""
    for micro in teacher_first(cfg, engines, ctx, [batch] * engines.accumulation, step):
        loss, _ = losses(cfg, engines, ctx, micro, step)
        engines.student.backward(loss)
        engines.step()
    engines.refresh_teacher()
    return loss.detach()


def random_batch(
    model: ModelConfig, views: int, images: int, seed: int = 0, repa: RepaConfig | None = None
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, model.num_classes, (images,), generator=g)
    batch = {
        "codes": torch.randint(0, model.vocab_size, (images, views, model.image_tokens), generator=g),
        "labels": labels, "true_labels": labels, "ids": torch.arange(images), "epochs": torch.zeros(images, dtype=torch.int64),
    }  # fmt: skip
    if repa is not None and repa.active:
        shape = (images, views, model.image_tokens, encoder_width(repa))
        batch["features"] = torch.randn(shape, generator=g).half()
    return batch
