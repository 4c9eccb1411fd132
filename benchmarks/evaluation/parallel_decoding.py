"""Parallel decoding of a random-order network: images per second and FD-EffLite0, compared with token by token in rows.

python benchmarks/evaluation/parallel_decoding.py RUN_OR_WEIGHTS [--real TAR --real-subset train] [--raster RUN_OR_WEIGHTS] [--steps 64,32,16,8]
    [--schedule cosine] [--batches 1,8,64] [--images 64] [--count 2000] [--cfg-scale 1]
python benchmarks/evaluation/parallel_decoding.py --tiny        random weights, a few images: the ratios mean nothing

Speed: the samplers take turns in one process and draw the same number of images of the same classes and seeds, so other load
affects all alike; medians of the ratios of each turn. ``--clock cpu``, the default on a CPU, counts CPU seconds, without other
processes. The tokenizer is left out. ``--raster``: a network trained in raster order, whose sampler is then the baseline;
otherwise it is the same network's, token by token in rows. Score: with ``--real``, FD-EffLite0 of ``--count`` images of each
sampler, as often of each class as in the real images; the same number of images is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megastar.config.schema import ModelConfig
from megastar.model.transformer import Transformer
from megastar.sampling.options import SamplingOptions
from megastar.sampling.sampler import Sampler, decode_images, sample_seeds

TINY = ModelConfig(
    name="tiny", n_layer=2, n_head=2, dim=32, multiple_of=16, vocab_size=64, num_classes=3, image_tokens=16,
    target_position="rotary",
)  # fmt: skip


def settings(a: argparse.Namespace, steps: list[int], own: bool) -> dict[str, SamplingOptions]:
    """Name -> how the tokens are drawn. The first is the baseline; ``own``: of the same network."""
    common = {"cfg_scale": a.cfg_scale, "temperature": a.temperature}
    rows = {"rows, one by one" if own else "rows, one by one, raster network": SamplingOptions(**common)}
    if not own:
        rows["rows, one by one"] = SamplingOptions(**common)
    rows["random order, one by one"] = SamplingOptions(**common, token_order="random")
    for n in steps:
        rows[f"{n} steps, {a.schedule}"] = SamplingOptions(**common, parallel_steps=n, schedule=a.schedule)
    rows["one diagonal per step"] = SamplingOptions(**common, schedule="diagonal")
    return rows


def measure(
    networks: dict[str, Transformer], rows: dict[str, SamplingOptions], batch: int, a: argparse.Namespace
) -> None:
    """Print images per second of each setting, and how many times those of the first."""
    tick = time.process_time if a.clock == "cpu" else time.perf_counter
    images = max(batch, a.images // batch * batch)
    classes = torch.arange(images) % next(iter(networks.values())).cfg.num_classes
    seeds = sample_seeds(0, images)
    samplers = {name: Sampler(networks[name], options, batch) for name, options in rows.items()}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(a.repeats + 1):  # the first one warms up
        for name, sampler in samplers.items():
            start = tick()
            parts = [sampler.draw(classes[i : i + batch], seeds[i : i + batch]) for i in range(0, images, batch)]
            spent = tick() - start
            drawn = torch.cat(parts)
            assert drawn.shape == (images, networks[name].cfg.image_tokens), (name, drawn.shape)
            if turn:
                times[name].append(spent)
    first = next(iter(rows))
    for name, some in times.items():
        ratios = [one / own for one, own in zip(times[first], some, strict=True)]
        print(
            f"  batch {batch:>3}  {name:<34} {images / statistics.median(some):9.2f} images/s   "
            f"{statistics.median(ratios):5.2f} x ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def score(draw: Callable[[list[int]], np.ndarray], labels: list[int], a: argparse.Namespace, cache: Path) -> float:
    """FD-EffLite0 of the images of ``labels``."""
    from megastar.evaluation.feature_statistics import Collector
    from megastar.evaluation.features import open_network
    from megastar.evaluation.options import Settings
    from megastar.evaluation.runner import evaluate_collected
    from megastar.evaluation.scores import choose_metrics, needs

    network = open_network("efflite0", torch.device("cpu"))
    metrics = choose_metrics(["fd"], network)
    found = Collector(network, **needs(metrics, real=False))
    pixels = draw(labels)
    assert len(pixels) == len(labels) == a.count
    for first in range(0, len(pixels), 64):
        found.update(pixels[first : first + 64], np.arange(first, min(first + 64, len(pixels))))
    found.finish()
    result = evaluate_collected(
        found, a.real, real_subset=a.real_subset, metrics=metrics, settings=Settings(allow_few=True), cache=cache
    )
    return float(result["value"])


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("weights", nargs="?", help="run or weights file of random token order")
    p.add_argument("--raster", help="run or weights file of raster order: its sampler is the baseline")
    p.add_argument("--tokenizer")
    p.add_argument("--real", help="real images to score against: folder or tar")
    p.add_argument("--real-subset", default=None)
    p.add_argument("--like", help="token shards whose class frequencies the scored images follow")
    p.add_argument("--steps", default="64,32,16,8")
    p.add_argument("--schedule", default="cosine")
    p.add_argument("--batches", default="1,8,64")
    p.add_argument("--images", type=int, default=64, help="per turn and setting")
    p.add_argument("--count", type=int, default=2000, help="scored images per setting")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--cfg-scale", type=float, default=1.0)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    p.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    p.add_argument("--skip-speed", action="store_true")
    p.add_argument("--cache", type=Path, default=Path("runs/parallel_decoding"), help="statistics of the real images")
    p.add_argument("--tiny", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    steps = [int(n) for n in a.steps.split(",")]
    if a.tiny:
        torch.manual_seed(0)
        model, raster, a.repeats, a.images, steps, a.batches = Transformer(TINY).eval(), None, 1, 4, [16, 4], "1,4"
    else:
        from megastar.checkpoint.find_weights import find_weights

        if not a.weights:
            raise SystemExit("name a run or a weights file of random token order, or give --tiny")
        found = find_weights(a.weights)
        model = found.load()
        raster = find_weights(a.raster).load() if a.raster else None
    rows = settings(a, steps, raster is None)
    networks = dict.fromkeys(rows, model)
    if raster is not None:
        networks[next(iter(rows))] = raster
    c = model.cfg
    print(
        f"{c.name}: {c.n_layer} blocks x {c.dim}, T = {c.image_tokens}, V = {c.vocab_size}, guidance {a.cfg_scale:g}, fp32,"
    )
    print(
        f"{a.threads} threads, median of {a.repeats} turns, {a.clock} seconds; times the images per second of the first row"
    )
    if not a.skip_speed:
        for batch in map(int, a.batches.split(",")):
            measure(networks, rows, batch, a)
    if not a.real or a.tiny:
        return
    from megastar.checkpoint.find_weights import labels_of
    from megastar.sampling.distributed import labels_like
    from megastar.tokenizer.io import load_tokenizer

    vq = load_tokenizer(found.tokenizer_file(a.tokenizer), torch.device("cpu"))
    pool = labels_of(a.like) if a.like else list(range(c.num_classes))
    labels, seeds, first = labels_like(pool, a.count, 0), sample_seeds(0, a.count), None
    for name, options in rows.items():
        sampler = Sampler(networks[name], options, 64)

        def draw(labels: list[int], sampler: Sampler = sampler) -> np.ndarray:
            wanted = torch.tensor(labels)
            parts = [sampler.draw(wanted[i : i + 64], seeds[i : i + 64]) for i in range(0, len(labels), 64)]
            return decode_images(vq, torch.cat(parts))

        value = score(draw, labels, a, a.cache)
        first = first or value
        print(f"  FD-EffLite0  {name:<34} {value:9.2f}   {value / first - 1:+.1%}, {a.count} images", flush=True)


if __name__ == "__main__":
    main()
