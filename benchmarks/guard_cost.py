"""What the guard costs a step of 200 ms, as the nano model takes: the agreement of all ranks, the spike test, the watchdog.

    python benchmarks/guard_cost.py [--ranks 2] [--checksum]

The peer is the least that any training does: one reduction of the loss, read on the host each step. The three are timed
in turn in one process group. The watchdog's cost is the processor time of all its threads, while the rank itself sleeps,
less that of a rank without one; its stamps are timed alone. ``--checksum``: one comparison of all replicas of the nano model at ZeRO stage 1 too.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from common import relaunch, report, run_config, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--checksum", action="store_true")
    p.add_argument("--watch", type=float, default=10.0, help="seconds for which the watchdog's threads are observed")
    args = p.parse_args()
    relaunch(args.ranks)

    import torch
    import torch.distributed as dist

    from megastar.engine.fault_tolerance import replica_checksum
    from megastar.engine.fault_tolerance.skip_policy import SkipPolicy, StepRecord
    from megastar.engine.fault_tolerance.step_consensus import StepConsensus
    from megastar.engine.fault_tolerance.watchdog import watch
    from megastar.engine.phase import PHASE
    from megastar.engine.zero.setup import build, start

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
        report(f"a step's guard, {ctx.world} ranks on {ctx.device.type}", rows, "one reduction")
        extra = (
            sorted(rows["agreement and spike test"])[args.steps // 2] - sorted(rows["one reduction"])[args.steps // 2]
        )
        print(f"more than the peer: {extra * 1e6:.0f} us, {extra / 0.2:.3%} of a 200 ms step")
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
            f"watchdog of {ctx.world} ranks: {watched * 1e3:.2f} ms of a processor each second, stamps {stamps * 1e6:.1f} us "
            f"a step: {a_step / 0.2:.3%} of a 200 ms step"
        )
    if args.checksum:
        engines = build(cfg, ctx)
        times = seconds(lambda: replica_checksum.compare(cfg, engines, ctx, 1, 1), 7)
        if ctx.main:
            elements = sum(x.numel() for *_, x in replica_checksum.replicas(engines, ctx))
            print(f"checksum of {elements / 1e6:.1f} M elements: {sorted(times)[3] * 1e3:.1f} ms")


def busy(seconds: float) -> float:
    """Processor time that this process takes a second while its main thread sleeps."""
    began = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - began) / seconds


if __name__ == "__main__":
    main()
