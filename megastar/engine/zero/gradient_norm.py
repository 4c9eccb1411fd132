"""The norm of the gradient and its clipping, in place of DeepSpeed's, with equal values (read against DeepSpeed 0.19.8).

DeepSpeed copies each gradient to fp64, reduces each parameter group separately and reads each group's norm on the host,
several times. Here the norms of all gradients are one list operation, the groups share one reduction, and the host reads
one number: whether the norm is finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

ROW = 512  # elements whose norm a CPU computes in fp32; the squares of these norms are added in fp64


def square_sums(groups: Sequence[Sequence[Tensor]], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """The sum of squares of each group's tensors, (groups,), accumulated in ``dtype`` on a CPU.

    On a GPU in fp32, where the kernel adds few numbers in a row. A CPU's adds millions of them: its fp32 norm of a large
    matrix is off by 5e-4, that of rows of 512 by about 1e-9.
    """
    if device.type != "cpu":
        dtype = torch.float32
    if dtype == torch.float64:
        sums = [sum((row_squares(g) for g in group), torch.zeros((), dtype=dtype)) for group in groups]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=dtype)
    flat = [g.detach() for group in groups for g in group]
    if not flat:
        return torch.zeros(len(groups), dtype=dtype, device=device)
    squares = torch.stack(torch._foreach_norm(flat, 2.0, dtype)).square()
    return torch.stack([part.sum() for part in squares.split([len(group) for group in groups])])


def row_squares(grad: Tensor) -> Tensor:
    """The sum of squares of ``grad``, () fp64, without a copy of it in fp64."""
    flat = grad.detach().reshape(-1)
    wide = torch.promote_types(flat.dtype, torch.float32)
    whole = flat.numel() - flat.numel() % ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=wide)
    total: Tensor = rows.double().square().sum() + rest.double().square()
    return total


class GradientNorm:
    """The methods that replace those of a ZeRO optimizer (``install``), and of the engine at stage 0.

    A parameter that each rank of a tensor group holds whole is counted on the group's first rank.
    """

    def __init__(self, engine: Any):
        self.engine, self.zero, self.stage = engine, engine.optimizer, engine.zero_optimization_stage()
        self.device = torch.device(engine.device)
        self.scale: Tensor | None = None  # of the gradient, to clip it

    def install(self) -> None:
        if self.stage in (1, 2):
            self.zero.scaled_global_norm = self.partitions_norm
            self.zero.unscale_and_clip_grads = self.clip_partition
            self.zero._update_model_bit16_weights = lambda group: None  # the weights are views already
        elif self.stage == 3:
            self.zero._get_norm_groups = self.group_norms
            self.zero._constant_buffered_norm2 = self.offloaded_norm

    def counted(self, p: Tensor) -> bool:
        mpu = self.engine.mpu
        return mpu is None or mpu.get_model_parallel_rank() == 0 or is_model_parallel_parameter(p)

    def reduce(self, squares: Tensor) -> Tensor:
        """The norm of each group over all ranks: a data rank has a part of each gradient, a tensor rank of its own."""
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        return squares.sqrt()

    def partitions_norm(self) -> Tensor:
        """Stages 1 and 2: the norm, (), infinite or NaN where a gradient is."""
        zero, groups = self.zero, []
        for i in range(len(zero.bit16_groups)):
            grads = (g for g in zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False))
            pairs = zip(grads, zero.params_in_partition[i], strict=False)  # the last gradients may be padding
            groups.append([g for g, p in pairs if self.counted(p)])
        norm: Tensor = torch.linalg.vector_norm(self.reduce(square_sums(groups, self.device).float()))
        if zero.clip_grad:
            self.scale = 1.0 / ((norm + 1e-6) / zero.clip_grad).clamp(min=1.0)
        return norm

    def clip_partition(self, grads: Iterable[Tensor], norm: Tensor) -> None:
        if self.scale is not None and not (self.scale.is_cpu and self.scale == 1):  # a GPU would have to wait
            torch._foreach_mul_(list(grads), self.scale)

    def group_norms(self) -> list[Tensor]:
        """Stage 3: the norm of each group; on the host with an offloaded optimizer."""
        zero, groups = self.zero, []
        for i, params in enumerate(zero.fp16_groups):
            if zero.offload_optimizer:
                pairs = [(zero.norm_for_param_grads.get(zero.get_param_id(p)), p) for p in params]
            else:
                pairs = list(zip(zero.averaged_gradients[i], params, strict=True))
            groups.append([g for g, p in pairs if g is not None and self.counted(p)])
        squares = square_sums(groups, self.device)
        return list(self.reduce(squares.float()).cpu() if zero.offload_optimizer else self.reduce(squares))

    def offloaded_norm(self, grad: Tensor, buffer_size: int = 0) -> Tensor:
        """Stage 3 with an offloaded optimizer: the norm of one gradient, before it is copied to the host."""
        return square_sums([[grad]], self.device)[0].sqrt()

    def clip(self) -> Tensor:
        """Stage 0: the norm, (), of gradients that all data ranks have; they are clipped in place."""
        params = [p for p in self.engine.module.parameters() if p.grad is not None]
        squares = square_sums([[p.grad for p in params if self.counted(p)]], self.device, torch.float32)
        norm = self.reduce(squares / self.engine.dp_world_size)[0]
        torch._foreach_mul_([p.grad for p in params], (self.engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0))
        return norm
