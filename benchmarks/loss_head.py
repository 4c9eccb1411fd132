"""Peak memory and time of the output layer and its loss, compared with plain fp32 cross-entropy and torch's fused loss.

    python benchmarks/loss_head.py --rows 4096
    python benchmarks/loss_head.py --rows 4096 --dtype bf16 --torch

Each implementation runs forward and backward in its own process. The peak memory is, on a CPU, the maximum resident memory
of the process minus that before the first pass (weight and features), on a GPU that of torch's allocator. The time is the
median of the following passes, on a CPU in CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from common import seconds

KINDS = {"plain": "plain: fp32 logits, F.cross_entropy", "ours": "megastar: chunks", "torch": "F.linear_cross_entropy"}


def one(kind: str, rows: int, dim: int, vocabulary: int, dtype: str, repeats: int) -> None:
    from megastar.parallel.cross_entropy import linear_cross_entropy
    from megastar.utils.onednn import linear

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    hidden = torch.randn(rows, dim, generator=g).to(device, precision).requires_grad_()
    weight = (torch.randn(vocabulary, dim, generator=g) * 0.02).to(device, precision).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=g).to(device)

    def loss() -> torch.Tensor:
        if kind == "ours":
            return linear_cross_entropy(hidden, weight, targets)
        if kind == "torch":
            return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())
        return F.cross_entropy(linear(hidden, weight).float(), targets)

    def step() -> float:
        hidden.grad = weight.grad = None
        value = loss()
        value.backward()
        return value.item()

    a = torch.randn(64, 64, requires_grad=True)  # a first use, at which libraries are loaded and allocate memory
    F.cross_entropy(linear(a, a), torch.arange(64)).backward()
    del a
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with open("/proc/self/status") as f:
            before = 1024 * int(next(line for line in f if line.startswith("VmRSS")).split()[1])
    value = step()
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = seconds(step, repeats, clock=time.perf_counter if cuda else time.process_time)
    print(
        json.dumps({"loss": value, "bytes": peak - before, "seconds": statistics.median(times), "device": device.type})
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=4096, help="tokens (images x views x 256)")
    p.add_argument("--dim", type=int, default=768)
    p.add_argument("--vocabulary", type=int, default=16384)
    p.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--torch", action="store_true", help="also run F.linear_cross_entropy (torch 2.13; slow on a CPU)")
    p.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one:
        one(a.one, a.rows, a.dim, a.vocabulary, a.dtype, a.repeats)
        return
    found = {}
    for kind in KINDS:
        if kind == "torch" and not (a.torch and hasattr(torch.nn, "LinearCrossEntropyOptions")):
            continue
        done = subprocess.run([sys.executable, *sys.argv, "--one", kind], check=True, capture_output=True, text=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    plain = found["plain"]
    print(
        f"head and loss, {a.rows} rows, D {a.dim}, V {a.vocabulary}, {a.dtype}, {plain['device']}, forward and backward"
    )
    for kind, row in found.items():
        assert abs(row["loss"] - plain["loss"]) < 1e-3, (kind, row, plain)
        print(
            f"  {KINDS[kind]:<38} peak {row['bytes'] / 2**20:7.0f} MiB ({row['bytes'] / plain['bytes']:.0%})"
            f"   {row['seconds']:.3f} s (plain / this = {plain['seconds'] / row['seconds']:.2f})"
        )


if __name__ == "__main__":
    main()
