"""The environment of a process, recorded in events.jsonl when it starts a run."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megastar.utils.redact import redact
from megastar.version import __version__

PACKAGES = ("torch", "deepspeed", "triton", "flash-attn", "liger-kernel", "numpy")


def command_line() -> str:
    return redact(" ".join(["megastar", *sys.argv[1:]]))


def process_environment(device: torch.device) -> dict[str, Any]:
    """``command``, ``packages`` (name -> version of the installed ones) and ``device`` (its name)."""
    packages = {"megastar": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"command": command_line(), "packages": packages, "device": name}
