"""What a process tells of itself when it starts a run: for whoever reads events.jsonl later."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megastar.version import __version__

PACKAGES = ("torch", "deepspeed", "triton", "flash-attn", "liger-kernel", "numpy")


def process_environment(device: torch.device) -> dict[str, Any]:
    """``command``, ``packages`` (name -> version, of those that are installed) and ``device`` in words."""
    found = {"megastar": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"command": " ".join(["megastar", *sys.argv[1:]]), "packages": found, "device": name}
