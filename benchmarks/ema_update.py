"""The teacher's update: the EMA of shards, compared with gathering every parameter and averaging full copies.

    python benchmarks/ema_update.py --ranks 4 --size b

The reference is a plain teacher under ZeRO-3: it all-gathers each student parameter, keeps a full fp32 average on every
rank, and copies the teacher's shard from it. megastar's update interpolates the shards (in the optimizer's step) and
copies them into the teacher's shards. Both run on the same engines.
"""

from __future__ import annotations

import argparse

from common import relaunch, report, run_config, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--size", default="b", choices=("nano", "b", "l", "xl", "xxl", "3b"))
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()
    relaunch(a.ranks)

    import torch
    import torch.distributed as dist

    from megastar.engine.zero.process_group import start
    from megastar.engine.zero.setup import build
    from megastar.teacher.ema import lerp_

    cfg = run_config(a.size, f"train.global_batch={a.ranks}", "parallel.deepspeed=zero3")
    ctx = start(cfg)
    engines = build(cfg, ctx)
    pairs, optimizer = engines.teacher.pairs, engines.optimizer

    def ours() -> None:
        lerp_([s.view("ema") for s, _ in pairs], [s.view("fp32") for s, _ in pairs], 0.999)
        engines.refresh_teacher()

    whole = {s.name: torch.zeros(s.shape).view(-1) for s, _ in pairs}

    @torch.no_grad()
    def naive() -> None:
        for shard, target in pairs:
            mine = shard.view("fp32")
            size = target.numel()
            padded = torch.zeros(size)
            padded[: len(mine)] = mine
            gathered = torch.empty(size * ctx.world)
            dist.all_gather_into_tensor(gathered, padded)
            average = whole[shard.name]
            average.lerp_(gathered[: len(average)], 0.001)
            target.data.view(-1)[: len(mine)].copy_(average[shard.start : shard.stop])

    for work in (ours, naive):
        work()
    del optimizer
    dist.barrier()
    rows = {"gather and average full copies": seconds(naive, a.repeats, dist.barrier)}
    rows["EMA on the shards, teacher refreshed"] = seconds(ours, a.repeats, dist.barrier)
    if ctx.main:
        report(f"EMA update, {a.size}, ZeRO-3 on {a.ranks} ranks, {ctx.device.type}, fp32", rows, next(iter(rows)))


if __name__ == "__main__":
    main()
