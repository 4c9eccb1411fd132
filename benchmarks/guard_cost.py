"""Cost of fault detection and metrics in a 200 ms step (nano model): step consensus, spike test, watchdog, metrics.

    python benchmarks/guard_cost.py [--ranks 2] [--checksum]
    python benchmarks/guard_cost.py --ranks 1 --row [--size nano --batch 16]

The reference is what any training needs: one reduction of the loss, read on the host in each step. The three variants take
turns in one process group. The watchdog's cost is the processor time of its threads while the rank sleeps, minus that of a
rank without a watchdog; recording the phases is timed separately. ``--checksum``: also one comparison of all replicas of
the nano model at ZeRO stage 1. ``--row``: only the cost of a row of metrics (spread, teacher distance, memory), in steps
that alternate with steps without a row; in training, one of ``train.log_every`` steps has a row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import random_batch, relaunch, report, run_config, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--checksum", action="store_true")
    p.add_argument("--watch", type=float, default=10.0, help="seconds for which the watchdog's threads are observed")
    p.add_argument("--row", action="store_true", help="measure only the cost of a row of metrics")
    p.add_argument("--size", default="nano", choices=("nano", "b", "l"), help="model size for --row")
    p.add_argument("--batch", type=int, default=16, help="images per step for --row")
    p.add_argument("--repeats", type=int, default=7, help="steps of each kind for --row")
    args = p.parse_args()
    relaunch(args.ranks)
    if args.row:
        return row_cost(args)

    import torch
    import torch.distributed as dist

    from megastar.engine.fault_tolerance import replica_checksum
    from megastar.engine.fault_tolerance.skip_policy import SkipPolicy, StepRecord
    from megastar.engine.fault_tolerance.step_consensus import StepConsensus
    from megastar.engine.fault_tolerance.watchdog import watch
    from megastar.engine.phase import PHASE
    from megastar.engine.zero.process_group import start
    from megastar.engine.zero.setup import build

    cfg = run_config("nano", f"train.global_batch={args.ranks}", "parallel.deepspeed=zero1", "data.shards=none")
    ctx = start(cfg)
    loss = torch.tensor(7.5, device=ctx.device)
    guard = SkipPolicy(cfg.faults)
    for i in range(cfg.faults.spike_window):
        guard.spikes.add(7.5 + 0.01 * (i % 7))

    def plain() -> None:
        x = loss.clone()
        if ctx.world > 1:
            dist.all_reduce(x)
        x.item()

    def agreement() -> None:
        StepConsensus(ctx, loss, 0).result()

    def whole() -> None:
        seen = StepRecord()
        seen.add(StepConsensus(ctx, loss, 0).result(), {"loss": loss, "loss_ar": loss}, loss)
        assert not guard.reason_to_skip(seen)
        guard.accept(seen)
        guard.state(1000)

    rows: dict[str, list[float]] = {"one reduction": [], "agreement": [], "agreement and spike test": []}
    for _ in range(args.steps):
        for name, work in zip(rows, (plain, agreement, whole), strict=True):
            rows[name] += seconds(work, 1)
    if ctx.main:
        report(f"consensus of one step, {ctx.world} ranks on {ctx.device.type}", rows, "one reduction")
        extra = (
            sorted(rows["agreement and spike test"])[args.steps // 2] - sorted(rows["one reduction"])[args.steps // 2]
        )
        print(f"in addition to one reduction: {extra * 1e6:.0f} us, {extra / 0.2:.3%} of a 200 ms step")
    with tempfile.TemporaryDirectory() as folder:
        cfg.run = folder
        without = busy(args.watch)
        with watch(cfg, ctx.rank, ctx.world):
            watched = busy(args.watch) - without
    if ctx.main:
        began = time.process_time()
        for step in range(10_000):
            PHASE.begin(step)
            for phase in ("waiting for data", "forward", "backward", "asking all ranks", "step", "teacher"):
                PHASE.at(phase)
        stamps = (time.process_time() - began) / 10_000
        a_step = 0.2 * watched + stamps
        print(
            f"watchdog of {ctx.world} ranks: {watched * 1e3:.2f} ms of processor time per second, recording phases "
            f"{stamps * 1e6:.1f} us per step: {a_step / 0.2:.3%} of a 200 ms step"
        )
    if args.checksum:
        engines = build(cfg, ctx)
        times = seconds(lambda: replica_checksum.compare(Path(cfg.run), engines, ctx, 1, cfg.optim.lr), 7)
        if ctx.main:
            elements = sum(x.numel() for *_, x in replica_checksum.replicas(engines, ctx))
            print(f"checksum of {elements / 1e6:.1f} M elements: {sorted(times)[3] * 1e3:.1f} ms")


def busy(seconds: float) -> float:
    """Processor time per second of this process while its main thread sleeps."""
    began = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - began) / seconds


def row_cost(a: argparse.Namespace) -> None:
    import torch

    from megastar.engine.metrics.step_metrics import step_metrics
    from megastar.engine.train_step import losses
    from megastar.engine.zero.process_group import start
    from megastar.engine.zero.setup import build

    cfg = run_config(a.size, f"train.global_batch={a.batch}", "parallel.deepspeed=zero1")
    ctx = start(cfg)
    engines = build(cfg, ctx)
    engines.student.train()
    clock = time.process_time if ctx.device.type == "cpu" else time.perf_counter
    batch = random_batch(cfg, ctx)

    def step(number: int, row: bool) -> float:
        begin = clock()
        loss, _ = losses(cfg, engines, ctx, batch, number, spreads=row)
        engines.student.backward(loss)
        engines.student.step()
        engines.refresh_teacher()
        if row:
            step_metrics(ctx, engines)
        if ctx.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - begin

    took: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * a.repeats + 2):
        seconds = step(number, bool(number % 2))
        if number > 1:
            took[bool(number % 2)].append(seconds)
    alone = []
    for _ in range(a.repeats):
        begin = clock()
        step_metrics(ctx, engines)
        alone.append(clock() - begin)
    plain, row = (statistics.median(took[kind]) for kind in (False, True))
    print(f"step {plain:.4f} s, with a row {row:.4f} s: {row / plain:.3f} times as long; distance and memory alone "
          f"{statistics.median(alone):.4f} s")  # fmt: skip
    print(
        f"mean with a row every {cfg.train.log_every} steps: {1 + (row / plain - 1) / cfg.train.log_every:.4f} times as long"
    )


if __name__ == "__main__":
    main()
