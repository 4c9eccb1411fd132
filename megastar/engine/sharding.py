"""The only place that touches ZeRO partitions: the EMA optimizer and the teacher's refresh.

The EMA of the fp32 masters is one more state of the optimizer, so it is sharded, saved and resumed as Adam's
moments are. The teacher is a second ZeRO-3 model; each rank copies its own shard of the average into its own
shard of the teacher, so neither the update nor the refresh communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from megastar.teacher.ema import lerp_


class AdamWEMA(torch.optim.AdamW):
    """AdamW that keeps, as state ``ema``, the average of what it optimises: this rank's fp32 master shards.

    ``ema_decay`` is set in each group before a step; 0 makes the average equal to the weights.
    """

    def __init__(self, params: Any, **defaults: Any):
        super().__init__(params, **defaults)
        for group in self.param_groups:
            group["ema_decay"] = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if p.grad is not None and "ema" not in state:
                    # Taken before the first update. AdamW creates its own states only when it finds none.
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["ema"] = p.detach().clone()
        result = super().step(closure)
        for group in self.param_groups:
            moved = [p for p in group["params"] if "ema" in self.state.get(p, {})]
            lerp_([self.state[p]["ema"] for p in moved], moved, group["ema_decay"])
        return result


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on tensors of two or more dimensions, none on the others (st-ar.md, training set-up)."""

    def dims(p: nn.Parameter) -> int:
        return len(getattr(p, "ds_shape", p.shape))  # under zero.Init p itself is empty

    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if dims(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if dims(p) < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def shard_pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(student parameter, teacher parameter) by name; the projector has no teacher."""
    theirs = dict(student.named_parameters())
    pairs = [(theirs[name], q) for name, q in teacher.named_parameters()]
    for p, q in pairs:
        assert p.ds_tensor.numel() == q.ds_tensor.numel(), (p.ds_shape, q.ds_shape)
    return pairs


@torch.no_grad()
def refresh_teacher(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Copy this rank's fp32 EMA shards into the teacher's compute shards. Before the first step: the masters."""
    for p, q in pairs:
        source: Tensor | None = None
        with suppress(KeyError, ValueError):  # no optimizer step yet
            source = safe_get_local_optimizer_state(p, "ema")
        if source is None:
            source = safe_get_local_fp32_param(p)
        q.ds_tensor.data.copy_(source)
    if torch.cuda.is_available():
        # DeepSpeed gathers the teacher on a stream of its own, which does not wait for these copies.
        torch.cuda.current_stream().synchronize()
