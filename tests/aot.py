"""Compile the Triton kernels for a GPU that is not here, and read what the assembler says about registers.

python tests/aot.py 90 64 bf16 hidden 576        one line of JSON a kernel
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megastar.model.kernels import triton as ours
from megastar.model.kernels import triton_jit as jit
from megastar.model.kernels import triton_rope as rope
from megastar.model.masks import MaskSpec

KERNELS: dict[str, Any] = {"forward": jit.forward, "delta": jit.delta, "dq": jit.backward_dq, "dkv": jit.backward_dkv}
ROPE = {"rope": rope.rotate, "rope_backward": rope.rotate}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {"L": "*fp32", "TABLE": "*fp32", "Delta": "*fp32", "scale": "fp32", "natural": "fp32"}
INTS = {"start", "end", "full", "visited", "order"}
HEADS = 32


def strides(size: int, d: int) -> dict[str, int]:
    """As in the network: q, k and their gradients heads first; v a view into the fused qkv; the others positions first."""
    heads_first = (HEADS * size * d, size * d, d)
    fused, positions_first = (size * 3 * HEADS * d, d, 3 * HEADS * d), (size * HEADS * d, d, HEADS * d)
    named = dict.fromkeys("qkd", heads_first) | {"v": fused} | dict.fromkeys("oge", positions_first)
    return {f"s{t}{axis}": n for t, row in named.items() for axis, n in zip("bhi", row, strict=True)} | {
        f"s{t}j": named[t][2] for t in "kv"
    }


def resources(kernel: str, arch: int, head_dim: int, dtype: str, spec: MaskSpec, size: int) -> dict[str, int]:
    """{"registers", "spilled" (bytes a thread), "shared" (bytes)} of a kernel as it would be launched."""
    config = ours.configs(head_dim, DTYPES[dtype], size)["forward" if kernel == "delta" else kernel]
    constants = {
        "D": head_dim, "BD": ours.padded(head_dim), "BM": config.BM, "BN": config.BN,
        "EVEN": size % config.BM == 0 and (kernel == "delta" or size % config.BN == 0),
        "PRECISION": "ieee" if dtype == "fp32" else "tf32", **ours.mask_options(spec),
    }  # fmt: skip
    options = {"num_warps": config.warps} | ({} if kernel == "delta" else {"num_stages": config.stages})
    return assembled(KERNELS[kernel], arch, dtype, constants, strides(size, head_dim) | {"size": size}, options)


def rope_resources(kernel: str, arch: int, head_dim: int, dtype: str, size: int) -> dict[str, int]:
    width = ours.padded(head_dim)
    constants = {"D": head_dim, "BD": width, "ROWS": rope.ELEMENTS // width, "BACKWARD": kernel == "rope_backward"}
    heads_first = {"b": HEADS * size * head_dim, "h": size * head_dim, "s": head_dim}
    fused = {"b": 3 * HEADS * size * head_dim, "h": head_dim, "s": 3 * HEADS * head_dim}
    at = {t: heads_first if (t == "o") != constants["BACKWARD"] else fused for t in "qkvo"}
    numbers = {f"s{t}{axis}": n for t, row in at.items() for axis, n in row.items()} | {"heads": HEADS, "size": size}
    return assembled(ROPE[kernel], arch, dtype, constants, numbers, {"num_warps": 4})


def assembled(
    kernel: Any, arch: int, dtype: str, constants: dict[str, Any], numbers: dict[str, int], options: dict[str, int]
) -> dict[str, int]:
    names = list(inspect.signature(kernel.fn).parameters)
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = TYPES.get(name) or ("*i32" if name in INTS else f"*{dtype}" if name.isupper() else "i32")
        signature[name] = pointer
        if pointer.startswith("*") or numbers.get(name, 1) % 16 == 0:  # what a launch finds divisible by 16
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(names.index(n),): constants[n] for n in names if n in constants}, attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
    }


SPECS = {
    "causal": MaskSpec(),
    "hidden": MaskSpec(end=torch.full((2, 64), 64), trusted=True),
    "window": MaskSpec.neighbourhood(16, 2, 2),
    "prefix": MaskSpec(start=torch.zeros(2, 64), trusted=True),
}

if __name__ == "__main__":
    arch, head_dim, dtype, spec, size = sys.argv[1:6]
    for kernel in ROPE if spec == "rope" else KERNELS:
        if spec == "rope":
            found = rope_resources(kernel, int(arch), int(head_dim), dtype, int(size))
        else:
            found = resources(kernel, int(arch), int(head_dim), dtype, SPECS[spec], int(size))
        print(json.dumps({"kernel": kernel, **found}))
