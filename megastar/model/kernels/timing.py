"""Time of each backend on a GPU, relative to plain causal flash attention in the same run, and recompilations per mask."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megastar.model.kernels import flash
from megastar.model.kernels.check import draw, example
from megastar.model.kernels.select import NAMES, backend
from megastar.model.masks import MaskSpec

PEER = "plain causal flash"
SKIPPED = "skipped: no time left"


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Median time of one call, by CUDA events on a GPU (several calls between two events, which hides the launch)."""
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    times, calls = [], 5
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / calls)
    return statistics.median(times)


def forward_backward(
    name: str, shape: tuple[int, int, int, int], spec: MaskSpec, dtype: torch.dtype, device: Any
) -> Any:
    """One call of ``name`` with its backward pass, on shape (B, H, S, d)."""
    q, k, v, g = draw(*shape, dtype, device)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    attend = backend(name).attention
    return lambda: torch.autograd.grad(attend(*leaves, spec), leaves, g)


def timings(
    device: torch.device,
    dtype: torch.dtype,
    shapes: list[tuple[int, int, int, int]],
    patterns: tuple[str, ...] = ("causal", "hidden"),
    repeats: int = 20,
    over: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """A row for each shape (B, H, S, d), pattern and backend: ms forward and backward, and the ratio to the peer.

    The peer is plain causal: flash-attn if it is installed, else torch's own flash kernel. ``over``: stop early.
    """
    for shape in shapes:
        plain = MaskSpec()
        case = (dtype, shape[3], device, True)
        peer = "flash" if flash.missing() is None and flash.supports(plain, *case) is None else "sdpa"
        base = milliseconds(forward_backward(peer, shape, plain, dtype, device), device, repeats)
        for which in patterns:
            spec = plain if which == "causal" else example(which, shape[0], shape[2])
            for name in NAMES:
                module = backend(name)
                row = {"size": shape[2], "head_dim": shape[3], "pattern": which, "backend": name, "peer": peer}
                if module.missing() is not None or module.supports(spec, *case) is not None:
                    continue
                if over():
                    yield row | {"why": SKIPPED}
                    continue
                try:
                    ms = milliseconds(forward_backward(name, shape, spec, dtype, device), device, repeats)
                except Exception as error:  # one broken kernel must not hide the results of the others
                    yield row | {"why": f"{type(error).__name__}: {error}"}
                    continue
                yield row | {"ms": ms, "peer_ms": base, "ratio": ms / base}


def recompiles(name: str, shape: tuple[int, int, int, int], device: torch.device, masks: int = 20) -> int:
    """Compilations (dynamo graphs, Triton kernels) that ``masks`` new random masks cause after the first."""
    from torch._dynamo.utils import counters

    def count() -> int:
        graphs: int = counters["stats"]["unique_graphs"]
        if name != "triton":
            return graphs
        from megastar.model.kernels import triton_jit as jit

        kernels = (jit.forward, jit.delta, jit.backward_dq, jit.backward_dkv)
        # device -> (cache of compiled kernels, ...), as in Triton 3
        return graphs + sum(len(entry[0]) for k in kernels for entry in getattr(k, "device_caches", {}).values())

    dtype, before = torch.bfloat16, 0
    for seed in range(masks + 1):
        forward_backward(name, shape, example("hidden", shape[0], shape[2], seed), dtype, device)()
        before = count() if seed == 0 else before
    return count() - before


def fastest(compared: list[dict[str, Any]], timed: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, str]]]:
    """The table that ``auto`` reads: {"plain" or "masked": {head dimension: {S: backend}}}.

    Only backends with at least one correct result at that head dimension, and no wrong one.
    """
    wrong = {(r["backend"], r["head_dim"]) for r in compared if r["ok"] is False}
    right = {(r["backend"], r["head_dim"]) for r in compared if r["ok"]}
    best: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in timed:
        subject = (row["backend"], row["head_dim"])
        if "ms" not in row or subject in wrong or subject not in right:
            continue
        key = ("plain" if row["pattern"] == "causal" else "masked", row["head_dim"], row["size"])
        if key not in best or row["ms"] < best[key]["ms"]:
            best[key] = row
    table: dict[str, dict[str, dict[str, str]]] = {}
    for (kind, head_dim, size), row in best.items():
        table.setdefault(kind, {}).setdefault(str(head_dim), {})[str(size)] = row["backend"]
    return table
