"""CPU time of the host in a training step against LlamaGen's, interleaved in one process, on a GPU or the null CUDA device.

    LLAMAGEN_DIR=checkout python benchmarks/host_time.py --size b --batch 32
    LLAMAGEN_DIR=checkout python tests/nullgpu/device.py benchmarks/host_time.py --size b --batch 32

Both sides: forward, loss, backward, clipping, AdamW on bf16 products. megastar's step is that of `megastar train`, through
DeepSpeed, with the average of the weights. A step waits for the device at its end, outside of the measured time.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import random_batch, report, run_config
from step import CONSTANT, Step, engine_step, llamagen, their_step

from megastar.engine.zero.setup import start


def host_seconds(step: Step) -> float:
    torch.cuda.synchronize()
    begin = time.process_time()
    step()
    seconds = time.process_time() - begin
    torch.cuda.synchronize()
    return seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", default="b", help="nano, b, l, xl")
    p.add_argument("--batch", type=int, default=32, help="images a step")
    p.add_argument("--stage", default="zero1")
    p.add_argument("--repeats", type=int, default=15)
    a = p.parse_args()

    common = (f"train.global_batch={a.batch}", "train.dtype=bf16", "train.threads=1", f"parallel.deepspeed={a.stage}")
    ar = run_config(a.size, *common, "self_guided.enabled=false", *CONSTANT)
    star = run_config(a.size, *common)
    ctx = start(ar)
    assert ctx.device.type == "cuda", "host_time.py needs a GPU or the null CUDA device"
    batch = random_batch(ar, ctx)
    peer = llamagen(ar).to(ctx.device)
    steps = {
        "LlamaGen": their_step(ar, peer, batch, torch.bfloat16, ctx.device),
        "megastar AR": engine_step(ar, batch | {"codes": batch["codes"][:, :1]}),
        "megastar ST-AR": engine_step(star, batch),
    }
    for step in steps.values():
        for _ in range(3):
            step()
    rows: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(a.repeats):
        for name, step in steps.items():
            rows[name].append(host_seconds(step))
    report(f"host CPU time of a step of {a.size}, {a.batch} images, bf16, {a.stage}", rows, "LlamaGen")


if __name__ == "__main__":
    main()
