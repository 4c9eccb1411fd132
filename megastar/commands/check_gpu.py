"""``megastar check-gpu``: check and time the attention kernels on this GPU, time training steps."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._shared.common import Parser, bounded
from megastar.commands._shared.outputs import check_outputs
from megastar.errors import UserError
from megastar.utils.files import write_json
from megastar.utils.printable import say

if TYPE_CHECKING:
    import torch

EXAMPLES = """
megastar check-gpu
megastar check-gpu --out h100.json --seconds 300
megastar check-gpu --tests
megastar check-gpu --device cpu
"""
SIZES = (256, 576, 1024)  # tokens of 256x256, 384x384 and 512x512 images
HEAD_DIMS = (64, 100, 128)  # B, L, XL, XXL: 64; 3B: 100
BATCH, HEADS = 16, 16
STEPS = [(images, size, method) for images in (128, 64, 32) for size in ("b", "l", "xl") for method in ("ar", "star")]
WORKERS = 8  # processes of --tests
PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "liger-kernel", "apex", "deepspeed", "nvidia-cutlass-dsl")


def parser() -> Parser:
    p = Parser(
        "check-gpu",
        "Compare every attention backend with fp64, time it, time training steps, and write the table that "
        "attention.backend=auto reads. Takes less than 8 minutes, offline. Prints a line for each result and updates the "
        "report after it. Exit status 1 if a kernel is wrong or a measurement fails.",
        EXAMPLES,
    )
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (comparison only)")
    p.add_argument("--out", default="check-gpu.json", help="JSON file for the report")
    p.add_argument(
        "--seconds",
        type=bounded(float, 0, 86400),
        help="start no measurement after this time (default 450); limit of --tests (default 570)",
    )
    p.add_argument("--no-steps", action="store_true", help="skip the training steps")
    p.add_argument("--tests", action="store_true", help="run the tests marked gpu instead (needs a clone and pytest)")
    return p


def main(words: list[str]) -> int:
    from megastar.utils.console import PlainConsole

    begun = time.perf_counter()
    args = parser().parse(words, PlainConsole())
    if not args.tests:
        check_outputs({"--out": Path(args.out)})
    import torch

    from megastar.utils.device import pick_device

    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            "check-gpu needs a CUDA GPU and torch finds none: run it on a machine with a GPU, or use --device cpu "
            "to run only the comparison with fp64"
        )
    device = pick_device(args.device)
    if args.tests:
        return run_tests(args.seconds or 570.0)
    limit = 450.0 if args.seconds is None else args.seconds

    def over(share: float = 1.0) -> bool:
        return time.perf_counter() - begun > share * limit

    report = GpuReport(Path(args.out))
    report.set("device", describe(device))
    report.set("packages", packages())
    say(f"{report.content['device']['name']}, torch {torch.__version__}")
    say(
        "versions: "
        + ", ".join(f"{k} {v or 'not installed'}" for k, v in report.content["packages"]["versions"].items())
    )
    compare_backends(report, device, over)
    if device.type == "cuda":
        time_backends(report, device, over)
        if not args.no_steps:
            time_steps(report, device, over)
    report.set("seconds", round(time.perf_counter() - begun, 1))
    made = [r for r in report.content["compared"] if r["ok"] is not None]
    wrong = sum(not r["ok"] for r in made)
    for name in report.content["failures"]:
        say(f"failed: {name}")
    say(f"{len(made)} comparisons, {wrong} wrong, {report.content['seconds']} s; report: {args.out}")
    return 1 if wrong or report.content["failures"] else 0


class GpuReport:
    """The JSON file, complete after each row."""

    def __init__(self, path: Path):
        self.path, self.content = path, {"failures": [], "compared": []}  # type: tuple[Path, dict[str, Any]]
        write_json(path, self.content)

    def set(self, key: str, value: Any) -> None:
        self.content[key] = value
        write_json(self.path, _json_numbers(self.content))

    def add(self, key: str, row: dict[str, Any], line: str, failed: bool = False) -> None:
        """A row of the list ``key``, and its line."""
        say(line)
        if failed:
            self.content["failures"].append(line)
        self.set(key, [*self.content.get(key, []), row])


def _json_numbers(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become strings."""
    if isinstance(value, dict):
        return {k: _json_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_json_numbers(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def guarded(rows: Iterable[dict[str, Any]], case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``rows`` up to their end, or up to an error, which becomes a row: one failure does not hide other results."""
    try:
        yield from rows
    except Exception as error:
        yield case | {"why": reason(error), "failed": True}


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run_tests(seconds: float) -> int:
    """Run pytest -m gpu in a subprocess, with several processes if pytest-xdist is installed, for at most ``seconds``."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests" / "gpu").is_dir():
        raise UserError(f"check-gpu --tests needs a clone of the repository: {root}/tests/gpu does not exist")
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "tests/gpu"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    else:
        say("one process: install pytest-xdist to run the tests in several")
    tests = subprocess.Popen(command, cwd=root, env=os.environ | {"MEGASTAR_TEST_GPU": "1"}, start_new_session=True)
    try:
        return tests.wait(seconds)
    except subprocess.TimeoutExpired:
        say(f"the tests did not end in {seconds:g} s: install pytest-xdist, or give more --seconds")
        return 1
    finally:
        if tests.poll() is None:
            os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()


# Environment ------------------------------------------------------------------------------------------------------
def describe(device: torch.device) -> dict[str, Any]:
    import torch

    from megastar.parallel.gpus import peak_tflops

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
def compare_backends(report: GpuReport, device: torch.device, over: Callable[[float], bool]) -> None:
    """Every backend x pattern x head dimension in bf16 against fp64; on a CPU with small sizes, and in fp32 too."""
    import torch

    from megastar.model.kernels.check import compare
    from megastar.model.kernels.select import NAMES
    from megastar.model.masks import PATTERNS

    cuda, skipped = device.type == "cuda", set()
    batch, heads, size = (BATCH, HEADS, SIZES[0]) if cuda else (2, 2, 64)
    say("compared with fp64 (allowed: twice the error of sdpa in the same precision)")
    for dtype in (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32):
        for which in PATTERNS:
            for d in HEAD_DIMS:
                if over(0.45):
                    say(f"no time left: {which}, head dimension {d} not compared")
                    continue
                precision = str(dtype).removeprefix("torch.")
                case = {
                    "backend": "all",
                    "pattern": which,
                    "size": size,
                    "head_dim": d,
                    "dtype": precision,
                    "ok": False,
                }
                for row in guarded(compare(NAMES, device, dtype, [(batch, heads, size, d)], (which,)), case):
                    name = f"{row['backend']}, {which}, head dimension {d}, {precision}"
                    if row["ok"] is None:  # one line for each reason
                        line = f"{row['backend']} skipped: {row['why']}"
                        report.set("compared", [*report.content["compared"], row])
                        if line not in skipped:
                            say(line)
                        skipped.add(line)
                    else:
                        report.add("compared", row, f"{name}: {verdict(row)}", failed="why" in row)


def verdict(row: dict[str, Any]) -> str:
    if "why" in row:
        return f"WRONG, {row['why']}"
    pairs = zip(row["errors"].values(), row["allowed"], strict=True)
    worst = max((e / a if a else math.inf if e else 0.0) for e, a in pairs)
    return f"{'correct' if row['ok'] else 'WRONG'}, error / allowed {worst:.2f}"


# Speed ---------------------------------------------------------------------------------------------------------
def time_backends(report: GpuReport, device: torch.device, over: Callable[[float], bool]) -> None:
    """Timings and recompilations, and the table of the fastest backends; the last third of the time is for steps."""
    import torch

    from megastar.model.kernels import table, timing

    shapes = [(BATCH, HEADS, s, 64) for s in SIZES] + [(BATCH, HEADS, SIZES[0], d) for d in HEAD_DIMS[1:]]
    say(f"ms forward and backward in bf16, {BATCH} sequences, {HEADS} heads; ratio to {timing.PEER}")
    report.set("timed", [])
    for shape in shapes:
        rows = timing.timings(device, torch.bfloat16, [shape], over=lambda: over(0.65))
        for row in guarded(rows, {"backend": "all", "pattern": "all", "size": shape[2], "head_dim": shape[3]}):
            result = f"{row['ms']:.3f} ms, ratio {row['ratio']:.2f}" if "ms" in row else row["why"]
            name = f"{row['backend']}, {row['pattern']}, {row['size']} positions, head dimension {row['head_dim']}"
            report.add("timed", row, f"{name}: {result}", failed=row.get("why", timing.SKIPPED) != timing.SKIPPED)
    for name in ("flex", "triton"):
        right = any(r["ok"] and r["backend"] == name and r["pattern"] == "hidden" for r in report.content["compared"])
        if right and not over(0.7):
            counts = ({"count": timing.recompiles(name, shapes[0], device)} for _ in range(1))
            (row,) = guarded(counts, {})
            line = f"{name}: recompilations over 20 new masks: {row.get('count', row.get('why'))}"
            report.add("recompiles", {"backend": name} | row, line, failed="why" in row)
    choices = timing.fastest(report.content["compared"], report.content["timed"])
    if choices:
        path = table.table_path(device)
        try:
            content = {"device": report.content["device"], "torch": torch.__version__, "fastest": choices}
            write_json(path, content)
        except OSError as error:
            report.add("table", {}, f"the table {path} cannot be written: {reason(error)}", failed=True)
            return
        table.read_table.cache_clear()
        report.set("table", {"path": str(path), "fastest": choices})
        say(f"attention.backend=auto uses {json.dumps(choices)} (from {path})")


def time_steps(report: GpuReport, device: torch.device, over: Callable[[], bool]) -> None:
    """Training steps of AR and ST-AR in bf16 on random codes, one process: the largest batches first."""
    import torch

    from megastar.config.load import load_config
    from megastar.engine.memory_check import planned_bytes
    from megastar.engine.step_benchmark import step_speed
    from megastar.engine.zero.process_group import start

    peak = report.content["device"]["bf16_tflops"]
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed places the student by it
    say("training steps, one process")

    def measured(images: int, size: str, method: str) -> Iterator[dict[str, Any]]:
        file = f"configs/run/{method}_{size}_50ep.yaml"
        words = ["data.shards=none", "data.val_shards=", "data.tokenizer=", f"train.global_batch={images}"]
        cfg = load_config(file, words)
        case["plan_gib"] = planned_bytes(cfg, 1, "bf16")[1] / 2**30
        try:
            row = step_speed(cfg, dataclasses.replace(start(cfg), device=device), images, peak_tflops=peak)
        except torch.OutOfMemoryError:
            row = {"why": "out of memory"}
        else:
            cfg.train.compile = "on" if row["compiled"] else "off"
            case["plan_gib"] = planned_bytes(cfg, 1, "bf16")[1] / 2**30
        yield case | row

    for images, size, method in STEPS:
        case: dict[str, Any] = {"model": size, "method": method, "images": images}
        name = f"{method} {size}, {images} images"
        if over():
            report.add("steps", case | {"why": "no time left"}, f"{name}: no time left")
            continue
        for row in guarded(measured(images, size, method), case):
            row = case | row  # the plan, also of a row that failed
            line = row.get("why", "")
            if "step_s" in row:
                parts = ", ".join(f"{k} {v:.1%}" for k, v in (row["mfu_parts"] or {}).items())
                share = f", MFU {row['mfu']:.1%} ({parts})" if row["mfu"] else ""
                line = (
                    f"{row['step_s']:.3f} s, {row['images_per_s']:.1f} images/s{share}, peak {row['peak_gib']:.1f} GiB"
                )
            plan = f", planned {row['plan_gib']:.1f} GiB" if "plan_gib" in row else ""
            report.add("steps", row, f"{name}: {line}{plan}", failed="failed" in row)
        torch.cuda.empty_cache()
