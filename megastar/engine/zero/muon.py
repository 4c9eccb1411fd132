"""Muon for the blocks' matrices, AdamW for the rest, on this rank's fp32 master shards, with the EMA of both.

The momentum buffer is a state of the shard, as AdamW's moments are. The orthogonalization sees whole matrices: their owners
receive them, and send the updates back (matrix_exchange.py). Hence an update is that of one process, at every ZeRO stage
and tensor degree. Source: K. Jordan, https://kellerjordan.github.io/posts/muon/; constants, momentum and adjust_lr_fn as in
``torch.optim.Muon``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megastar.config.sections.optim import MuonConfig
from megastar.engine.context import Context
from megastar.engine.zero.matrix_exchange import MatrixExchange
from megastar.engine.zero.partitions import AdamWEMA, flats_of, shards
from megastar.parallel.muon import lr_factor, matrices_of, newton_schulz_flops
from megastar.parallel.plan import block_matrix

A, B, C = 3.4445, -4.7750, 2.0315  # x <- A x + B (x x') x + C (x x')^2 x
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.no_grad()
def orthogonalize(matrices: Tensor, steps: int, eps: float) -> Tensor:
    """Each of ``matrices`` (count, rows, columns) with its singular values near 1, in the type of ``matrices``.

    On a CPU one by one: in bf16 then bit for bit ``torch.optim.Muon``'s, which a batched product is not quite.
    """
    if matrices.is_cpu:
        return torch.stack([newton_schulz(m, steps, eps) for m in matrices])
    return newton_schulz(matrices, steps, eps)


def newton_schulz(matrices: Tensor, steps: int, eps: float) -> Tensor:
    """Quintic iterations on a matrix (rows, columns) or on equal ones (count, rows, columns)."""
    tall, add = matrices.shape[-2] > matrices.shape[-1], torch.addmm if matrices.ndim == 2 else torch.baddbmm
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = add(gram, gram, gram, beta=B, alpha=C)
        x = add(x, gram, x, beta=A)
    return x.mT if tall else x


class MuonEMA(AdamWEMA):
    """``AdamWEMA`` whose groups with ``muon`` set are updated by Muon, with the group's lr and decoupled weight_decay.

    ``attach`` must be called once the engine has partitioned the weights. ``dtype`` is the compute type of the run.
    """

    name = "muon"

    def __init__(self, params: Any, muon: MuonConfig, dtype: torch.dtype, **defaults: Any):
        super().__init__(params, **defaults)
        self.muon, self.dtype = muon, DTYPES.get(muon.ns_dtype, dtype)
        self.exchanges: dict[int, MatrixExchange] = {}  # by the id of a tensor that is stepped: all stepped with it

    def attach(self, engine: Any, ctx: Context, shapes: dict[str, list[int]]) -> None:
        """``shapes``: name -> shape of the whole weight. A collective."""
        held = [s for s in shards(engine, self) if block_matrix(s.name)]
        replicated = engine.zero_optimization_stage() == 0
        for stepped in flats_of(engine, self):
            flats = [(flat, some) for flat, some in stepped if block_matrix(some[0])]  # a group is Muon's or is not
            if not flats:
                continue
            names = [name for _, some in flats for name in some]
            matrices = [m for name in names for m in matrices_of(name, shapes[name], self.muon.split_qkv)]
            costs = [newton_schulz_flops(m.rows, m.columns, self.muon.ns_steps) for m in matrices]
            known = set(names)
            mine = [s for s in held if s.name in known]
            exchange = MatrixExchange(ctx, matrices, costs, mine, replicated, self.dtype)
            self.exchanges |= {id(flat): exchange for flat, _ in flats}

    def moments(self, p: Tensor) -> tuple[str, ...]:
        return ("momentum_buffer",) if id(p) in self.exchanges else super().moments(p)

    def steps_on_pieces(self, p: Tensor) -> bool:
        return id(p) not in self.exchanges

    def update(self, closure: Callable[[], float] | None = None) -> float | None:
        groups = [(g, g["params"]) for g in self.param_groups if any(id(p) in self.exchanges for p in g["params"])]
        for group, _ in groups:
            group["params"] = []
        try:
            result = super().update(closure)
        finally:
            for group, params in groups:
                group["params"] = params
        for group, params in groups:
            self._step_matrices(group, [p for p in params if p.grad is not None])
        return result

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """All ranks alike. ``params`` are one flat tensor, or at stage 0 the weights themselves."""
        cfg, lr = self.muon, group["lr"]
        exchange = self.exchanges[id(params[0])]
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)
        torch._foreach_lerp_(buffers, grads, 1 - cfg.momentum)
        if cfg.nesterov:  # the gradient is not needed any more
            torch._foreach_lerp_(grads, buffers, cfg.momentum)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        source = {id(p): s for p, s in zip(params, grads if cfg.nesterov else buffers, strict=True)}
        flats = [flat.detach().view(-1) for flat in exchange.flats]
        for held, values in exchange.run(
            [source[id(flat)] for flat in exchange.flats], lambda x: orthogonalize(x, cfg.ns_steps, cfg.eps)
        ):
            by_rate: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
            for h, value in zip(held, values, strict=True):
                m = exchange.matrices[h.matrix]
                targets, updates = by_rate.setdefault(lr * lr_factor(cfg.adjust_lr_fn, m.rows, m.columns), ([], []))
                target = flats[h.flat].narrow(0, h.offset, h.length)
                targets.append(target)
                updates.append(value.to(target))
            for rate, (targets, updates) in by_rate.items():
                torch._foreach_add_(targets, updates, alpha=-rate)
