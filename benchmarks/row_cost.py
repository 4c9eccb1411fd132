"""What a row of metrics costs beside a step: spread, teacher distance and memory, measured in steps that alternate.

    python benchmarks/row_cost.py --size nano --batch 16

The peer is the same step without a row. Of ``train.log_every`` steps one has it: the last line is the cost a step.
"""

from __future__ import annotations

import argparse
import statistics
import time

from common import random_batch, run_config


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="nano", choices=("nano", "b", "l"))
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()

    import torch

    from megastar.engine.metrics.step_metrics import step_metrics
    from megastar.engine.train_step import losses
    from megastar.engine.zero.setup import build, start

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
    print(f"step {plain:.4f} s, with a row {row:.4f} s: {row / plain:.3f} of it; distance and memory alone "
          f"{statistics.median(alone):.4f} s")  # fmt: skip
    print(f"a row every {cfg.train.log_every} steps: {1 + (row / plain - 1) / cfg.train.log_every:.4f} of a step")


if __name__ == "__main__":
    main()
