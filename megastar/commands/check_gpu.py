"""``megastar check-gpu``: check and time the attention kernels on this GPU, time training steps."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._common import Parser
from megastar.errors import UserError
from megastar.utils.files import write_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console

EXAMPLES = """
megastar check-gpu
megastar check-gpu --out h100.json --seconds 300
megastar check-gpu --tests
megastar check-gpu --device cpu
"""
SIZES = (256, 576, 1024)  # tokens of 256x256, 384x384 and 512x512 images
HEAD_DIMS = (64, 100, 128)  # B, L, XL, XXL: 64; 3B: 100
BATCH, HEADS = 16, 16
STEPS = (("b", 32), ("l", 32))  # size, images per step
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "liger-kernel", "apex", "deepspeed", "nvidia-cutlass-dsl")


def parser() -> Parser:
    p = Parser(
        "check-gpu",
        "Compare every attention backend with fp64, time it, time training steps, and write the table that "
        "attention.backend=auto reads. Takes less than 8 minutes, offline. Exit status 1 if a kernel is wrong.",
        EXAMPLES,
    )
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (comparison only)")
    p.add_argument("--out", default="check-gpu.json", help="JSON file for the report")
    p.add_argument("--seconds", type=float, default=450.0, help="start no measurement after this time")
    p.add_argument("--no-steps", action="store_true", help="skip the training steps")
    p.add_argument("--tests", action="store_true", help="run the tests marked gpu instead (needs a clone and pytest)")
    return p


def main(words: list[str]) -> int:
    import torch
    from rich.console import Console

    from megastar.utils.device import pick_device

    console, begun = Console(markup=False, highlight=False), time.perf_counter()
    args = parser().parse(words, console)

    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            "check-gpu needs a CUDA GPU and torch finds none: run it on a machine with a GPU, or use --device cpu "
            "to run only the comparison with fp64"
        )
    device = pick_device(args.device)
    if args.tests:
        return run_tests(device)

    def over(share: float = 1.0) -> bool:
        return bool(time.perf_counter() - begun > share * args.seconds)

    report: dict[str, Any] = {"device": describe(device), "packages": packages()}
    console.print(f"{report['device']['name']}, torch {torch.__version__}")
    show(console, "backends", [{"backend": k, "here": v or "yes"} for k, v in report["packages"]["backends"].items()])
    versions = report["packages"]["versions"]
    show(console, "versions", [{"package": k, "version": v or "not installed"} for k, v in versions.items()])
    report["compared"] = compared = list(comparison(console, device, over))
    wrong = [r for r in compared if r["ok"] is False]
    if device.type == "cuda":
        measure(console, device, report, args.no_steps, over)
    report["seconds"] = round(time.perf_counter() - begun, 1)
    write_json(Path(args.out), report)
    made = sum(r["ok"] is not None for r in compared)
    console.print(f"{made} comparisons, {len(wrong)} wrong, {report['seconds']} s; report: {args.out}")
    return 1 if wrong else 0


def run_tests(device: torch.device) -> int:
    """Run pytest -m gpu in a subprocess."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "gpu").is_dir():
        raise UserError(f"check-gpu --tests needs a clone of the repository: {root}/tests/gpu does not exist")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    return subprocess.run(command, cwd=root, env=os.environ | {"MEGASTAR_TEST_GPU": "1"}).returncode


# Environment ------------------------------------------------------------------------------------------------------
def describe(device: torch.device) -> dict[str, Any]:
    import torch

    from megastar.parallel.cost import peak_tflops

    if device.type != "cuda":
        return {"name": "cpu", "threads": torch.get_num_threads()}
    p = torch.cuda.get_device_properties(device)
    return {
        "name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}",
        "cuda": torch.version.cuda, "bf16_tflops": peak_tflops(p.name),
    }  # fmt: skip


def packages() -> dict[str, Any]:
    """Installed versions, and which backends can be imported."""
    from megastar.diagnosis.packages import has_nvidia_apex, version_of
    from megastar.model import fused
    from megastar.model.kernels import flash
    from megastar.model.kernels.check import backends

    return {
        "versions": {name: version_of(name) for name in PACKAGES},
        "backends": backends(),
        "flash_attn_generations": [one.generation for one in flash.interfaces()],
        "nvidia_apex": has_nvidia_apex(),
        "fused": {name: fused.library_function(name) is not None for name in fused.SOURCES},
    }


# Correctness ------------------------------------------------------------------------------------------------------------
def comparison(console: Console, device: torch.device, over: Any) -> list[dict[str, Any]]:
    """Every backend x pattern x head dimension in bf16 against fp64; on a CPU with small sizes, and in fp32 too."""
    import torch

    from megastar.model.kernels.check import compare
    from megastar.model.kernels.select import NAMES
    from megastar.model.masks import PATTERNS

    cuda = device.type == "cuda"
    batch, heads, size = (BATCH, HEADS, SIZES[0]) if cuda else (2, 2, 64)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32):
        for which in PATTERNS:
            for d in HEAD_DIMS:
                if over(0.45):
                    console.print(f"no time left: {which}, head dimension {d} not compared")
                    continue
                rows += compare(NAMES, device, dtype, [(batch, heads, size, d)], (which,))
    shown = []
    for row in rows:
        if row["ok"] is not None:
            case = {k: row[k] for k in ("backend", "pattern", "head_dim", "dtype")}
            case[""] = "correct" if row["ok"] else "WRONG"
            if "errors" in row:
                worst = max(e / a for e, a in zip(row["errors"].values(), row["allowed"], strict=True))
                case["error / allowed"] = f"{worst:.2f}"
            shown.append(case)
    show(console, "compared with fp64 (allowed: twice the error of sdpa in the same precision)", shown)
    for name, why in {(r["backend"], r["why"]) for r in rows if r["ok"] is None}:
        console.print(f"{name} skipped: {why}")
    for row in rows:
        if row["ok"] is False and "why" in row:
            console.print(f"{row['backend']}, {row['pattern']}, head dimension {row['head_dim']}: {row['why']}")
    return rows


# Speed ---------------------------------------------------------------------------------------------------------
def measure(console: Console, device: torch.device, report: dict[str, Any], no_steps: bool, over: Any) -> None:
    """Measure timings, recompilations and training steps (the last third of the time), and write the table."""
    import torch

    from megastar.model.kernels import table, timing

    bf16 = torch.bfloat16
    shapes = [(BATCH, HEADS, s, 64) for s in SIZES] + [(BATCH, HEADS, SIZES[0], d) for d in HEAD_DIMS[1:]]
    report["timed"] = timed = list(timing.timings(device, bf16, shapes, over=lambda: over(0.65)))
    rows = [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in timed]
    show(console, f"ms forward and backward, B {BATCH}, H {HEADS}; ratio to {timing.PEER}", rows)
    report["recompiles"] = {}
    for name in ("flex", "triton"):
        correct = any(r["ok"] and r["backend"] == name and r["pattern"] == "hidden" for r in report["compared"])
        if correct and not over(0.7):
            report["recompiles"][name] = timing.recompiles(name, shapes[0], device)
    console.print(f"recompiles over 20 fresh masks: {report['recompiles']}")
    choices = timing.fastest(report["compared"], timed)
    if choices:
        path = table.table_path(device)
        write_json(path, {"device": report["device"], "torch": torch.__version__, "fastest": choices})
        table.read_table.cache_clear()
        report["table"] = {"path": str(path), "fastest": choices}
        console.print(f"attention.backend=auto uses {json.dumps(choices)} (from {path})")
    if not no_steps:
        report["steps"] = steps(console, device, report["device"]["bf16_tflops"], over)


def steps(console: Console, device: torch.device, peak: float | None, over: Any) -> list[dict[str, Any]]:
    """Training steps of AR and ST-AR, sizes B and L, in bf16 on random codes, one process."""
    import torch

    from megastar.config.load import load_config
    from megastar.engine.step_benchmark import step_speed
    from megastar.engine.zero.setup import start

    rows: list[dict[str, Any]] = []
    for size, images in STEPS:
        for method in ("ar", "star"):
            case: dict[str, Any] = {"model": size, "method": method}
            if over():
                rows.append(case | {"why": "skipped: no time left"})
                continue
            file = f"configs/run/{method}_{size}_50ep.yaml"
            cfg = load_config(file, ["data.shards=none", "data.val_shards=", "data.tokenizer="])
            os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed places the student by it
            ctx = dataclasses.replace(start(cfg), device=device)
            while images:
                try:
                    rows.append(case | step_speed(cfg, ctx, images, peak_tflops=peak))
                    break
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    images //= 2
            else:
                rows.append(case | {"why": "out of memory with one image"})
    shown = []
    for row in rows:
        flat = {k: v for k, v in row.items() if k not in ("mfu_parts", "loss")}
        flat |= {f"mfu {k}": v for k, v in (row.get("mfu_parts") or {}).items()}
        shown.append({k: round(v, 4) if isinstance(v, float) else v for k, v in flat.items()})
    show(console, "training steps, one process", shown)
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in columns))
    if rows:
        console.print(table)
