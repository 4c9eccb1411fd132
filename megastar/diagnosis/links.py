"""What several ranks measure together: the offsets of their clocks, and the bandwidth of an all-reduce."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from megastar.diagnosis.finding import FAILURE, OK, WARNING, Finding, compact

MILD_SKEW, BAD_SKEW = 1.0, 60.0  # seconds; S3 rejects clocks that are 15 min off, munge 5 min
WEAK, BROKEN = 0.5, 0.1  # shares of the expected bandwidth
SIZES = {"nccl": 256 << 20, "gloo": 8 << 20}  # bytes of an all-reduce
REPEATS = 5
INSIDE, AMONG = "all-reduce in a node", "all-reduce of all"


def expected_bandwidth(gpu: str | None, ranks: int, nodes: int, network: float | None) -> float | None:
    """Expected bus bandwidth of a ring all-reduce in bytes/s; None if unknown.

    With GPUs from the data sheets used by megastar plan; on CPUs between nodes from the network card's ``network``.
    """
    from megastar.parallel.gpus import BANDWIDTH_EFFICIENCY, GPUS, Machine

    if gpu is not None:
        return Machine(gpu, GPUS[gpu], ranks, max(1, ranks // nodes)).data_rate(1) if gpu in GPUS else None
    return network * BANDWIDTH_EFFICIENCY if network and nodes > 1 else None


def nic_bandwidth(interfaces: Path = Path("/sys/class/net")) -> float | None:
    """Bytes/s of the fastest network card that is up; None if no card reports its speed (virtual ones do not)."""
    rates = []
    for card in interfaces.glob("*"):
        with suppress(OSError, ValueError):
            if card.name != "lo" and (card / "operstate").read_text().strip() == "up":
                rates.append(int((card / "speed").read_text()) * 1e6 / 8)
    return max((r for r in rates if r > 0), default=None)


def measure(store: Any, place: int, nodes: list[str], patience: float) -> dict[str, Any]:
    """A collective: ``nodes[i]`` is the node of the i-th member, this rank is the ``place``-th.

    Returns {"clock": Unix times at the ends of common all-reduces, "inside", "among": bytes/s, "backend", "gpu"}.
    """
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available() and torch.cuda.device_count() > 0
    backend = "nccl" if cuda and dist.is_nccl_available() else "gloo"
    device = torch.device("cpu")
    if backend == "nccl":
        index = 0 if torch.cuda.device_count() == 1 else sum(n == nodes[place] for n in nodes[:place])
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    world, timeout = len(nodes), timedelta(seconds=patience)
    dist.init_process_group(backend, store=store, rank=place, world_size=world, timeout=timeout)
    try:
        one, clock = torch.zeros(1, device=device), []
        for _ in range(8):  # the first ones open the connections
            dist.all_reduce(one)
            one.item()
            clock.append(time.time())
        groups = {n: [i for i, m in enumerate(nodes) if m == n] for n in dict.fromkeys(nodes)}
        mine, inside = groups[nodes[place]], None
        if len(groups) < world:  # a node has several ranks
            for node, members in groups.items():
                group = dist.new_group(members, timeout=timeout)
                if node == nodes[place] and len(members) > 1:
                    inside = bandwidth(group, len(mine), device, backend)
        among = bandwidth(None, world, device, backend) if len(groups) > 1 else None
        gpu = torch.cuda.get_device_name(device) if backend == "nccl" else None
        return {"clock": clock[3:], "inside": inside, "among": among, "backend": backend, "gpu": gpu}
    finally:
        dist.destroy_process_group()


def bandwidth(group: Any, ranks: int, device: Any, backend: str) -> float:
    """Bus bandwidth in bytes/s, the median of several runs: 2 (n - 1) / n of the data crosses each link of a ring."""
    import torch
    import torch.distributed as dist

    data = torch.zeros(SIZES[backend] // 4, device=device)
    took = []
    for i in range(REPEATS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 1:
            took.append(time.perf_counter() - start)
    return 2 * (ranks - 1) / ranks * data.numel() * 4 / statistics.median(took)


def clock_findings(clocks: dict[str, list[float]]) -> list[Finding]:
    """``clocks``: node -> its times at common moments; the first node is the reference. Accurate to milliseconds."""
    (reference, first), *others = clocks.items()
    offsets = {node: statistics.median(t - f for t, f in zip(c, first, strict=True)) for node, c in others}
    found = []
    for low, high, level in ((BAD_SKEW, float("inf"), FAILURE), (MILD_SKEW, BAD_SKEW, WARNING)):
        bad = {n: abs(s) for n, s in offsets.items() if low <= abs(s) < high}
        if bad:
            text = f"{compact(list(bad))}: up to {max(bad.values()):.1f} s off the clock of {reference}"
            remedy = "start chronyd or ntpd there: SLURM and S3 reject requests if clocks differ"
            found.append(Finding("clocks", level, text, remedy))
    if not found and offsets:
        largest = max(map(abs, offsets.values()))
        found.append(Finding("clocks", OK, f"{len(clocks)} nodes agree within {largest:.3f} s"))
    return found


def findings(results: dict[int, dict[str, Any]], nodes: list[str], network: float | None) -> list[Finding]:
    """The findings about clocks and bandwidth. ``results``: of ``measure``, by place."""
    from megastar.parallel.gpus import gpu_model

    clocks: dict[str, list[float]] = {}
    for i, result in results.items():
        clocks.setdefault(nodes[i], result["clock"])
    found = clock_findings(clocks) if len(clocks) > 1 else []
    some = results[min(results)]
    gpu = gpu_model(some["gpu"]) if some["gpu"] else None
    known = not some["gpu"] or gpu is not None
    inside: dict[str, float] = {}
    for i, result in results.items():
        if result["inside"] is not None:
            inside[nodes[i]] = min(result["inside"], inside.get(nodes[i], float("inf")))
    if inside:
        ranks = max(nodes.count(n) for n in inside)
        expected = expected_bandwidth(gpu, ranks, 1, None) if known and some["gpu"] else None
        found.append(_bandwidth_finding(INSIDE, inside, expected, some["backend"], f"{ranks} ranks"))
    among = [r["among"] for r in results.values() if r["among"] is not None]
    if among:
        expected = expected_bandwidth(gpu, len(nodes), len(set(nodes)), network) if known else None
        what = f"{len(nodes)} ranks on {len(set(nodes))} nodes"
        found.append(_bandwidth_finding(AMONG, {"": min(among)}, expected, some["backend"], what))
    return found


def _bandwidth_finding(name: str, rates: dict[str, float], expected: float | None, backend: str, what: str) -> Finding:
    node = min(rates, key=lambda n: rates[n])
    slowest = f", the slowest on {node}" if len(rates) > 1 else ""
    text = f"{backend}, {what}: {rates[node] / 1e9:.3g} GB/s{slowest}"
    if expected is None:
        return Finding(name, OK, f"{text}; no expected value is known")
    text += f", {rates[node] / expected:.0%} of the expected {expected / 1e9:.3g} GB/s"
    if rates[node] >= WEAK * expected:
        return Finding(name, OK, text)
    remedy = "run the check on fewer nodes to find the slow one; "
    if backend == "nccl":
        remedy += "NCCL_DEBUG=INFO prints which network NCCL uses (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
    else:
        remedy += "GLOO_SOCKET_IFNAME selects the network card"
    return Finding(name, FAILURE if rates[node] < BROKEN * expected else WARNING, text, remedy)


def network_hint(environ: Mapping[str, str] = os.environ) -> str:
    """The remedy for ranks that cannot communicate."""
    current = [f"{n}={environ[n]}" for n in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA") if n in environ]
    now = f" (now {', '.join(current)})" if current else ""
    return f"check that the nodes reach each other on all ports; select the card with NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME{now}"
