"""Images per second of the sampler, compared with LlamaGen's ``generate``, with guidance, at several batch sizes.

LLAMAGEN_DIR=/path/to/LlamaGen python -m benchmarks.sampling [--batches 1,16,64] [--dtype fp32] [--tokens 256]
    [--layers 6 --heads 6 --dim 384] [--repeats 3] [--profile]
LLAMAGEN_DIR=/path/to/LlamaGen python -m benchmarks.sampling --tiny        # seconds; its times mean nothing

Both sample the same number of tokens with equal random weights, dtype and threads, taking turns in one process, so that
other load affects both; values are medians over the repetitions. ``--clock cpu``, the default on a CPU, measures CPU
seconds, which exclude other processes. The default network is between nano and B in size, fast enough for a laptop.
On a GPU (``--device cuda``) LlamaGen also runs under torch.compile(mode="reduce-overhead"), as in its own sampler.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megastar.config.schema import ModelConfig
from megastar.model.transformer import Transformer
from megastar.sampling.options import SamplingOptions
from megastar.sampling.sampler import Sampler, sample_seeds
from megastar.utils.device import DTYPES


def llamagen() -> Path:
    """The folder of LlamaGen's clone, added to the import path."""
    folder = os.environ.get("LLAMAGEN_DIR")
    if not folder or not (Path(folder) / "autoregressive/models/generate.py").is_file():
        raise SystemExit(
            "LLAMAGEN_DIR must name a clone of LlamaGen: git clone https://github.com/FoundationVision/LlamaGen, "
            "then LLAMAGEN_DIR=LlamaGen python -m benchmarks.sampling"
        )
    sys.path.insert(0, folder)
    # LlamaGen's utils package would import timm; only this class of it is used, and only in training.
    if "utils.drop_path" not in sys.modules:
        module = types.ModuleType("utils.drop_path")
        module.DropPath = torch.nn.Identity  # type: ignore[attr-defined]
        sys.modules["utils"] = types.ModuleType("utils")
        sys.modules["utils.drop_path"] = module
    return Path(folder)


def networks(c: ModelConfig, dtype: torch.dtype, device: str) -> tuple[Any, Transformer]:
    """LlamaGen's network and ours with equal random weights."""
    llamagen()
    from autoregressive.models.gpt import ModelArgs
    from autoregressive.models.gpt import Transformer as Theirs

    torch.manual_seed(0)
    sizes = {k: getattr(c, k) for k in ("dim", "n_layer", "n_head", "multiple_of", "vocab_size", "num_classes")}
    theirs = Theirs(ModelArgs(**sizes, block_size=c.image_tokens)).eval()
    torch.nn.init.normal_(theirs.output.weight, std=0.05)  # initialized with zeros
    ours = Transformer(c).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
    return theirs.to(device, dtype), ours.to(device, dtype)


def seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--batches", default="1,16,64")
    p.add_argument("--dtype", choices=DTYPES, default="fp32")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    p.add_argument("--clock", choices=("cpu", "wall"), default=None)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--cfg-scale", type=float, default=2.0)
    p.add_argument("--profile", action="store_true", help="profile megastar's sampler at the last batch size")
    for name, value in (("tokens", 256), ("layers", 6), ("heads", 6), ("dim", 384), ("vocab", 16384)):
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--tiny", action="store_true", help="16 tokens of a network of one narrow block")
    a = p.parse_args()
    if a.tiny:
        a.batches, a.repeats, a.tokens, a.layers, a.heads, a.dim, a.vocab = "2", 1, 16, 1, 2, 32, 64
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(a.threads)
    clock = a.clock or ("cpu" if a.device == "cpu" else "wall")
    tick = time.process_time if clock == "cpu" else time.perf_counter
    c = ModelConfig(n_layer=a.layers, n_head=a.heads, dim=a.dim, image_tokens=a.tokens, vocab_size=a.vocab)
    theirs, ours = networks(c, DTYPES[a.dtype], a.device)
    from autoregressive.models.generate import generate

    options = SamplingOptions(cfg_scale=a.cfg_scale)
    arguments = {"cfg_scale": a.cfg_scale, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    print(
        f"{a.layers} blocks x {a.dim}, S = {a.tokens}, V = {a.vocab}, guidance {a.cfg_scale}, {a.dtype}, {a.device}, "
    )
    print(f"{a.threads} threads, median of {a.repeats}, {clock} seconds per batch")
    for batch in map(int, a.batches.split(",")):
        labels = torch.arange(batch) % c.num_classes
        sampler = Sampler(ours, options, batch)
        rows: dict[str, Callable[[], Any]] = {
            "LlamaGen generate": lambda labels=labels: generate(theirs, labels.to(a.device), a.tokens, **arguments),
            "megastar": lambda labels=labels, s=sampler: s.draw(labels, sample_seeds(0, len(labels))),
        }
        if a.device != "cpu":
            compiled = torch.compile(theirs, mode="reduce-overhead", fullgraph=True)
            rows["LlamaGen compiled"] = lambda labels=labels, m=compiled: generate(
                m, labels.to(a.device), a.tokens, **arguments
            )
        if batch == int(a.batches.split(",")[0]) or a.device != "cpu":
            for work in rows.values():  # warm up: kernels, graphs
                work()
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(a.repeats):
            for name, work in rows.items():
                drawn: list[torch.Tensor] = []
                times[name].append(seconds(lambda work=work, drawn=drawn: drawn.append(work()), tick))
                assert tuple(drawn[0].shape) == (batch, a.tokens), f"{name}: tokens {tuple(drawn[0].shape)}"
        mine = statistics.median(times["megastar"])
        for name, some in times.items():
            m = statistics.median(some)
            print(
                f"  batch {batch:>3}  {name:<20} {m:9.3f} s ({min(some):.3f} to {max(some):.3f})  "
                f"{batch / m:8.3f} images/s   this / megastar = {m / mine:.2f}",
                flush=True,
            )
    if a.profile:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as trace:
            rows["megastar"]()
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


if __name__ == "__main__":
    main()
