"""Which device and which precision a command uses. The one place that asks the hardware."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from megastar.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first GPU, else the CPU. Raises ``UserError`` for a device this machine lacks.

    A GPU with a number becomes torch's current one: CUDA graphs, events and Triton's kernels go there, not to the first.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here; use cpu or auto")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 here: Ampere and later, or a CPU with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the hardware has it, else fp32. Raises ``UserError`` for an unknown name."""
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """Whether oneDNN beats MKL in fp32 products on this CPU: AMD with AVX-512 (207 against 93 GFLOP/s a core on Zen 5).

    oneDNN is called by an operator of torch's compiler, which is no public one: it must be there and right.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
            return False
        a, b = torch.ones(3, 5), torch.arange(10.0).view(2, 5)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), a @ b.t())
    except (OSError, AttributeError, RuntimeError, TypeError):
        return False
