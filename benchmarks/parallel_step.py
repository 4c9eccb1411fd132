"""Step time of each parallel configuration, compared with plain DistributedDataParallel on the same ranks in the same run.

    python benchmarks/parallel_step.py --ranks 4 --size b

The reference is torch's DDP around the same network, with torch's AdamW and a replicated teacher averaged with
``torch._foreach_lerp_``, without DeepSpeed. On a CPU over gloo the ratios only show the cost on this machine: a GPU overlaps
communication with computation.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from common import random_batch, relaunch, report, run_config, seconds
from torch.nn.parallel import DistributedDataParallel

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.student import Student
from megastar.engine.train_step import losses, set_schedules
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.process_group import start
from megastar.engine.zero.setup import build


def ddp_times(cfg: RunConfig, ctx: Context, repeats: int) -> list[float]:
    torch.manual_seed(0)
    student = Student(cfg).to(ctx.device)
    teacher = copy.deepcopy(student.transformer).requires_grad_(False).eval()
    wrapped = DistributedDataParallel(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95))
    plain = Engines(wrapped, teacher, optimizer, 0, 1)  # only what train_step.losses uses

    def step() -> None:
        loss, _ = losses(cfg, plain, ctx, random_batch(cfg, ctx), 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.transformer.parameters()), 1e-4)

    step()
    return seconds(step, repeats, dist.barrier)


SPLITS = [("zero1", 1), ("zero3", 1), ("zero1", 2), ("zero3", 2)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--size", default="b", choices=("nano", "b", "l", "xl", "xxl", "3b"))
    p.add_argument("--batch", type=int, default=0, help="global batch (default: one image per rank)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--blocks", type=int, default=0, help="number of blocks (default: all blocks of the size)")
    a = p.parse_args()
    relaunch(a.ranks)

    batch = a.batch or a.ranks
    fewer = [f"model.n_layer={a.blocks}", f"self_guided.contrastive_block={max(1, a.blocks // 2)}"] if a.blocks else []
    cfg = run_config(a.size, f"train.global_batch={batch}", *fewer)
    ctx = start(cfg)
    rows = {"DDP, replicated teacher (torch)": ddp_times(cfg, ctx, a.repeats)}
    for stage, tensor in SPLITS:
        if a.ranks % tensor:
            continue
        split = [f"train.global_batch={batch}", f"parallel.deepspeed={stage}", f"parallel.tensor_parallel={tensor}"]
        here = run_config(a.size, *split, *fewer)
        where = start(here)
        engines = build(here, where)
        engines.student.train()

        def step(here=here, where=where, engines=engines) -> None:
            loss, _ = losses(here, engines, where, random_batch(here, where), 0)
            engines.student.backward(loss)
            set_schedules(here, engines, 0, 10)
            engines.student.step()
            engines.refresh_teacher()

        step()
        name = f"{stage}, tensor {tensor} x data {a.ranks // tensor}"
        rows[name] = seconds(step, a.repeats, dist.barrier)
        del engines, step
    if ctx.main:
        title = f"one step of {a.size}{f' ({a.blocks} blocks)' if a.blocks else ''}, {batch} images, {a.ranks} ranks"
        report(f"{title}, {ctx.device.type}, fp32", rows, next(iter(rows)))


if __name__ == "__main__":
    main()
