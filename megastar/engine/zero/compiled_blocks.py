"""Compiled transformer blocks (``train.compile``): compared with eager blocks when the engines are built."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.config.schema import ModelConfig, RunConfig
from megastar.engine.context import Context
from megastar.model.kernels.select import only_sdpa
from megastar.model.masks import MaskSpec, draw_hidden
from megastar.model.token_order import Placement
from megastar.model.transformer import Transformer, TransformerBlock

logger = logging.getLogger(__name__)

STEPS, BATCH = 2, 2  # of the comparison


def compile_blocks(transformer: Transformer) -> None:
    """Compile the blocks: equal ones share one compilation, and a change of the loss causes no new one.

    The function is compiled and not the module, so hooks run outside of it. At ZeRO stage 3 one hook then gathers all
    weights of a block (DeepSpeed's leaf module), since the hooks of the layers in it would not run.
    """
    compiled = torch.compile(TransformerBlock.forward, dynamic=False)
    for block in transformer.layers:
        block.forward = types.MethodType(compiled, block)
        block._z3_leaf = True  # type: ignore[assignment]


def compilations() -> int:
    """Graphs that this process has compiled so far, those of attention included."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def wants_compiled(cfg: RunConfig, ctx: Context, masked: bool) -> bool:
    """Whether this run compiles its blocks; on all ranks alike. ``masked``: training has a mask."""
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    if ctx.device.type != "cuda" or ctx.tensor > 1:
        return False
    start, (problem, breaks) = time.perf_counter(), _problem(cfg, ctx, masked)
    agreed = torch.tensor(float(problem is None), device=ctx.device)
    if ctx.world > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
    seconds = time.perf_counter() - start
    if problem is not None:
        logger.warning("train.compile: compiled blocks %s; blocks run eagerly (checked in %.0f s)", problem, seconds)
    elif not agreed:
        logger.warning("train.compile: compiled blocks failed on another rank; blocks run eagerly")
    elif ctx.main:
        logger.info("train.compile: compiled blocks agree with eager ones, %d graph breaks (%.0f s)", breaks, seconds)
    return bool(agreed)


def _problem(cfg: RunConfig, ctx: Context, masked: bool) -> tuple[str | None, int]:
    """What is wrong with compiled blocks, or None; and the number of graph breaks. Uses none of the run's random numbers.

    Two blocks of the run's size take ``STEPS`` steps in three ways: compiled, eager, and eager in twice the precision with
    sdpa. The norm of the compiled one's error, in outputs, input gradients and weight gradients alike, may be three times
    that of eager, plus 4 roundings.
    """
    exact_type = torch.float64 if ctx.dtype == torch.float32 else torch.float32
    off: dict[str, Any] = {f"{name}_dropout_p": 0.0 for name in ("token", "resid", "ffn")} | {"class_dropout_prob": 0.0}
    model = dataclasses.replace(cfg.model, n_layer=2, vocab_size=64, head="full", head_factors=[], num_classes=8, **off)
    cuda = [ctx.device] if ctx.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.enable_grad():
        try:
            with only_sdpa():
                exact = list(_results(model, ctx, exact_type, masked, False))
            usual = list(_results(model, ctx, ctx.dtype, masked, False))
            got = list(_results(model, ctx, ctx.dtype, masked, True))
        except Exception as error:  # of a compiler or a driver: the run continues with eager blocks
            lines = str(error).strip().splitlines()
            return f"failed ({type(error).__name__}: {lines[0] if lines else ''})", 0
    from torch._dynamo.utils import counters

    for (name, a), (_, b), (_, c) in zip(got, exact, usual, strict=True):
        off_by, floor = torch.dist(a, b), torch.finfo(ctx.dtype)
        allowed = 3 * (c - b).norm() + 4 * floor.eps * b.norm() + floor.tiny
        if not off_by <= allowed:  # true for NaN too
            return f"differ from eager ones ({name} off by {off_by:.2g}, {allowed:.2g} is allowed)", 0
    return None, sum(counters["graph_break"].values())


def _results(
    model: ModelConfig, ctx: Context, dtype: torch.dtype, masked: bool, compiled: bool
) -> Iterator[tuple[str, Tensor]]:
    """The blocks' output, and gradients of the weights, at each step."""
    torch.manual_seed(0)
    size, device = model.image_tokens, ctx.device
    network = Transformer(model).to(device, dtype)
    if compiled:
        compile_blocks(network)
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(BATCH, size, model.dim, generator=g).to(device, dtype)
    for step in range(STEPS):
        tokens = torch.randint(0, 64, (BATCH, size), generator=g).to(device)
        hidden = draw_hidden(0, torch.zeros(BATCH), torch.arange(BATCH) + step * BATCH, size, 0.25)
        mask = MaskSpec.hidden(hidden.to(device)) if masked else None
        places = {}
        if model.target_position != "none":
            orders = torch.rand(BATCH, size, generator=g).argsort(-1).to(device)
            places = {"placement": Placement.of(orders)}
        out = network(torch.zeros_like(tokens[:, 0]), tokens[:, :-1], mask, need_logits=False, **places).last
        ((out * weights).sum() / size).backward()
        yield f"output of step {step + 1}", out.detach().double()
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if weight.grad is not None:
                    yield f"gradient of {name}, step {step + 1}", weight.grad.double()
                    weight.sub_(1e-3 * weight.grad)
                    weight.grad = None
