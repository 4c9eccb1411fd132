"""Masked attention (a quarter of the keys hidden) against plain causal attention, forward and backward, in one run.

    python benchmarks/attention.py [--backends sdpa,triton] [--dtype fp32,bf16] [--repeats 15]

All variants take turns on the same inputs, so noise affects them equally; ratios are of medians. Each repetition draws a
new mask; its construction is included in the time, and ``--blocks`` blocks share it, as in a network. The reference is
torch's own call with ``is_causal``. Goal: a ratio of at most 1.3 for sdpa on CPU, 1.15 on an H100 (triton or flex).
"""

from __future__ import annotations

import argparse
import statistics

from common import seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backends", default="sdpa", help="comma-separated: sdpa, flex, triton, flash (default sdpa)")
    p.add_argument("--dtype", default="fp32,bf16", help="comma-separated: fp32, bf16 (default both)")
    p.add_argument("--repeats", type=int, default=15)
    p.add_argument("--blocks", type=int, default=12, help="blocks that share a mask (default 12, as B)")
    p.add_argument("--batch", type=int, default=0, help="sequences (default 4 on CPU, 32 on a GPU)")
    args = p.parse_args()

    import torch
    import torch.nn.functional as F

    from megastar.model.kernels.check import draw, example
    from megastar.model.kernels.select import backend
    from megastar.utils.device import DTYPES, pick_device

    device = pick_device()
    B, H, d = args.batch or (32 if device.type == "cuda" else 4), 12, 64
    print(f"{device}, {torch.get_num_threads()} threads, B {B}, H {H}, d {d}, {args.blocks} blocks per mask")
    for dtype in args.dtype.split(","):
        for size in (64, 256, 576, 1024):
            q, k, v, g = draw(B, H, size, d, DTYPES[dtype], device)
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            seed = iter(range(1, 10**6))

            def torchs(leaves=leaves, g=g):
                for _ in range(args.blocks):
                    torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, g)

            def ours(attend, masked, leaves=leaves, g=g, size=size, seed=seed):
                spec = example("hidden" if masked else "causal", B, size, next(seed))
                for _ in range(args.blocks):
                    torch.autograd.grad(attend(*leaves, spec), leaves, g)

            rows = {"torch, is_causal": torchs}
            for name in args.backends.split(","):
                module = backend(name)
                for masked in (False, True):
                    spec = example("hidden" if masked else "causal", B, size)
                    why = module.missing() or module.supports(spec, DTYPES[dtype], d, device, True)
                    label = f"{name}, {'hidden keys' if masked else 'plain causal'}"
                    if why:
                        print(f"  {label} omitted: {why}")
                        continue
                    rows[label] = lambda attend=module.attention, masked=masked: ours(attend, masked)
            times: dict[str, list[float]] = {label: [] for label in rows}
            for work in rows.values():
                work()  # warm up: caches, compilation
            for _ in range(args.repeats):
                for label, work in rows.items():
                    times[label] += seconds(work, 1)
            base = statistics.median(times["torch, is_causal"])
            print(f"S {size}, {dtype}")
            for label, row in times.items():
                m = statistics.median(row)
                print(f"  {label:<28} {1e3 * m / args.blocks:8.3f} ms per block   this / torch causal = {m / base:.2f}")
            for name in args.backends.split(","):
                pair = [times.get(f"{name}, {kind}") for kind in ("hidden keys", "plain causal")]
                if all(pair):
                    print(
                        f"  {name}: masked / plain causal = {statistics.median(pair[0]) / statistics.median(pair[1]):.2f}"
                    )


if __name__ == "__main__":
    main()
