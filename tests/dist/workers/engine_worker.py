"""Run by torchrun from test_engine.py: trains the tiny run on every case in one process group.

A case: name, changes (of the configuration), tensor, accumulation, and maybe save_at (step), resume (a run's name),
dropout (seed the generators), init (start from a weights file), validate
(between the steps), bucket (elements of Muon's), memory (a checkpoint in the memory of the nodes, at the end).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from megastar.checkpoint.rng_state import seed_dropout
from megastar.config.schema import RunConfig
from megastar.engine.checkpointer import load
from megastar.engine.checkpointer.async_saver import Saver
from megastar.engine.checkpointer.initial_weights import check_initial, load_initial, open_initial
from megastar.engine.context import Context
from megastar.engine.elastic.memory_checkpoint import MemoryCheckpoints
from megastar.engine.elastic.node_memory import VARIABLE
from megastar.engine.fault_tolerance.skip_policy import StepRecord
from megastar.engine.metrics.step_metrics import step_metrics
from megastar.engine.teacher_pass import teacher_first
from megastar.engine.train_step import average_over_ranks, losses, set_schedules, validation_loss
from megastar.engine.zero import matrix_exchange
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.process_group import start
from megastar.engine.zero.setup import build
from megastar.engine.zero.state_memory import state_bytes
from megastar.run_dir import checkpoint_dir
from tests.checkpoints import full_weights, save_model
from tests.dist.reference import BATCH, STEPS, batch_of, config, initial_weights


def forget_mesh() -> None:
    """DeepSpeed makes its groups once a process; here each case has its own."""
    groups._TENSOR_MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = None
    groups.mpu = None


def restore_from_memory(folder: Path, cfg: RunConfig, ctx: Context, engines: Engines) -> None:
    """Each rank is a node: what it wrote, and its peer's copy, restore every state bit for bit."""
    cfg.faults.memory_every = 1
    os.environ |= {VARIABLE: str(folder / f"{ctx.rank}"), "GROUP_RANK": str(ctx.rank)}
    (folder / f"{ctx.rank}").mkdir(parents=True)
    memory = MemoryCheckpoints(cfg, ctx, engines)
    del os.environ[VARIABLE], os.environ["GROUP_RANK"]
    before = {(s.name, k): s.view(k).clone() for s in engines.shards() for k in s.kinds}
    assert memory.save(STEPS, {}) is not None
    memory.close()
    for shard in engines.shards():
        for kind in shard.kinds:
            shard.view(kind).fill_(7)
    found = memory.newest(None, 0)
    assert found is not None and load.load_checkpoint(ctx, engines, found, cfg.train.seed)["step"] == STEPS
    after = {(s.name, k): s.view(k) for s in engines.shards() for k in s.kinds}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def run_case(
    out: Path,
    name: str,
    changes: dict,
    tensor: int = 1,
    accumulation: int = 1,
    save_at: int = 0,
    resume: str = "",
    dropout: bool = False,
    init: bool = False,
    validate: bool = False,
    bucket: int = 0,
    memory: bool = False,
) -> None:
    forget_mesh()
    matrix_exchange.BUCKET = bucket or 1 << 25
    cfg = config(**changes)
    cfg.run, cfg.parallel.tensor_parallel = str(out / name), tensor
    cfg.parallel.check_batches = tensor > 1
    ctx = start(cfg)
    cfg.train.micro_batch = BATCH // ctx.mesh.data // accumulation
    engines = build(cfg, ctx)
    assert engines.accumulation == accumulation
    if init:
        cfg.train.init = str(out / "initial.safetensors")
        if ctx.main:
            save_model(cfg.train.init, initial_weights(), cfg.model, {"step": 5})
        dist.barrier()
        initial = open_initial(cfg)
        check_initial(initial, cfg, None)
        assert (load_initial(initial, cfg.train.init, ctx, engines) or {})["step"] == 5
    if dropout:
        seed_dropout(cfg.train.seed, ctx.mesh.data_rank, 0)
    engines.student.train()
    done, saver = 0, Saver(cfg, ctx, engines)
    if resume:
        source = checkpoint_dir.latest(out / resume / "checkpoints")
        done = load.load_checkpoint(ctx, engines, source, cfg.train.seed)["step"]
    per, micro = BATCH // accumulation, cfg.train.micro_batch
    history, used = [], []
    for step in range(done, STEPS):
        record = StepRecord()
        starts = [a * per + ctx.mesh.data_rank * micro for a in range(accumulation)]
        batches = [batch_of(cfg, step, slice(first, first + micro)) for first in starts]
        for batch in teacher_first(cfg, engines, ctx, batches, step):
            loss, parts = losses(cfg, engines, ctx, batch, step, spreads=True)
            engines.student.backward(loss)
            set_schedules(cfg, engines, step, STEPS)
            engines.student.step()
            record.metrics.append(parts)
        engines.refresh_teacher()
        row = average_over_ranks(ctx, record.means())
        row["grad_norm"] = engines.grad_norm()
        row |= step_metrics(ctx, engines)
        used.append(row.pop("memory_gib"))  # no two runs have the same
        history.append(row)
        if validate:
            first = ctx.mesh.data_rank * micro
            validation_loss(engines, ctx, [batch_of(cfg, 100, slice(first, first + micro))])
        if step + 1 == save_at:
            saver.save(step + 1, {})  # goes on while the next steps run
    path = saver.finish()
    if not save_at:
        saver.save(STEPS, {})
        path = saver.finish()
    assert path is not None
    if engines.teacher is not None:  # its compute copy is this rank's average, rounded to the compute type
        for shard, target in engines.teacher.pairs:
            mean = shard.view("ema")
            assert torch.equal(target.data.view(-1)[: len(mean)], mean.to(target.dtype)), shard.name
    if memory:
        restore_from_memory(out / name / "memory", cfg, ctx, engines)
    if ctx.main:
        result = {"history": history, "memory_gib": used, "done": done, "bytes": state_bytes(engines)}
        (out / f"{name}.json").write_text(json.dumps(result))
        torch.save({w: full_weights(path, w) for w in ("student", "ema")}, out / f"{name}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in json.loads(sys.argv[2]):
        run_case(folder, **case)
