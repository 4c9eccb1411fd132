"""Run by torchrun on two ranks from test_guards.py: what must be noticed, or mended, before it does harm."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megastar.engine import checkpoint, folders
from megastar.engine.build import build, set_timeouts, start
from megastar.engine.errors import NonFiniteLoss
from megastar.engine.state_files import StateReader
from megastar.engine.step import check_batch, losses, set_schedules
from megastar.errors import UserError
from tests.dist.engine_worker import forget_mesh
from tests.dist.reference import BATCH, STEPS, batch_of, config

NORM = "transformer.norm.weight"


def engines_of(out: Path, tensor: int, stage: str):
    forget_mesh()
    cfg = config(parallel={"deepspeed": stage, "tensor_parallel": tensor})
    cfg.run = str(out / f"{tensor}-{Path(stage).stem}")
    ctx = start(cfg)
    cfg.train.micro_batch = BATCH // ctx.mesh.data
    engines = build(cfg, ctx)
    engines.student.train()
    return cfg, ctx, engines


def one_step(cfg, ctx, engines, scale: float = 1.0) -> None:
    micro = cfg.train.micro_batch
    rows = slice(ctx.mesh.data_rank * micro, (ctx.mesh.data_rank + 1) * micro)
    loss, _ = losses(cfg, engines, ctx, batch_of(cfg, 0, rows), 0)
    engines.student.backward(loss * scale)
    set_schedules(cfg, engines, 0, STEPS)
    engines.student.step()
    engines.refresh_teacher()


def replicas_that_drifted_are_aligned(out: Path, stage: str) -> None:
    cfg, ctx, engines = engines_of(out, 2, stage)
    one_step(cfg, ctx, engines)
    (norm,) = (s for s in engines.shards() if s.name == NORM)
    kept = norm.view("fp32").clone()
    if ctx.rank == 1:
        norm.view("fp32").add_(1e-3)
        norm.view("ema").add_(1e-3)
    saver = checkpoint.Saver(cfg, ctx, engines)
    saver.save(1, {})
    found = saver.finish()
    assert torch.equal(norm.view("fp32"), kept)  # on both ranks tensor rank 0's
    reader = StateReader(found, folders.read_manifest(found))
    assert torch.equal(reader.whole(NORM, "fp32"), kept)
    compute = dict(engines.student.module.named_parameters())[NORM]
    assert torch.equal(compute.data.view(-1), kept)  # so small that it stays gathered


def different_batches_are_told(out: Path) -> None:
    cfg, ctx, _ = engines_of(out, 2, "zero1")
    batch = batch_of(cfg, 0, slice(None))
    check_batch(ctx, batch, 0)
    none = {name: torch.zeros_like(value) for name, value in batch.items()}
    check_batch(ctx, none if ctx.rank == 1 else batch, 0)  # a rank without a batch is told of elsewhere
    if ctx.rank == 1:
        batch["codes"] = batch["codes"].flip(0)  # the same codes in another order
    with pytest.raises(UserError, match="step 7: the ranks of a tensor group .* got different batches"):
        check_batch(ctx, batch, 7)


def every_group_has_the_time_out(out: Path) -> None:
    """Those that DeepSpeed and the mesh made for themselves too."""
    engines_of(out, 2, "zero1")
    set_timeouts(timedelta(seconds=77))
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    assert len(groups) > 2
    for group in groups:
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77), group


def a_gradient_that_is_not_finite_stops_stage_0(out: Path) -> None:
    for tensor in (1, 2):
        cfg, ctx, engines = engines_of(out, tensor, "tests/dist/ds/zero0.json")
        before = [p.detach().clone() for p in engines.student.module.parameters()]
        with pytest.raises(NonFiniteLoss, match="step 0: the gradient is not finite"):
            one_step(cfg, ctx, engines, scale=float("nan") if ctx.rank == 0 else 1.0)
        assert all(torch.equal(a, b) for a, b in zip(before, engines.student.module.parameters(), strict=True))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for json in ("zero1", "zero3"):
        replicas_that_drifted_are_aligned(folder, json)
    different_batches_are_told(folder)
    every_group_has_the_time_out(folder)
    a_gradient_that_is_not_finite_stops_stage_0(folder)
    (folder / f"passed-{torch.distributed.get_rank()}").touch()
