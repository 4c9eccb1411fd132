"""ZeRO stages 0 to 2 with one data rank: gradients stay where the backward pass leaves them, without DeepSpeed's buckets.

DeepSpeed copies each gradient into a bucket, averages the bucket over one rank, and copies it again into the rank's
partition, from a hook of each parameter (read against DeepSpeed 0.19.8). The values are the same.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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
