"""ZeRO stages 0 to 2 with one data rank: gradients stay where the backward pass leaves them, and the optimizer reads them
there.

DeepSpeed copies each gradient into a bucket from a hook of each parameter, averages the bucket over one rank, copies it into
the rank's partition, concatenates the partition, and copies the updated masters to the weights (read against DeepSpeed
0.19.8). The values are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastar.engine.zero.partitions import AdamWEMA


def keep_gradients(engine: Any) -> bool:
    """Replace the reduction of gradients of ``engine``; False where several data ranks, or another type of accumulation,
    require DeepSpeed's."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3 or engine.dp_world_size > 1:
        return False
    if stage == 0:
        engine.enable_backward_allreduce = False
        return True
    groups = zero.real_dp_process_group
    if zero.cpu_offload or zero.use_grad_accum_attribute or any(dist.get_world_size(g) > 1 for g in groups):
        return False
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero._grad_acc_hooks.clear()

    def collect(pipeline_parallel: bool = False) -> None:
        """The end of a backward pass: at the last micro-batch the gradients become those of the partition."""
        if not zero.is_gradient_accumulation_boundary():
            return
        for i, params in enumerate(zero.params_in_partition):
            zero.all_grad_tensors[i] = zero.get_all_grad_tensors(params, dtype=zero.gradient_accumulation_dtype)
            place = (zero.first_offset[i], zero.partition_size[i], zero.gradient_accumulation_dtype, engine.device)
            zero.averaged_gradients[i] = zero.get_flat_partition(params, *place, i, return_tensor_list=True)
            zero.all_grad_tensors[i] = None

    zero.reduce_gradients = zero.overlapping_partition_gradients_reduce_epilogue = collect
    return True


def step_on_gradients(engine: Any, optimizer: AdamWEMA) -> None:
    """After ``keep_gradients`` at stages 1 and 2: the optimizer updates each weight's part of the flat masters from that
    weight's gradient, without a flat copy of all gradients. In fp32 the weights themselves are the masters, as at stage 0.

    Gradients of another type than the masters, and those that Muon exchanges, are converted into a flat tensor at once.
    """
    zero = engine.optimizer
    for weights, flat in zip(zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True):
        if weights.dtype == flat.dtype:
            flat.data = weights.detach()  # DeepSpeed's copy of one to the other then returns at once
    zero._link_all_hp_params()  # its views of the former masters would keep their memory

    def gradient_of(group: int) -> Tensor:
        flat = zero.single_partition_of_fp32_groups[group]
        grads = [g for g in zero.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
        places = list(zip(zero.round_robin_bit16_offsets[group], grads, strict=True))
        if optimizer.steps_on_pieces(flat) and all(g.dtype == flat.dtype for g in grads):
            optimizer.pieces[flat] = [(at, g.reshape(-1)) for at, g in places]
            return torch.zeros((), dtype=flat.dtype, device=flat.device).expand(flat.numel())  # no memory, not read
        whole = torch.empty_like(flat, requires_grad=False)
        if sum(g.numel() for g in grads) < whole.numel():
            whole.zero_()
        torch._foreach_copy_([whole.narrow(0, at, g.numel()).view(g.shape) for at, g in places], grads)
        return whole

    clip = zero.unscale_and_clip_grads

    def clip_pieces(grads: list[Tensor], norm: Tensor) -> None:
        pieces = [g for some in optimizer.pieces.values() for _, g in some]  # of the group that is stepped next
        clip(pieces or grads, norm)

    zero._get_preflattened_grad_partition, zero.unscale_and_clip_grads = gradient_of, clip_pieces
