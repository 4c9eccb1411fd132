"""Images per second of the tokenizer's training on two ranks and on one, at the same global batch.

    python -m benchmarks.tokenizer.ranks            # the demo's tokenizer, 64 images a step
    python -m benchmarks.tokenizer.ranks --tiny     # seconds, its times mean nothing

Each rank has one thread. Before anything is timed, both runs take the same first steps, and their losses and the hash of
the images of each step must agree: the same work is divided. The runs alternate, and each is a launch of its own.
The images are decoded as in training. On a machine that does other work the ratio is a lower bound.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.common import ROOT, processor

CHECKED = 3  # steps whose losses are compared; also the warm-up
TINY = ["tokenizer.channels=8", "tokenizer.channel_multipliers=[1,1,2]", "tokenizer.norm_groups=4", "batch=8"]


def rank(words: list[str], steps: int) -> None:
    """Train on this rank; rank 0 prints the losses and hashes of the first steps, and the seconds of the others."""
    import torch

    from megastar.config.load import load_tokenizer_config
    from megastar.data.images.dataset import ImageSet
    from megastar.engine.tokenizer.batches import Batches
    from megastar.engine.tokenizer.setup import join
    from megastar.parallel.replicas import Replicas
    from megastar.tokenizer.train import TokenizerTrainer
    from megastar.tokenizer.vq import to_images

    cfg = load_tokenizer_config(ROOT / "configs/tokenizer/emoji64.yaml", ["dtype=fp32", "perceptual=0", *words])
    ctx = join(cfg)
    torch.set_num_threads(1)
    replicas = Replicas(ctx.rank, ctx.world, ctx.data_group)
    losses, images, found = [], [], []
    with Batches(ImageSet(ROOT / cfg.pictures, cfg.subset), cfg, replicas) as batches:
        trainer = TokenizerTrainer(cfg, ctx.device, ctx.dtype, batches, replicas)
        for step in range(CHECKED + steps):
            if step == CHECKED:
                replicas.sum(torch.zeros(1, device=ctx.device))  # all ranks begin
                start = time.perf_counter()
            pixels = batches(step)
            metrics = trainer.train_step(to_images(pixels, ctx.device))
            if step < CHECKED:
                losses.append((replicas.sum(metrics["loss"]) / ctx.world).item())
                images.append(hashlib.sha256(replicas.gather(pixels).numpy().tobytes()).hexdigest())
    replicas.sum(torch.zeros(1, device=ctx.device))
    found = [time.perf_counter() - start]
    if ctx.main:
        print(json.dumps({"losses": losses, "images": images, "seconds": found[0], "batch": cfg.batch}))


def launch(ranks: int, words: list[str], steps: int) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "benchmarks.tokenizer.ranks"]
    done = subprocess.run(
        [*command, "--rank", f"--steps={steps}", *words], env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{ranks} rank(s) failed: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("fields", nargs="*", metavar="field=value", help="fields of configs/tokenizer/emoji64.yaml")
    p.add_argument("--steps", type=int, default=20, help="timed steps of a launch")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    words = [*(TINY if a.tiny else []), *a.fields]
    if a.rank:
        return rank(a.fields, a.steps)
    steps, repeats = (2, 1) if a.tiny else (a.steps, a.repeats)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        runs = {ranks: launch(ranks, words, steps) for ranks in rates}
        one, two = runs[1], runs[2]
        assert one["images"] == two["images"], "the ranks had other images"
        assert all(abs(x - y) < 1e-4 * abs(x) for x, y in zip(one["losses"], two["losses"], strict=True)), (one, two)
        for ranks, run in runs.items():
            rates[ranks].append(run["batch"] * steps / run["seconds"])
    load = os.getloadavg()[0]
    print(
        f"tokenizer's training, {one['batch']} images a step, fp32, one thread per rank, {processor()}, load {load:.1f}"
    )
    for ranks, found in rates.items():
        print(f"  {ranks} rank(s)  {statistics.median(found):8.1f} images/s  ({min(found):.1f} to {max(found):.1f})")
    print(f"  two ranks / one = {statistics.median(rates[2]) / statistics.median(rates[1]):.2f}")


if __name__ == "__main__":
    main()
