"""What the table of a profile shows: phases, operators, kernels and host synchronizations, in seconds of all profiled steps."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType

RANGE = "phase: "  # begins the names of ranges that mark the phases of a step
MOST_ROWS = 200  # of each table
# Calls in which the host waits for the device; without a GPU the operators alone, which would wait on one.
WAITING_CALLS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
    "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip
WAITING_OPERATORS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
)


def summary_of(recorded: Any, steps: int, device: torch.device) -> dict[str, Any]:
    """Tables of ``recorded``, a ``torch.profiler.profile`` of ``steps`` steps; each is sorted, the longest first."""
    phases: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    waits: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    names = WAITING_CALLS if device.type == "cuda" else WAITING_OPERATORS
    for event in recorded.events():
        if event.device_type != DeviceType.CPU:
            continue
        seconds = event.time_range.elapsed_us() / 1e6
        if event.name.startswith(RANGE):
            _add(phases[event.name.removeprefix(RANGE)], seconds)
        elif event.name in names:
            _add(waits[event.name, _phase_of(event)], seconds)
    operators, kernels = [], []
    for row in recorded.key_averages():
        if row.is_user_annotation or row.key.startswith(("ProfilerStep", RANGE)):
            continue
        entry = {"name": row.key, "calls": row.count}
        if row.device_type == DeviceType.CPU:
            cpu, on_device = row.self_cpu_time_total / 1e6, row.self_device_time_total / 1e6
            operators.append(entry | {"seconds": cpu, "device_seconds": on_device})
        else:
            kernels.append(entry | {"seconds": row.self_device_time_total / 1e6})
    return {
        "phases": _longest({"name": name, "calls": int(n), "seconds": s} for name, (n, s) in phases.items()),
        "operators": _longest(operators),
        "kernels": _longest(kernels),
        "host_syncs": _longest(
            {"name": name, "phase": phase, "calls": int(n), "seconds": s} for (name, phase), (n, s) in waits.items()
        ),
    }


def _add(total: list[float], seconds: float) -> None:
    total[0] += 1
    total[1] += seconds


def _phase_of(event: Any) -> str:
    """The phase in whose range ``event`` lies; other threads, such as autograd's, have none."""
    while event is not None:
        if event.name.startswith(RANGE):
            return str(event.name.removeprefix(RANGE))
        event = event.cpu_parent
    return ""


def _longest(rows: Any) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["seconds"])[:MOST_ROWS]
