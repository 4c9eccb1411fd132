"""Run by torchrun from test_engine.py: trains the tiny run on every case in one process group."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megastar.engine import checkpoint
from megastar.engine.build import build, start
from megastar.engine.export import full_weights
from megastar.engine.step import average_over_ranks, losses, set_schedules
from tests.dist.reference import BATCH, STEPS, batch_of, config


def run_case(out: Path, name: str, changes: dict, accumulation: int) -> None:
    cfg = config(**changes)
    cfg.run = str(out / name)
    ctx = start(cfg)
    cfg.train.micro_batch = BATCH // ctx.world // accumulation
    engines = build(cfg, ctx)
    assert engines.accumulation == accumulation
    engines.student.train()
    per, micro = BATCH // accumulation, cfg.train.micro_batch
    history = []
    for step in range(STEPS):
        sums: dict = {}
        for a in range(accumulation):
            first = a * per + ctx.rank * micro
            loss, parts = losses(cfg, engines, ctx, batch_of(cfg, step, slice(first, first + micro)), step)
            engines.student.backward(loss)
            set_schedules(cfg, engines, step, STEPS)
            engines.student.step()
            for k, v in parts.items():
                sums[k] = sums.get(k, 0.0) + v.float() / accumulation
        engines.refresh_teacher()
        row = average_over_ranks(ctx, sums)
        row["grad_norm"] = float(engines.student.get_global_grad_norm())
        history.append(row)
    path = checkpoint.save(cfg, ctx, engines, STEPS, {})
    shards = sum(p.ds_tensor.numel() for p in engines.student.module.parameters())
    teacher = sum(q.ds_tensor.numel() for _, q in engines.pairs)
    resident = sum(q.data.numel() for _, q in engines.pairs)
    # The teacher's compute shard must be this rank's average, rounded to the compute type.
    if engines.teacher is not None:
        from deepspeed.utils import safe_get_local_optimizer_state

        for p, q in engines.pairs:
            mean = safe_get_local_optimizer_state(p, "ema")
            assert torch.equal(q.ds_tensor.data, mean.to(q.ds_tensor.dtype))
            assert q.grad is None and not q.requires_grad
    if ctx.main:
        result = {"history": history, "shards": shards, "teacher": teacher, "resident": resident}
        (out / f"{name}.json").write_text(json.dumps(result))
        torch.save({w: full_weights(path, w) for w in ("student", "ema")}, out / f"{name}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in json.loads(sys.argv[2]):
        run_case(folder, **case)
