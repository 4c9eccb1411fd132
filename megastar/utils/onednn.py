"""CPU-only fast paths behind one switch: fp32 matrix products by oneDNN, and dropout.

R rows, K inner dimension, N columns. torch uses MKL for fp32 products, which on some processors with AVX-512 uses half the
vector width; oneDNN, which torch includes for other types, uses all of it. Both sum in fp32, in different orders, so which one
is used is measured once per processor and torch release and then read from a file: a run that resumes computes the same
bits. torch's dropout draws one number per element on one thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.errors import UserError
from megastar.utils.json_file import ANY, dict_of, read_json, text, validator

logger = logging.getLogger(__name__)

LEAST = 1 << 22  # multiplications below which the overhead of oneDNN exceeds its gain
GAIN = 1.1  # MKL's time divided by oneDNN's, above which oneDNN is used
SHAPES = ((1024, 768, 2048), (1024, 2048, 768), (2048, 1024, 768))  # (R, K, N) of the products of a block of B
_RECORD = validator(dict_of(text(100), ANY))
_enabled = True
_linear = F.linear  # ZeRO stage 3 replaces F.linear by a function that a compiler compiles anew for each weight


def set_enabled(value: bool) -> None:
    """Whether the functions below use the fast paths (default) or torch's own implementations."""
    global _enabled
    _enabled = value


def enabled(x: Tensor) -> bool:
    """Whether fast paths apply to ``x``."""
    return _enabled and x.device.type == "cpu"


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training. On a CPU each element uses 16 random bits.

    There the probability is p to within 1/131072, and the scale is exact for the rounded probability.
    """
    if not enabled(x):
        return F.dropout(x, p, True)
    n, dropped = x.numel(), round(p * 65536)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = (bits[:n] >= dropped - 32768).view(x.shape)
    return x * (keep.to(x.dtype) * (65536 / (65536 - dropped)))


def uses_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether ``product(a, b)`` is oneDNN's."""
    return a.dtype == torch.float32 and enabled(a) and a.shape[0] * b.numel() >= LEAST and mkl_is_slow()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: (R, K), (N, K) -> (R, N), any strides."""
    if uses_onednn(a, b):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return out
    return a @ b.t()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` without a bias, with its gradients: x (..., K), weight (N, K) -> (..., N)."""
    if torch.compiler.is_compiling():
        return _linear(x, weight)
    slow = x.dtype == torch.float32 and enabled(x) and mkl_is_slow()
    if slow and x.numel() * weight.shape[0] >= LEAST:
        out: Tensor = _Linear.apply(x, weight)
        return out
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g = gradients[0].flatten(0, -2)  # (R, N)
        to_x = product(g, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        to_weight = product(g.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """Whether oneDNN is faster than MKL in fp32 products on this CPU (207 against 93 GFLOP/s per core on Zen 5).

    ``MEGASTAR_FP32_PRODUCT`` = mkl or onednn decides; otherwise a measurement of half a second on the first use, which
    is kept in the user's cache folder. oneDNN is called through a private operator of torch's compiler, so its presence
    and result are checked. Raises ``UserError`` for another value of the variable.
    """
    asked = os.environ.get("MEGASTAR_FP32_PRODUCT", "")
    if asked not in ("", "mkl", "onednn"):
        raise UserError(f"MEGASTAR_FP32_PRODUCT={asked!r}: use mkl or onednn, or unset it to use the faster one")
    if asked == "mkl" or torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_onednn():
        return False
    return asked == "onednn" or recorded_gain() >= GAIN


def has_onednn() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        a, b = torch.ones(3, 5), torch.arange(10.0).view(2, 5)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""), a @ b.t())
    except (AttributeError, RuntimeError, TypeError):
        return False


def recorded_gain() -> float:
    """MKL's time divided by oneDNN's, as first measured for this processor model and torch release.

    Of processes that measure at once, all use the record that is written first.
    """
    cpu = processor_model()
    key = hashlib.sha256(f"{cpu} {torch.__version__}".encode()).hexdigest()[:12]
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megastar" / f"fp32-product-{key}.json"
    for _ in range(2):
        try:
            return float(read_json(path, _RECORD)["onednn_gain"])
        except FileNotFoundError:
            pass
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            if path.exists():
                logger.warning(
                    "cannot read %s (%s): MKL computes fp32 products; remove the file to measure again", path, error
                )
                return 0.0
        try:
            os.makedirs(path.parent, exist_ok=True)
        except OSError as error:
            return _unrecorded(path, error)
        try:
            record = {"processor": cpu, "torch": torch.__version__, "onednn_gain": measured_gain()}
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.link(file.name, path)  # not a replacement: the first record remains
        except FileExistsError:
            continue
        except OSError as error:
            return _unrecorded(path, error)
    return 0.0


def _unrecorded(path: Path, error: OSError) -> float:
    logger.warning("cannot record which fp32 product is faster in %s (%s): MKL is used", path.parent, error)
    return 0.0


def processor_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("vendor_id", "cpu family", "model", "model name")  # a virtual machine's model name may say little
    found = dict(line.split(":", 1) for line in lines[:40] if ":" in line)
    return " ".join(value.strip() for name, value in found.items() if name.strip() in names)


def measured_gain() -> float:
    """The least time of MKL divided by the least time of oneDNN, summed over ``SHAPES``; the two take turns."""
    least = [[float("inf")] * len(SHAPES) for _ in range(2)]
    for i, (rows, inner, columns) in enumerate(SHAPES):
        a, b = torch.full((rows, inner), 0.5), torch.full((columns, inner), 0.5)
        for _ in range(4):
            for times, name in zip(least, ("mkl", "onednn"), strict=True):
                start = time.perf_counter()
                a @ b.t() if name == "mkl" else torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
                times[i] = min(times[i], time.perf_counter() - start)
    return sum(least[0]) / sum(least[1])
