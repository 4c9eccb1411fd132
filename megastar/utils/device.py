"""Device and precision selection."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megastar.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the first GPU, else the CPU. Raises ``UserError`` for a device that does not exist.

    A GPU with an index becomes torch's current device, which CUDA graphs, events and Triton kernels use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs; use cpu or auto")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 here: Ampere and later, or a CPU with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where the hardware has it, else fp32. Raises ``UserError`` for an unknown name, or bf16 on a GPU
    without it."""
    if name == "auto":
        name = "bf16" if has_bf16(device) else "fp32"
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}")
    if name == "bf16" and device.type == "cuda" and not has_bf16(device):
        gpu = torch.cuda.get_device_properties(device)
        raise UserError(
            f"dtype bf16: {gpu.name} (compute capability {gpu.major}.{gpu.minor}) lacks it; use fp32 or auto"
        )
    return DTYPES[name]


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the C library keep freed memory of this process for its next allocations; False where it is not glibc.

    glibc returns each tensor above 32 MiB to the system when it is freed, and the system clears the pages of the next one:
    about 90,000 page faults in a CPU step of 68 M parameters. The process keeps its peak memory, which every step needs.
    ``keep=False``: the values that glibc itself arrives at after it has freed such tensors.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of malloc.h
    if keep:
        return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
    return bool(mallopt(mmap_max, 65536) and mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 64 << 20))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; a copy to a GPU is made from pinned memory, and the host does not wait for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class _Tf32:
    """cuDNN's setting of this process, and how many threads need it off."""

    lock = threading.Lock()
    users, before = 0, True


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions on a GPU without TF32, as on a CPU. The setting is restored once no thread is in such a block:
    ``torch.backends.cudnn.flags`` would restore it for all when the first one leaves."""
    with _Tf32.lock:
        if _Tf32.users == 0:
            _Tf32.before = torch.backends.cudnn.allow_tf32
            torch.backends.cudnn.allow_tf32 = False
        _Tf32.users += 1
    try:
        yield
    finally:
        with _Tf32.lock:
            _Tf32.users -= 1
            if _Tf32.users == 0:
                torch.backends.cudnn.allow_tf32 = _Tf32.before


def pinned_buffer(elements: int) -> Tensor:
    """(elements,) fp32 in host memory that a GPU copies into without the host waiting; not initialized.

    ``torch.empty(pin_memory=True)`` would take up to twice as much: it rounds up to a power of two. Where CUDA cannot pin
    so much, the memory is not pinned: copies are slower, and right.
    """
    buffer = torch.empty(elements, dtype=torch.float32)
    cudart = torch.cuda.cudart()
    portable = 1  # cudaHostRegisterPortable: for all contexts
    if elements and int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, portable)) == 0:
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer
