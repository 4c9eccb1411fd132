"""GPUs according to nvidia-smi: driver, memory, ECC errors, clocks; and whether torch can use them."""

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
FREE = 0.9  # expected share of free memory
HOT = 90  # degrees Celsius
CORRECTED = 1000  # corrected memory errors since the driver was loaded


class NvidiaSmiError(Exception):
    """nvidia-smi fails; an empty text: there is none."""


def query(seconds: float = 30.0) -> str:
    """The CSV of nvidia-smi, without the fields that this version does not support. Raises ``NvidiaSmiError``."""
    if shutil.which("nvidia-smi") is None:
        raise NvidiaSmiError("")
    fields = list(FIELDS)
    while True:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NvidiaSmiError(f"nvidia-smi failed ({type(error).__name__})") from error
        if done.returncode == 0:
            return done.stdout
        output = " ".join((done.stdout + done.stderr).split())
        unknown = [f for f in fields if f'"{f}"' in output]
        if not unknown or len(fields) == 1:
            raise NvidiaSmiError(f"nvidia-smi failed with status {done.returncode} ({output[:200]})")
        fields = [f for f in fields if f not in unknown]


def parse_csv(text: str) -> list[dict[str, str]]:
    """One row per GPU, field name without unit -> value; fields that a GPU does not support are left out."""
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


def torch_info() -> dict[str, Any]:
    """What torch can use: {"cuda": its CUDA version or "", "count": GPUs, "rows": their names and memory as ``parse_csv``
    has them, "why": the first error}."""
    import torch

    found: dict[str, Any] = {"cuda": str(torch.version.cuda or ""), "count": 0, "rows": [], "why": ""}
    if torch.version.cuda:
        try:
            torch.cuda.init()
            found["count"] = torch.cuda.device_count()
            gpus = [torch.cuda.get_device_properties(i) for i in range(found["count"])]
            found["rows"] = [{"name": g.name, "memory.total": str(g.total_memory / 2**20)} for g in gpus]
        except Exception as error:
            found["why"] = " ".join(str(error).split())[:200]
    return found


def merge_rows(ranks: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """The rows of a node's ranks, each of which may see only its own GPU, without duplicates."""
    by_id: dict[str, dict[str, str]] = {}
    for row in (row for rows in ranks for row in rows):
        by_id.setdefault(row.get("uuid", row.get("index", "")), row)
    return list(by_id.values())


def findings(rows: list[dict[str, str]], torch: dict[str, Any], problem: str = "") -> list[Finding]:
    """The findings about a node's GPUs. ``torch``: of ``torch_info``; ``problem``: why nvidia-smi failed."""
    if problem:
        return [Finding("driver", FAILURE, problem, "reload the NVIDIA driver, or reboot the node")]
    if not rows:
        if os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS"):
            return [Finding("GPUs", FAILURE, "SLURM allocated GPUs, nvidia-smi lists none", "drain the node")]
        if torch.get("count"):
            text = f"{_models(torch['rows']).finding}, according to torch: nvidia-smi lists none or is not installed"
            remedy = "install nvidia-smi, without which driver, memory errors and clocks are not checked"
            return [Finding("GPUs", WARNING, text, remedy)]
        return [Finding("GPUs", OK, "none: training uses the CPU (gloo)")]
    return [_driver(rows, torch), _models(rows), _memory(rows), *_ecc(rows), _clocks(rows)]


def _driver(rows: list[dict[str, str]], torch: dict[str, Any]) -> Finding:
    driver = rows[0].get("driver_version", "unknown")
    if not torch["cuda"]:
        remedy = "install a CUDA build of torch: pip install torch --index-url of the CUDA version, see pytorch.org"
        return Finding("driver", FAILURE, f"{driver}; torch is a CPU build and cannot use the GPUs", remedy)
    if not torch["count"]:
        hidden = "CUDA_VISIBLE_DEVICES hides them" if os.environ.get("CUDA_VISIBLE_DEVICES") else "unknown reason"
        text = f"{driver}; torch (CUDA {torch['cuda']}) sees no GPU ({torch['why'] or hidden})"
        remedy = "update the driver, or install torch for an older CUDA; check CUDA_VISIBLE_DEVICES"
        return Finding("driver", FAILURE, text, remedy)
    return Finding("driver", OK, f"{driver}; torch uses CUDA {torch['cuda']}")


def _models(rows: list[dict[str, str]]) -> Finding:
    models: dict[str, int] = {}
    for row in rows:
        memory = _number(row, "memory.total")
        name = row.get("name", "GPU") + (f" ({memory / 1024:.0f} GiB)" if memory else "")
        models[name] = models.get(name, 0) + 1
    text = ", ".join(f"{n} x {name}" for name, n in models.items())
    if len(models) > 1:
        return Finding("GPUs", WARNING, f"{text}: the slowest one limits the throughput", "request GPUs of one model")
    return Finding("GPUs", OK, text)


def _memory(rows: list[dict[str, str]]) -> Finding:
    used_gpus, least = [], 1.0
    for row in rows:
        total, used = _number(row, "memory.total"), _number(row, "memory.used")
        if total is None or used is None or not total:
            continue
        share = 1 - used / total
        least = min(least, share)
        if share < FREE:
            used_gpus.append(f"GPU {row.get('index')} {used / 1024:.1f} of {total / 1024:.0f} GiB used")
    if used_gpus:
        return Finding("GPU memory", WARNING, "; ".join(used_gpus), "find the process with nvidia-smi, and end it")
    return Finding("GPU memory", OK, f"at least {least:.0%} free")


def _ecc(rows: list[dict[str, str]]) -> list[Finding]:
    found = []
    for row in rows:
        which = f"GPU {row.get('index')}"
        if (n := _number(row, "ecc.errors.uncorrected.volatile.total") or 0) > 0:
            text = f"{which}: {n:.0f} uncorrected memory errors since the driver was loaded"
            remedy = "reset the GPU (nvidia-smi -r) or reboot; drain the node if it happens again"
            found.append(Finding("ECC", FAILURE, text, remedy))
        elif (n := _number(row, "ecc.errors.uncorrected.aggregate.total") or 0) > 0:
            text = f"{which}: {n:.0f} uncorrected memory errors over its lifetime"
            found.append(Finding("ECC", WARNING, text, "run megastar doctor again after the next job"))
        if (n := _number(row, "ecc.errors.corrected.volatile.total") or 0) > CORRECTED:
            found.append(Finding("ECC", WARNING, f"{which}: {n:.0f} corrected memory errors", "have the GPU tested"))
        if row.get("retired_pages.pending", "No").lower() == "yes":
            found.append(Finding("ECC", WARNING, f"{which}: memory pages pending retirement", "reboot the node"))
    if found:
        return found
    modes = {row.get("ecc.mode.current", "none") for row in rows}
    if modes == {"none"}:
        return [Finding("ECC", OK, "not supported by these GPUs")]
    if "Disabled" in modes:
        return [Finding("ECC", WARNING, "disabled: memory errors are not detected", "nvidia-smi -e 1, then reboot")]
    return [Finding("ECC", OK, "enabled, no errors")]


def _clocks(rows: list[dict[str, str]]) -> Finding:
    found = []
    for row in rows:
        if row.get("clocks_throttle_reasons.hw_slowdown") == "Active":
            found.append(f"GPU {row.get('index')} is throttled (hardware slowdown)")
        if (degrees := _number(row, "temperature.gpu") or 0) >= HOT:
            found.append(f"GPU {row.get('index')} is at {degrees:.0f} degrees C")
    if found:
        return Finding("GPU clocks", WARNING, "; ".join(found), "check cooling and power of the node")
    return Finding("GPU clocks", OK, "not throttled")


def _number(row: dict[str, str], name: str) -> float | None:
    try:
        return float(row[name])
    except (KeyError, ValueError):
        return None
