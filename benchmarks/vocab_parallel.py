"""Head and loss under tensor parallelism: vocabulary-parallel cross-entropy compared with gathered logits.

    python benchmarks/vocab_parallel.py --ranks 2 --size b --rows 1024

The reference is DeepSpeed's column-parallel layer with ``gather_output`` and torch's cross-entropy. Both run forward and
backward on the same weights in the same run.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import relaunch, report, run_config, seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--size", default="b", choices=("nano", "b", "l", "xl", "xxl", "3b"))
    p.add_argument("--rows", type=int, default=1024, help="tokens per rank (images x views x 256)")
    p.add_argument("--repeats", type=int, default=5)
    a = p.parse_args()
    relaunch(a.ranks)

    from deepspeed.module_inject.layers import LinearLayer, configure_tensor_parallel_runtime
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig

    from megastar.engine.zero.process_group import start
    from megastar.parallel.cross_entropy import linear_cross_entropy

    cfg = run_config(a.size, f"parallel.tensor_parallel={a.ranks}", "train.global_batch=1")
    ctx = start(cfg)
    configure_tensor_parallel_runtime(TPTrainingConfig(autotp_size=a.ranks))
    D, V = cfg.model.dim, cfg.model.vocab_size
    torch.manual_seed(0)
    weight = torch.randn(V, D, device=ctx.device) * 0.02
    hidden = torch.randn(a.rows, D, device=ctx.device, requires_grad=True)
    targets = torch.randint(0, V, (a.rows,), device=ctx.device)

    def head(gather: bool) -> LinearLayer:
        plain = torch.nn.Linear(D, V, bias=False, device=ctx.device)
        plain.weight.data.copy_(weight)
        return LinearLayer(plain, ctx.tensor_group, gather_output=gather)

    whole, split = head(True), head(False)
    losses: dict[str, float] = {}

    def gathered() -> None:
        hidden.grad = None
        loss = F.cross_entropy(whole(hidden).float(), targets)
        loss.backward()
        losses["gathered"] = loss.item()

    def parallel() -> None:
        hidden.grad = None
        loss = linear_cross_entropy(hidden, split.weight, targets, ctx.tensor_group)
        loss.backward()
        losses["parallel"] = loss.item()

    for work in (gathered, parallel):
        work()
    rows = {"gathered logits (DeepSpeed, torch)": seconds(gathered, a.repeats, dist.barrier)}
    rows["vocabulary-parallel"] = seconds(parallel, a.repeats, dist.barrier)
    if ctx.main:
        assert abs(losses["gathered"] - losses["parallel"]) < 1e-4, losses
        title = f"head and loss of {a.size}, {a.rows} tokens, V {V}, tensor {a.ranks}, {ctx.device.type}, fp32"
        report(title, rows, next(iter(rows)))


if __name__ == "__main__":
    main()
