"""GPUs, as nvidia-smi describes them in CSV: driver, memory, ECC, whether torch can use them."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
from typing import Any

from megastar.diagnosis.finding import FAILURE, OK, WARNING, Finding

FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.mode.current",
    "ecc.errors.corrected.volatile.total",
    "ecc.errors.uncorrected.volatile.total",
    "ecc.errors.uncorrected.aggregate.total",
    "retired_pages.pending",
    "temperature.gpu",
    "clocks_throttle_reasons.hw_slowdown",
)
FREE = 0.9  # of a GPU's memory
HOT = 90  # degrees Celsius
CORRECTED = 1000  # corrected memory errors since the driver was loaded


class NoGpus(Exception):
    """There is no nvidia-smi, or it fails: the text says which."""


def ask(seconds: float = 30.0) -> str:
    """nvidia-smi's CSV. A field that an old or new one does not know is left out. Raises ``NoGpus``."""
    if shutil.which("nvidia-smi") is None:
        raise NoGpus("")
    fields = list(FIELDS)
    while True:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoGpus(f"nvidia-smi fails ({type(error).__name__})") from error
        said = (done.stdout + done.stderr).strip()
        if done.returncode == 0:
            return done.stdout
        unknown = [f for f in fields if f'"{f}"' in said]
        if not unknown or len(fields) == 1:
            raise NoGpus(f"nvidia-smi fails with {done.returncode} ({' '.join(said.split())[:200]})")
        fields = [f for f in fields if f not in unknown]


def parse(text: str) -> list[dict[str, str]]:
    """One row a GPU, field -> value, units taken off the names; a field that a GPU has not is left out."""
    lines = list(csv.reader(io.StringIO(text), skipinitialspace=True))
    if not lines:
        return []
    names = [name.partition(" [")[0].strip() for name in lines[0]]
    rows = []
    for line in lines[1:]:
        if len(line) == len(names):
            pairs = zip(names, (v.strip() for v in line), strict=True)
            rows.append({n: v for n, v in pairs if v and not v.startswith("[") and v != "N/A"})
    return rows


def torch_sees() -> dict[str, Any]:
    """What this process can use: {"cuda": torch's CUDA or "", "count": GPUs, "why": the first error}."""
    import torch

    found: dict[str, Any] = {"cuda": str(torch.version.cuda or ""), "count": 0, "why": ""}
    if torch.version.cuda:
        try:
            torch.cuda.init()
            found["count"] = torch.cuda.device_count()
        except Exception as error:
            found["why"] = " ".join(str(error).split())[:200]
    return found


def merged(of_ranks: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """The rows of a node's ranks, each of which may see its own GPU alone, without repetition."""
    by_id: dict[str, dict[str, str]] = {}
    for rows in of_ranks:
        for row in rows:
            by_id.setdefault(row.get("uuid", row.get("index", "")), row)
    return list(by_id.values())


def findings(rows: list[dict[str, str]], sees: dict[str, Any], problem: str = "") -> list[Finding]:
    """What a node's GPUs are and what ails them. ``problem``: why nvidia-smi could not be asked."""
    if problem:
        return [Finding("driver", FAILURE, problem, "reload the NVIDIA driver, or reboot the node")]
    if not rows:
        if os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS"):
            return [Finding("GPUs", FAILURE, "SLURM gave this job GPUs, nvidia-smi shows none", "drain the node")]
        return [Finding("GPUs", OK, "none: training runs on the CPU (gloo)")]
    return [*_driver(rows, sees), _kinds(rows), *_memory(rows), *_ecc(rows), *_heat(rows)]


def _driver(rows: list[dict[str, str]], sees: dict[str, Any]) -> list[Finding]:
    driver = rows[0].get("driver_version", "unknown")
    if not sees["cuda"]:
        cure = "install torch's CUDA build: pip install torch --index-url of the CUDA version, see pytorch.org"
        return [Finding("driver", FAILURE, f"{driver}; torch is a CPU build and cannot use the GPUs", cure)]
    if not sees["count"]:
        why = (
            sees["why"]
            or os.environ.get("CUDA_VISIBLE_DEVICES", "")
            and "CUDA_VISIBLE_DEVICES hides them"
            or "no reason"
        )
        cure = "update the driver, or take a torch of an older CUDA; see CUDA_VISIBLE_DEVICES"
        return [Finding("driver", FAILURE, f"{driver}; torch (CUDA {sees['cuda']}) sees no GPU ({why})", cure)]
    return [Finding("driver", OK, f"{driver}; CUDA {sees['cuda']} in torch")]


def _kinds(rows: list[dict[str, str]]) -> Finding:
    kinds: dict[str, int] = {}
    for row in rows:
        memory = _number(row, "memory.total")
        name = row.get("name", "GPU") + (f" ({memory / 1024:.0f} GiB)" if memory else "")
        kinds[name] = kinds.get(name, 0) + 1
    said = ", ".join(f"{n} x {name}" for name, n in kinds.items())
    if len(kinds) > 1:
        return Finding("GPUs", WARNING, f"{said}: the slowest sets the pace", "ask for GPUs of one kind")
    return Finding("GPUs", OK, said)


def _memory(rows: list[dict[str, str]]) -> list[Finding]:
    taken, least = [], 1.0
    for row in rows:
        total, used = _number(row, "memory.total"), _number(row, "memory.used")
        if total is None or used is None or not total:
            continue
        share = 1 - used / total
        least = min(least, share)
        if share < FREE:
            taken.append(f"GPU {row.get('index')} {used / 1024:.1f} of {total / 1024:.0f} GiB used")
    if taken:
        return [Finding("GPU memory", WARNING, "; ".join(taken), "see nvidia-smi for whose process it is, and end it")]
    return [Finding("GPU memory", OK, f"at least {least:.0%} free")]


def _ecc(rows: list[dict[str, str]]) -> list[Finding]:
    found = []
    for row in rows:
        which = f"GPU {row.get('index')}"
        if (n := _number(row, "ecc.errors.uncorrected.volatile.total") or 0) > 0:
            cure = "reset the GPU (nvidia-smi -r) or reboot; drain the node if it comes again"
            found.append(
                Finding("ECC", FAILURE, f"{which}: {n:.0f} uncorrected memory errors since the driver started", cure)
            )
        elif (n := _number(row, "ecc.errors.uncorrected.aggregate.total") or 0) > 0:
            cure = "watch it: run megastar doctor again after the next job"
            found.append(Finding("ECC", WARNING, f"{which}: {n:.0f} uncorrected memory errors in its life", cure))
        if (n := _number(row, "ecc.errors.corrected.volatile.total") or 0) > CORRECTED:
            found.append(Finding("ECC", WARNING, f"{which}: {n:.0f} corrected memory errors", "have the GPU looked at"))
        if row.get("retired_pages.pending", "No").lower() == "yes":
            found.append(Finding("ECC", WARNING, f"{which}: memory pages wait to be retired", "reboot the node"))
    if found:
        return found
    modes = {row.get("ecc.mode.current", "none") for row in rows}
    if modes == {"none"}:
        return [Finding("ECC", OK, "these GPUs have none")]
    if "Disabled" in modes:
        return [Finding("ECC", WARNING, "switched off: memory errors pass unseen", "nvidia-smi -e 1, then reboot")]
    return [Finding("ECC", OK, "on, no errors")]


def _heat(rows: list[dict[str, str]]) -> list[Finding]:
    found = []
    for row in rows:
        if row.get("clocks_throttle_reasons.hw_slowdown") == "Active":
            found.append(f"GPU {row.get('index')} is throttled by its hardware")
        if (degrees := _number(row, "temperature.gpu") or 0) >= HOT:
            found.append(f"GPU {row.get('index')} has {degrees:.0f} degrees")
    if found:
        return [Finding("GPU clocks", WARNING, "; ".join(found), "check cooling and power of the node")]
    return [Finding("GPU clocks", OK, "not throttled")]


def _number(row: dict[str, str], name: str) -> float | None:
    try:
        return float(row[name])
    except (KeyError, ValueError):
        return None
