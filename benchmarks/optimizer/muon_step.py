"""The optimizer's step and the training step under Muon, divided by AdamW's, and torch's own optimizers as a peer.

    python -m benchmarks.optimizer.muon_step --size b --blocks 6 --batch 4 [--ranks 2] [--tensor 2] [--stage 1] [--ns bf16]
    python -m benchmarks.optimizer.muon_step --tiny

Both engines live in one process group and take turns, step by step, from the same weights on the same batches; before
anything is timed, their first losses and gradient norms, and the weights that they update, are compared. The optimizer's
step holds the gradient's norm, clipping, the update and the average. The peer (one process) is ``torch.optim.Muon`` with
``torch.optim.AdamW`` on equal weights without an engine, whose Newton-Schulz iterations are always in bf16. CPU seconds with
one process, else wall-clock seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from pathlib import Path

from benchmarks.common import random_batch, relaunch, report, run_config

WARM = 2  # steps of each that are not timed
PARTS = ("training step", "optimizer's step")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    extensions = {"avx512_bf16", "amx_bf16"} & set(next((x for x in lines if x.startswith("flags")), "").split())
    return f"{names[0] if names else platform.processor()}, {', '.join(sorted(extensions)) or 'no bf16 instructions'}"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="b", choices=("nano", "b", "l", "xl"))
    p.add_argument("--blocks", type=int, default=6)
    p.add_argument("--batch", type=int, default=4, help="images of a step, over all ranks")
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--tensor", type=int, default=1)
    p.add_argument("--stage", type=int, default=1)
    p.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    p.add_argument(
        "--ns", default="auto", choices=("auto", "bf16", "fp32"), help="type of the Newton-Schulz iterations"
    )
    p.add_argument("--method", default="ar", choices=("ar", "star"))
    p.add_argument("--steps", type=int, default=7)
    p.add_argument("--tiny", action="store_true", help="a small network and few steps: shows that the benchmark runs")
    a = p.parse_args()
    if a.tiny:
        a.size, a.blocks, a.batch, a.steps = "nano", 2, 2 * a.ranks, 2
    return a


def main() -> None:
    a = arguments()
    if a.ranks > 1:
        relaunch(a.ranks)
    import torch
    import torch.distributed as dist

    from megastar.engine.train_step import losses, set_schedules
    from megastar.engine.zero.engines import full_shapes
    from megastar.engine.zero.process_group import start
    from megastar.engine.zero.setup import build

    clock = time.process_time if a.ranks == 1 else time.perf_counter

    def config(name: str):
        ds = f"parallel.deepspeed={'tests/dist/ds/zero0.json' if a.stage == 0 else f'zero{a.stage}'}"
        return run_config(
            a.size, f"optim.name={name}", f"optim.muon.ns_dtype={a.ns}", f"model.n_layer={a.blocks}", ds,
            f"parallel.tensor_parallel={a.tensor}", f"train.global_batch={a.batch}", f"train.dtype={a.dtype}",
            f"self_guided.enabled={str(a.method == 'star').lower()}", "self_guided.contrastive_block=1",
            "optim.scale_lr=false", "train.compile=off", "train.micro_batch=0", "train.threads=1",
            *(f"model.{name}_dropout_p=0" for name in ("token", "resid", "ffn")),
        )  # fmt: skip

    sides = {}
    for name in ("adamw", "muon"):
        cfg = config(name)
        ctx = start(cfg)
        sides[name] = (cfg, build(cfg, ctx))
        sides[name][1].student.train()

    def one(name: str, step: int) -> tuple[float, float, float, float]:
        """Loss, gradient norm, seconds of the training step and of the optimizer's part in it."""
        cfg, engines = sides[name]
        batch = random_batch(cfg, ctx, step)
        if a.ranks > 1:
            dist.barrier()
        begin = clock()
        loss, _ = losses(cfg, engines, ctx, batch, step)
        engines.student.backward(loss)
        set_schedules(cfg, engines, step, 10**6)
        update = clock()
        done = engines.step()
        end = clock()
        engines.refresh_teacher()
        assert done
        return loss.item(), engines.grad_norm(), clock() - begin, end - update

    assert full_shapes(sides["adamw"][1], ctx) == full_shapes(sides["muon"][1], ctx)
    rows: dict[str, list[float]] = {}
    for step in range(WARM + a.steps):
        found = {name: one(name, step) for name in (("adamw", "muon") if step % 2 else ("muon", "adamw"))}
        if step == 0:
            assert found["adamw"][0] == found["muon"][0], "the first losses differ"
            assert abs(found["adamw"][1] / found["muon"][1] - 1) < 1e-6, "the first gradients differ"
        for name, (_, _, step_s, update_s) in found.items():
            if step >= WARM:
                rows.setdefault(f"{name}, training step", []).append(step_s)
                rows.setdefault(f"{name}, optimizer's step", []).append(update_s)
    if ctx.world == 1 and a.dtype == "fp32":
        rows |= peer(sides["muon"][0], a.steps, clock)
    if not ctx.main:
        return
    weights = sum(math.prod(s) for s in full_shapes(sides["muon"][1], ctx).values()) / 1e6
    print(
        f"{processor()}; {torch.get_num_threads()} thread(s) a rank, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}"
    )
    title = f"{a.size}, {a.blocks} blocks, {weights:.0f} M weights, {a.method}, {a.batch} images, {a.dtype}, "
    title += (
        f"Newton-Schulz {a.ns}, ZeRO {a.stage}, {ctx.mesh.data} data x {ctx.tensor} tensor ranks, {ctx.device.type}"
    )
    for part in PARTS:
        some = {name: times for name, times in rows.items() if part in name}
        report(f"{title}: {part}", some, f"adamw, {part}")
    ratios = {part: [statistics.median(rows[f"{name}, {part}"]) for name in ("muon", "adamw")] for part in PARTS}
    print("Muon / AdamW: " + ", ".join(f"{part} {muon / adamw:.3f}" for part, (muon, adamw) in ratios.items()))


def peer(cfg, steps: int, clock) -> dict[str, list[float]]:
    """torch's optimizers with clipping and an average, on the same weights with random gradients."""
    import torch

    from megastar.engine.student import Student
    from megastar.parallel.plan import block_matrix

    student, o = Student(cfg), cfg.optim
    average = [p.detach().clone() for p in student.parameters()]
    matrices = [p for n, p in student.named_parameters() if block_matrix(n)]
    taken = {id(p) for p in matrices}
    adamw = torch.optim.AdamW([p for p in student.parameters() if id(p) not in taken], lr=o.lr, fused=True)
    parts = [
        torch.nn.Parameter(q) for p in matrices for q in p.detach().chunk(3 if p.shape[0] == 3 * p.shape[1] else 1)
    ]
    muon = torch.optim.Muon(parts, lr=o.muon.lr)
    assert sum(p.numel() for p in parts) == sum(p.numel() for p in matrices)
    every = [p for p in student.parameters() if id(p) not in taken] + parts
    times = []
    for step in range(WARM + steps):
        for p in every:
            p.grad = torch.full_like(p, 1e-3).normal_()
        begin = clock()
        torch.nn.utils.clip_grad_norm_(every, o.grad_clip)
        adamw.step()
        muon.step()
        torch._foreach_lerp_(average, [p.detach() for p in student.parameters()], 1e-3)
        if step >= WARM:
            times.append(clock() - begin)
    return {"torch.optim.Muon + AdamW, optimizer's step": times}


if __name__ == "__main__":
    main()
