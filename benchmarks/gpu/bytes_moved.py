"""Bytes that a block moves besides its matrix products, and its kernels: eager and compiled, forward and backward.

    python benchmarks/gpu/bytes_moved.py --size b l xl                                       on a GPU
    /path/to/venv/bin/python tests/nullgpu/device.py benchmarks/gpu/bytes_moved.py            on a null CUDA device

Nothing is timed and no result is used. Eager: what every operation of a block in bf16 reads and writes, views excluded.
Compiled: what inductor counts for each kernel that it generates (at most, for a buffer that a kernel reads in part). Matrix
products are not counted, attention is counted apart. In bytes per token and width D, or F for the SwiGLU. The roofline is the
time of the matrix products at a share of the peak, and of everything else (blocks, attention, loss, AdamW) at the memory's
bandwidth. It is a bound on MFU, not a measurement: no launch, no communication, no input.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megastar.config.load import load_config
from megastar.config.schema import ModelConfig, RunConfig
from megastar.model import attention, fused
from megastar.model.rope import rope_table
from megastar.model.transformer import TransformerBlock
from megastar.parallel import cost, gpus
from megastar.parallel.budget import elements

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("eager, fused_ops=off", "eager", "compiled")
FREE = {"_unsafe_view", "detach", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh"}
PRODUCTS = {"mm", "addmm", "bmm"}


class Counts:
    """Bytes per token of one pass by part (stream, split, ffn, attention), and the number of kernels."""

    def __init__(self, model: ModelConfig, tokens: int):
        self.model, self.tokens, self.kernels = model, tokens, 0
        self.bytes: dict[str, float] = defaultdict(float)

    def add(self, moved: float, elements: float, attention: bool = False) -> None:
        """``elements`` of the largest tensor: F a token in the SwiGLU; D in norms, dropouts, sums; else q, k, v."""
        D, wide = self.model.dim, elements / self.tokens
        part = "stream" if wide <= D else "ffn" if math.isclose(wide, self.model.ffn_dim) else "split"
        self.bytes["attention" if attention else part] += moved / self.tokens

    def row(self) -> dict[str, float]:
        """stream, split and attention over D, ffn over F; all of them but attention over D."""
        D = self.model.dim
        parts = {
            k: self.bytes[k] / (self.model.ffn_dim if k == "ffn" else D)
            for k in ("stream", "split", "ffn", "attention")
        }
        total = sum(v for k, v in self.bytes.items() if k != "attention") / D
        return parts | {"total": total, "kernels": self.kernels}


def size_of(t: torch.Tensor) -> int:
    """Bytes of the distinct elements: an expanded tensor is read once."""
    return math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) * t.element_size()


class Eager(TorchDispatchMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE:
            return out
        self.counts.kernels += 1
        if name not in PRODUCTS:
            given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.counts.add(sum(map(size_of, given)), max(t.numel() for t in given), "attention" in name)
        return out


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def eager(
    model: ModelConfig, block: TransformerBlock, x: torch.Tensor, rope: torch.Tensor, own: bool
) -> tuple[Counts, Counts]:
    from megastar.model.kernels import triton_rope

    forward, backward = (Counts(model, x.shape[0] * x.shape[1]) for _ in range(2))

    def launch(inputs: tuple, outputs: tuple, table: torch.Tensor, gradient: bool) -> None:
        counts, used = (backward, 3) if gradient else (forward, 2)
        counts.kernels += 1
        counts.add(sum(map(size_of, (*inputs[:used], *outputs[:used]))), 3 * x.numel())

    def usable(operation: str, *_: Any) -> bool:
        return own and operation == "rope"

    with (
        patched(fused, "_usable", usable),
        patched(triton_rope, "launch", launch),
        torch.autograd.set_multithreading_enabled(False),  # in this thread, where the mode is
    ):
        with Eager(forward):
            out = block(x, rope=rope)
        gradient = torch.zeros_like(out)
        with Eager(backward):
            torch.autograd.grad(out, [x, *block.parameters()], gradient)
    return forward, backward


def compiled(model: ModelConfig, block: TransformerBlock, x: torch.Tensor, rope: torch.Tensor) -> tuple[Counts, Counts]:
    """From inductor's schedule of both graphs; the generated kernels are neither assembled nor run."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    graphs: list[Counts] = []
    codegen = GraphLowering.codegen

    def counted(graph: Any) -> Any:
        out = codegen(graph)
        counts = Counts(model, x.shape[0] * x.shape[1])
        for node in graph.scheduler.nodes:
            read = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
            extern = getattr(node.node, "python_kernel_name", None) or ""
            if not sum(read.values()):
                continue
            counts.kernels += 1
            if "attention" in extern:  # it reads its parts of a buffer: q, k, v and the output, and their gradients
                counts.add((16 if "backward" in extern else 8) * x.numel(), 0, True)
            elif not extern.startswith("extern_kernels"):
                counts.add(sum(read.values()), max(read.values()) / x.element_size())
        graphs.append(counts)
        return out

    class Kernel:
        def run(self, *args: Any, **kwargs: Any) -> None:
            pass

    torch._dynamo.reset()
    block.compile()
    with (
        config.patch(force_disable_caches=True),
        patched(GraphLowering, "codegen", counted),
        patched(AsyncCompile, "triton", lambda *args, **kwargs: Kernel()),
    ):
        out = block(x, rope=rope)
        assert len(graphs) == 1, f"{len(graphs)} graphs a block: a graph break"
        torch.autograd.grad(out, [x, *block.parameters()], torch.zeros_like(out))
    block._compiled_call_impl = None
    forward, backward = graphs
    return forward, backward


def measure(model: ModelConfig, sequences: int) -> dict[str, tuple[Counts, Counts]]:
    device = torch.device("cuda")
    block = TransformerBlock(model).to(device, torch.bfloat16).train()
    rope = rope_table(model.grid, model.head_dim, model.rope_base, device)[: model.image_tokens]
    x = torch.zeros(sequences, model.image_tokens, model.dim, device=device, dtype=torch.bfloat16, requires_grad=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with patched(attention, "attention", attend):
        return {
            WAYS[0]: eager(model, block, x, rope, own=False),
            WAYS[1]: eager(model, block, x, rope, own=True),
            WAYS[2]: compiled(model, block, x, rope),
        }


def passes(cfg: RunConfig) -> tuple[int, int]:
    """Blocks an image passes forward and backward in a step."""
    backward = cfg.student_views * cfg.model.n_layer
    return backward + cost.teacher_blocks(cfg.model, cfg.self_guided), backward


def roofline(cfg: RunConfig, found: tuple[Counts, Counts], gpu: gpus.Gpu, efficiency: float, ranks: int) -> float:
    """MFU of a step of a GPU, with AdamW split over ``ranks`` (ZeRO)."""
    m, images = cfg.model, cfg.train.global_batch
    flops = cost.step_flops(cfg)
    operations = flops["student"] + flops["teacher"]
    moved = sum(n * sum(c.bytes.values()) for n, c in zip(passes(cfg), found, strict=True))
    moved += cfg.student_views * cost.LOGIT_BYTES * m.vocab_size
    traffic = (
        images * m.image_tokens * moved
        + cost.OPTIMIZER_TRAFFIC * sum(elements(cfg.model, cfg.self_guided).values()) / ranks
    )
    peak = gpu.tflops * 1e12
    return operations / peak / (operations / peak / efficiency + traffic / gpu.hbm / 1e9)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", nargs="+", default=["b", "l", "xl"])
    p.add_argument("--sequences", type=int, default=64, help="a GPU and forward pass")
    p.add_argument(
        "--efficiency", type=float, nargs="+", default=[cost.MATMUL_EFFICIENCY, 0.7, 1.0], help="of the peak"
    )
    p.add_argument("--ranks", type=int, default=8, help="data ranks that AdamW is split over")
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    rows = []
    for size in a.size:
        off = ["data.shards=none", "data.val_shards=", "data.tokenizer=", f"train.global_batch={a.sequences}"]
        runs = {m: load_config(ROOT / f"configs/run/{m}_{size}_50ep.yaml", off) for m in ("ar", "star")}
        for way, found in measure(runs["ar"].model, a.sequences).items():
            row: dict[str, Any] = {"size": size, "way": way, "forward": found[0].row(), "backward": found[1].row()}
            for method, cfg in runs.items():
                kernels = sum(n * c.kernels for n, c in zip(passes(cfg), found, strict=True))
                mfu = {
                    g: [roofline(cfg, found, gpus.GPUS[g], e, a.ranks) for e in a.efficiency] for g in ("h100", "h200")
                }
                row[method] = {"kernels": kernels, "mfu": mfu}
            rows.append(row)
    if a.json:
        print(json.dumps(rows))
        return
    print("forward and backward: bytes per token, block and D; kernels of all blocks and products in a step")
    shares = ", ".join(f"{e:g}" for e in a.efficiency)
    print(
        f"MFU: bounds with the matrix products at {shares} of the peak, {a.sequences} images a GPU, {a.ranks} data ranks"
    )
    for row in rows:
        print(f"\n{row['size']}, {row['way']}")
        for name in ("forward", "backward"):
            r = row[name]
            print(
                f"  {name:<9}{r['total']:6.1f} D = {r['stream']:.1f} D + {r['split']:.1f} D + {r['ffn']:.1f} F;"
                f" attention {r['attention']:.1f} D; {r['kernels']} kernels a block"
            )
        for method, name in (("ar", "AR"), ("star", "ST-AR")):
            r = row[method]
            parts = [f"{g.upper()} {' '.join(f'{m:.0%}' for m in mfu)}" for g, mfu in r["mfu"].items()]
            print(f"  {name:<6} {r['kernels']} kernels a step; MFU {', '.join(parts)}")


if __name__ == "__main__":
    main()
