"""Attention by Dao-AILab's flash-attn: 2 and 3 for plain causal, 4 (CuTe) for column intervals too.

Each import is checked for the function that is called: a folder or a half-removed package named ``flash_attn`` imports
as an empty namespace.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.model.masks import MaskSpec


class Interface(NamedTuple):
    generation: int
    function: Callable[..., Any]
    masks: bool  # whether it accepts a mask function that reads tensors
    deterministic: bool = False  # whether its backward pass can be


# generation -> (module, lowest and highest compute capability), preferred first. 3 is installed from the source of
# flash-attention's hopper folder, 4 by pip install flash-attn-4, 2 by pip install flash-attn.
MODULES = {
    3: ("flash_attn_interface", (9, 0), (9, 9)),
    4: ("flash_attn.cute", (9, 0), (11, 9)),
    2: ("flash_attn", (8, 0), (12, 9)),
}


@functools.cache
def interfaces() -> tuple[Interface, ...]:
    """The generations that can be imported and have ``flash_attn_func``, preferred first. Needs no GPU."""
    found = []
    for generation, (module, _, _) in MODULES.items():
        try:
            function = importlib.import_module(module).flash_attn_func
            names = set(inspect.signature(function).parameters)
        except Exception:  # missing, not callable, or built for another torch: it is not usable
            continue
        found.append(Interface(generation, function, {"mask_mod", "aux_tensors"} <= names, "deterministic" in names))
    return tuple(found)


@functools.cache
def missing() -> str | None:
    if interfaces():
        return None
    try:
        importlib.import_module("flash_attn")
        if importlib.util.find_spec("flash_attn.cute") is not None:
            importlib.import_module("flash_attn.cute")
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != "flash_attn":
            package = "nvidia-cutlass-dsl" if error.name.partition(".")[0] == "cutlass" else error.name
            return f"flash-attn-4 needs the module {error.name}, which is missing: pip install {package}"
        return "flash-attn cannot be imported: pip install flash-attn-4 (Hopper and later) or flash-attn"
    except Exception as error:
        why = f"({type(error).__name__}: {error})"
        return f"flash-attn cannot be imported {why}: pip install flash-attn-4 (Hopper and later) or flash-attn"
    return (
        "the installed package flash_attn has no flash_attn_func: remove it, then "
        "pip install flash-attn-4 (Hopper and later) or flash-attn"
    )


def supports(spec: MaskSpec, dtype: torch.dtype, head_dim: int, device: torch.device, grad: bool) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA GPUs, not on {device.type}: use sdpa there"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bf16 and fp16, not {dtype}: use train.dtype=bf16, or sdpa"
    if head_dim > 128:
        return f"head dimension {head_dim} is above 128: use sdpa"
    interface = _interface_for(spec, device)
    if interface is not None and grad and torch.are_deterministic_algorithms_enabled() and not interface.deterministic:
        return (
            "the installed flash-attn has no deterministic backward pass, which train.deterministic requires: use sdpa"
        )
    if interface is None:
        if spec.is_plain_causal:
            return "no installed flash-attn supports this GPU's generation: use sdpa"
        return f"no installed flash-attn supports the mask ({spec.kind}): use triton, flex or sdpa"
    return None


def _interface_for(spec: MaskSpec, device: torch.device) -> Interface | None:
    capability = torch.cuda.get_device_capability(device)
    for interface in interfaces():
        _, low, high = MODULES[interface.generation]
        if low <= capability <= high and (spec.is_plain_causal or (interface.masks and spec.window is None)):
            return interface
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> Tensor:
    """As ``sdpa.attention``, with S = L."""
    return attend(q, k, v, spec)


def form(spec: MaskSpec, like: Any) -> MaskSpec:
    return spec


@torch._disable_dynamo  # in a compiled block a graph break: version 4 compiles its kernels itself
def attend(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec) -> Tensor:
    d = q.shape[-1]
    interface = _interface_for(spec, q.device)
    assert interface is not None
    # flash-attn expects (B, S, H, d) with d a multiple of 8: zeros appended to q and k do not change the logits. The masked
    # backward pass of version 4 supports no head dimension between 96 and 128.
    pad = 128 - d if interface.generation == 4 and 96 < d < 128 and not spec.is_plain_causal else -d % 8
    if pad:  # F.pad copies even if there is nothing to append
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    options: dict[str, Any] = {"softmax_scale": d**-0.5}
    if interface.deterministic and torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    if spec.is_plain_causal:
        options["causal"] = True
    else:
        from megastar.model.kernels.flash_cute import visible

        start, end = intervals(spec, q.shape[0], q.shape[1], q.device)
        options |= {"mask_mod": visible, "aux_tensors": [start, end]}
    out = interface.function(q, k, v, **options)
    out = out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too
    return out.transpose(1, 2)[..., :d]


def intervals(spec: MaskSpec, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """start and end expanded to (B, S) int32 each."""

    def make() -> tuple[Tensor, Tensor]:
        at = spec.to(device)
        start = torch.arange(size, dtype=torch.int32, device=device)[None] if at.start is None else at.start
        end = torch.full((1, size), size, dtype=torch.int32, device=device) if at.end is None else at.end
        return start.expand(batch, size).contiguous(), end.expand(batch, size).contiguous()

    return spec.cached(("intervals", batch, size, device), make)
