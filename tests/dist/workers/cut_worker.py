"""Run by test_cut.py on some ranks: one step of each case, and its losses and gradients.

A case: name, stage (a file in tests/dist/ds or configs/ds), tensor, micro (images per rank and pass), and maybe changes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megastar.checkpoint.shard_format import StateReader
from megastar.engine.checkpointer.async_saver import Saver
from megastar.engine.checkpointer.initial_weights import check_initial, load_initial, open_initial
from megastar.engine.fault_tolerance.skip_policy import StepRecord
from megastar.engine.teacher_pass import teacher_first
from megastar.engine.train_step import average_over_ranks, losses, set_schedules
from megastar.engine.zero.process_group import start
from megastar.engine.zero.setup import build
from megastar.run_dir import checkpoint_dir
from tests.checkpoints import save_model
from tests.dist.reference import BATCH, STEPS, batch_of, config, initial_weights
from tests.dist.workers.engine_worker import forget_mesh


def run_case(out: Path, name: str, stage: str, tensor: int, micro: int, changes: dict | None = None) -> None:
    forget_mesh()
    cfg = config(**(changes or {}))
    file = f"configs/ds/zero{stage}.json" if Path(f"configs/ds/zero{stage}.json").is_file() else ""
    cfg.parallel.deepspeed = file or f"tests/dist/ds/zero{stage}.json"
    cfg.run, cfg.parallel.tensor_parallel, cfg.train.micro_batch = str(out / name), tensor, micro
    cfg.optim.grad_clip = 0.0
    ctx = start(cfg)
    engines = build(cfg, ctx)
    count = BATCH // ctx.mesh.data // micro
    assert (engines.micro_batch, engines.accumulation) == (micro, count)
    cfg.train.init = str(out / "initial.safetensors")
    if ctx.main:
        save_model(cfg.train.init, initial_weights(), cfg.model, {"step": 5})
    dist.barrier()
    initial = open_initial(cfg)
    check_initial(initial, cfg, None)
    load_initial(initial, cfg.train.init, ctx, engines)
    engines.student.train()
    record = StepRecord()
    starts = [(a * ctx.mesh.data + ctx.mesh.data_rank) * micro for a in range(count)]
    batches = [batch_of(cfg, 0, slice(first, first + micro)) for first in starts]
    for batch in teacher_first(cfg, engines, ctx, batches, 0):
        loss, parts = losses(cfg, engines, ctx, batch, 0, spreads=True)
        engines.student.backward(loss)
        set_schedules(cfg, engines, 0, STEPS)
        engines.student.step()
        record.metrics.append(parts)
    row = average_over_ranks(ctx, record.means())
    saver = Saver(cfg, ctx, engines)
    saver.save(1, {})
    path = saver.finish()
    assert path is not None
    if ctx.main:
        reader = StateReader(path, checkpoint_dir.read_manifest(path))
        # After one step Adam's first moment is (1 - beta1) times the gradient.
        gradients = {n: reader.whole(n, "exp_avg") / (1 - cfg.optim.beta1) for n in reader.shapes}
        torch.save({"losses": row, "gradients": gradients}, out / f"{name}.pt")


if __name__ == "__main__":
    for case in json.loads(sys.argv[2]):
        run_case(Path(sys.argv[1]), **case)
