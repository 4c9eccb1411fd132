"""What each backend costs on a GPU, beside plain causal flash attention in the same run; and what a new mask recompiles."""

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


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 3) -> float:
    """Median of one call, by CUDA events on a GPU (several calls between two events, so that the launch is hidden)."""
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

    The peer is plain causal: flash-attn's where it is here, else torch's own flash kernel. ``over``: stop early.
    """
    for shape in shapes:
        plain = MaskSpec()
        about = (dtype, shape[3], device, True)
        flashes = flash.missing() is None and flash.supports(plain, *about) is None
        peer = "flash" if flashes else "sdpa"
        base = milliseconds(forward_backward(peer, shape, plain, dtype, device), device, repeats)
        for which in patterns:
            spec = plain if which == "causal" else example(which, shape[0], shape[2])
            for name in NAMES:
                one = backend(name)
                row = {"size": shape[2], "head_dim": shape[3], "pattern": which, "backend": name, "peer": peer}
                if one.missing() is not None or one.supports(spec, *about) is not None:
                    continue
                if over():
                    yield row | {"why": "left out: no time left"}
                    continue
                try:
                    ms = milliseconds(forward_backward(name, shape, spec, dtype, device), device, repeats)
                except Exception as error:  # one broken kernel must not hide what the others do
                    yield row | {"why": f"{type(error).__name__}: {error}"}
                    continue
                yield row | {"ms": ms, "peer_ms": base, "ratio": ms / base}


def recompiles(name: str, shape: tuple[int, int, int, int], device: torch.device, masks: int = 20) -> int:
    """Compilations (dynamo's graphs, Triton's kernels) that ``masks`` fresh draws cause after the first."""
    from torch._dynamo.utils import counters

    def count() -> int:
        graphs = counters["stats"]["unique_graphs"]
        if name != "triton":
            return graphs
        from megastar.model.kernels import triton_jit as jit

        kernels = (jit.forward, jit.delta, jit.backward_dq, jit.backward_dkv)
        # device -> (cache of compiled kernels, ...), as Triton 3 keeps it
        return graphs + sum(len(entry[0]) for one in kernels for entry in getattr(one, "device_caches", {}).values())

    dtype, before = torch.bfloat16, 0
    for seed in range(masks + 1):
        forward_backward(name, shape, example("hidden", shape[0], shape[2], seed), dtype, device)()
        before = count() if seed == 0 else before
    return count() - before


def fastest(compared: list[dict[str, Any]], timed: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, str]]]:
    """The backend table that ``auto`` reads: {"plain" or "masked": {head dimension: {S: backend}}}.

    Only backends with no wrong result at that head dimension, and at least one right one.
    """
    wrong = {(r["backend"], r["head_dim"]) for r in compared if r["ok"] is False}
    right = {(r["backend"], r["head_dim"]) for r in compared if r["ok"]}
    best: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in timed:
        who = (row["backend"], row["head_dim"])
        if "ms" not in row or who in wrong or who not in right:
            continue
        key = ("plain" if row["pattern"] == "causal" else "masked", row["head_dim"], row["size"])
        if key not in best or row["ms"] < best[key]["ms"]:
            best[key] = row
    table: dict[str, dict[str, dict[str, str]]] = {}
    for (kind, head_dim, size), row in best.items():
        table.setdefault(kind, {}).setdefault(str(head_dim), {})[str(size)] = row["backend"]
    return table
