"""``megastar train --dry-run``: build everything, train on a fake batch, and print what a real run would use."""

from __future__ import annotations

import time

import torch
from rich.table import Table

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.input_pipeline.data_checks import RunData
from megastar.engine.lr_schedule import rates_at, total_steps
from megastar.engine.metrics.step_metrics import peak_bytes
from megastar.engine.step_benchmark import one_step, random_batch
from megastar.engine.zero.engines import Engines, full_shapes
from megastar.engine.zero.state_memory import state_bytes
from megastar.teacher.schedule import decay_at
from megastar.utils.console import PlainConsole

IMAGENET = 1_281_167  # training images of ImageNet-1k, assumed where there are no shards


def describe(cfg: RunConfig, ctx: Context, engines: Engines, data: RunData | None) -> None:
    """Three steps on random codes with a learning rate of 0; prints parameters, memory per rank, batch and schedule."""
    batch = random_batch(cfg.model, cfg.views, engines.micro_batch, ctx.mesh.data_rank, cfg.repa)
    manifest = data.train.manifest if data else None
    samples = manifest.samples if manifest else IMAGENET
    steps = total_steps(cfg.train, samples)
    for group in engines.optimizer.param_groups:
        group["lr"] = 0.0
    engines.student.train()
    for _ in range(3):  # ZeRO-3 prefetches from the second step on, when it knows the order of the layers
        start = time.perf_counter()
        loss = one_step(cfg, ctx, engines, batch, 0)
        seconds = time.perf_counter() - start
    if not ctx.main:
        return

    sizes = {n: torch.Size(shape).numel() for n, shape in full_shapes(engines, ctx).items()}
    trunk = sum(size for n, size in sizes.items() if n.startswith("transformer."))
    extra = sum(sizes.values()) - trunk
    states = state_bytes(engines)
    o = cfg.optim
    rates = [rates_at(o, cfg.train.global_batch, s, steps) for s in (0, o.warmup_steps, steps - 1)]
    rows = {
        "transformer": f"{cfg.model.name}, {trunk / 1e6:.1f} M parameters"
        + (f", projector {extra / 1e6:.1f} M" if extra else ""),
        **({"sizes": "; ".join(data.told)} if data and data.told else {}),
        "ranks": f"{ctx.mesh.data} data x {ctx.tensor} tensor, {ctx.device.type}, {str(ctx.dtype).removeprefix('torch.')}, {cfg.parallel.deepspeed}",
        "states, rank 0": f"{sum(states.values()) / 2**20:.0f} MiB held: "
        + ", ".join(f"{cause} {size / 2**20:.0f}" for cause, size in states.items())
        + " (optimizer: masters, moments, average)",
        "peak memory, rank 0": f"{peak_bytes(ctx.device) / 2**20:.0f} MiB"
        + (" (whole process)" if ctx.device.type == "cpu" else ""),
        "batch": f"{cfg.train.global_batch} images x {cfg.views} views = {ctx.mesh.data} data ranks x {engines.micro_batch} x {engines.accumulation} accumulated",
        "data": f"{manifest.samples} images, {manifest.views} stored views of {manifest.tokens} tokens"
        if manifest
        else f"{cfg.data.shards} does not exist; assuming the {IMAGENET} images of ImageNet",
        "length": f"{steps} steps = {steps * cfg.train.global_batch / samples:.1f} epochs",
        **(
            {"token order": f"{cfg.token_order.text}, target position {cfg.model.target_position}"}
            if cfg.token_order.kind == "random"
            else {}
        ),
        **{
            f"learning rate{' (matrices)' * (k == 'lr_muon')}": f"{rates[0][k]:.2e} -> {max(r[k] for r in rates[:2]):.2e} -> "
            f"{rates[2][k]:.2e} ({o.schedule}, {o.warmup_steps} warm-up)"
            for k in rates[0]
        },
        "teacher": f"decay {decay_at(0, cfg.self_guided):.4f} -> {decay_at(steps - 1, cfg.self_guided):.4f}"
        if engines.teacher
        else f"none ({cfg.objective})",
        "fake step": f"loss {loss.item():.4f}, {seconds:.1f} s",
    }
    table = Table(title=f"dry run of {cfg.run}", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    PlainConsole().print(table)
