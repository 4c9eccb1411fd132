"""Time of a training step on several ranks, compared with plain DistributedDataParallel on the same ranks, interleaved.

    python benchmarks/parallel_step.py --ranks 2 --size b --blocks 6 --batch 8 --ar
    python benchmarks/parallel_step.py --ranks 4 --size b

The reference is torch's DDP around the same network, with torch's fused AdamW, clipping and a replicated teacher averaged with
``torch._foreach_lerp_``, without DeepSpeed. All start from the weights of one seed and take the same batches without dropout;
unequal losses of the first step are an error. On a CPU over gloo the ratios only show the cost on this machine: a GPU
overlaps communication with computation. ``cpu`` is the processor time of rank 0, with gloo's threads, which other load
affects less than the time that passes. ``--tiny`` checks the script; its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import random_batch, relaunch, report, run_config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.student import Student
from megastar.engine.train_step import losses, set_schedules
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.process_group import start
from megastar.engine.zero.setup import build

Step = Callable[[], Tensor]
SPLITS = [("zero1", 1), ("zero2", 1), ("zero3", 1), ("zero1", 2), ("zero3", 2)]


def ddp_step(cfg: RunConfig, ctx: Context, batch: dict) -> Step:
    torch.manual_seed(cfg.train.seed)
    student = Student(cfg).to(ctx.device)
    teacher = copy.deepcopy(student.transformer).requires_grad_(False).eval()
    wrapped = DistributedDataParallel(student)
    o = cfg.optim
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)
    plain = Engines(wrapped, teacher, optimizer, 0, 1)  # only what train_step.losses uses

    def step() -> Tensor:
        loss, _ = losses(cfg, plain, ctx, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), o.grad_clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.transformer.parameters()), 1e-4)
        return loss.detach()

    return step


def engine_step(cfg: RunConfig, ctx: Context, batch: dict) -> Step:
    engines = build(cfg, ctx)
    engines.student.train()

    def step() -> Tensor:
        loss, _ = losses(cfg, engines, ctx, batch, 0)
        engines.student.backward(loss)
        set_schedules(cfg, engines, 0, 10)
        engines.student.step()
        engines.refresh_teacher()
        return loss.detach()

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--size", default="b", choices=("nano", "b", "l", "xl", "xxl", "3b"))
    p.add_argument("--batch", type=int, default=0, help="global batch (default: one image per rank)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--blocks", type=int, default=0, help="number of blocks (default: all blocks of the size)")
    p.add_argument("--ar", action="store_true", help="train AR instead of ST-AR")
    p.add_argument("--tiny", action="store_true", help="two narrow blocks, one repeat: a check of this script")
    a = p.parse_args()
    relaunch(a.ranks)

    more = [f"model.n_layer={a.blocks}", f"self_guided.contrastive_block={max(1, a.blocks // 2)}"] if a.blocks else []
    if a.tiny:
        a.size, a.repeats = "nano", 1
        more = ["model.n_layer=2", "self_guided.contrastive_block=1", "model.dim=32", "model.n_head=2"]
    more += [f"model.{kind}_dropout_p=0" for kind in ("token", "resid", "ffn")]
    more += [f"train.global_batch={a.batch or a.ranks}", "train.dtype=fp32"] + ["self_guided.enabled=false"] * a.ar
    cfg = run_config(a.size, *more)
    ctx = start(cfg)
    reference = "DDP, replicated teacher (torch)"
    steps = {reference: ddp_step(cfg, ctx, random_batch(cfg, ctx))}
    for stage, tensor in SPLITS:
        if a.ranks % tensor == 0:
            here = run_config(a.size, *more, f"parallel.deepspeed={stage}", f"parallel.tensor_parallel={tensor}")
            where = start(here)
            batch = random_batch(here, where)
            steps[f"{stage}, tensor {tensor} x data {a.ranks // tensor}"] = engine_step(here, where, batch)
    firsts = {}
    for name, step in steps.items():
        loss = step()
        dist.all_reduce(loss)
        firsts[name] = loss.item() / a.ranks
    # Tensor ranks draw the batches of fewer data ranks: only equal splits of the batch have equal losses.
    wrong = {n: v for n, v in firsts.items() if "tensor 1" in n and abs(v / firsts[reference] - 1) > 1e-4}
    if wrong:
        sys.exit(f"not timed: the first loss of {reference} is {firsts[reference]:.6f}, others have {wrong}")
    if ctx.main:
        print("first losses: " + ", ".join(f"{n} {v:.6f}" for n, v in firsts.items()))
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(a.repeats):
        for name, step in steps.items():
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            step()
            dist.barrier()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - used)
    if ctx.main:
        title = f"one {'AR' if a.ar else 'ST-AR'} step of {a.size}{f' ({a.blocks} blocks)' if a.blocks else ''}"
        title += f", {a.batch or a.ranks} images, {a.ranks} ranks, {ctx.device.type}, fp32"
        report(title, wall, reference)
        report(f"{title}, cpu", cpu, reference)


if __name__ == "__main__":
    main()
