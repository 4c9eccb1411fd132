"""ZeRO stage 1 with several data ranks in fp32: each gradient is copied once, into a flat tensor that the collectives reduce
and the optimizer reads.

DeepSpeed copies a gradient into a bucket, the reduced bucket into the gradient, the gradients of a rank's partition into a
flat tensor, and the updated masters to the weights (read against DeepSpeed 0.19.8). Here buckets are parts of the flat
gradient, each reduced to the rank that owns it while the backward pass goes on, and the weights of a rank's partition are
its masters. Sums over ranks and micro-batches are those of ``gradient / ranks``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor, nn

BUCKET = 1 << 23  # elements: the first collective starts early in the backward pass


@dataclass
class GradientBucket:
    """Neighbouring parameters of a group, in the order in which the backward pass ends them."""

    pieces: list[tuple[int, Tensor]]  # the owner's rank in the data group, and its part of the flat gradient
    group: dist.ProcessGroup
    params: set[nn.Parameter]
    missing: set[nn.Parameter] = field(default_factory=set)


def flatten_gradients(engine: Any) -> bool:
    """Replace the reduction of gradients of ``engine``; False where this module does not apply: other stages, one data rank,
    an offloaded optimizer, or gradients that are accumulated or sent in another type than the weights'."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 1 or engine.dp_world_size == 1 or zero.cpu_offload:
        return False
    kinds = {flat.dtype for flat in zero.bit16_groups_flat} | {zero.gradient_accumulation_dtype}
    if kinds | {engine.communication_data_type} != {torch.float32} or zero.use_grad_accum_attribute:
        return False
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero._grad_acc_hooks.clear()
    flat = FlatGradients(zero)
    zero.setup_buckets = lambda: None  # DeepSpeed's buckets would be allocated and not used
    zero.reduce_gradients = zero.overlapping_partition_gradients_reduce_epilogue = flat.collect
    zero._get_preflattened_grad_partition = flat.partition_of
    for i, masters in enumerate(zero.single_partition_of_fp32_groups):
        own = zero.parallel_partitioned_bit16_groups[i][dist.get_rank(zero.real_dp_process_group[i])]
        masters.data = own.detach()  # DeepSpeed's copy of one to the other then returns at once
    zero._link_all_hp_params()  # its views of the former masters would keep their memory
    if engine.device.type == "cpu":
        stage_1_and_2.all_gather_dp_groups = broadcast_partitions
    return True


def broadcast_partitions(*, partitioned_param_groups: Any, dp_process_group: Any, **_: Any) -> None:
    """Each owner's partition of the flat weights to all ranks, in place: gloo's all-gather copies the weights three times."""
    handles = []
    for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        for owner, part in enumerate(parts if dist.get_world_size(group) > 1 else ()):
            handles.append(dist.broadcast(part, dist.get_global_rank(group, owner), group=group, async_op=True))
    for handle in handles:
        handle.wait()


class FlatGradients:
    """The flat gradients of ``zero``'s groups, (ranks x partition,) each, in the layout of its flat weights."""

    def __init__(self, zero: Any):
        self.zero = zero
        self.flat = [torch.zeros_like(weights) for weights in zero.bit16_groups_flat]
        self.view: dict[nn.Parameter, Tensor] = {}
        self.share: dict[nn.Parameter, float] = {}  # of a rank's gradient in the average
        self.bucket: dict[nn.Parameter, GradientBucket] = {}
        self.buckets: list[GradientBucket] = []
        self.written: set[nn.Parameter] = set()  # since the last step
        self.launched = 0
        self.handles: list[Any] = []
        # The optimizer's groups are in the order of the network's layers, so the backward pass ends them in reverse.
        for i in reversed(range(len(self.flat))):
            group, offsets = zero.real_dp_process_group[i], zero.round_robin_bit16_offsets[i]
            place = list(zip(zero.round_robin_bit16_groups[i], offsets, strict=True))
            for p, at in place:
                self.view[p] = self.flat[i].narrow(0, at, p.numel()).view(p.shape)
                self.share[p] = 1.0 / dist.get_world_size(group)
                p.register_post_accumulate_grad_hook(self.take)
            run: list[tuple[nn.Parameter, int]] = []
            for p, at in reversed(place):
                run.append((p, at))
                if sum(q.numel() for q, _ in run) >= min(BUCKET, zero.reduce_bucket_size):
                    self._add_bucket(i, run)
                    run = []
            self._add_bucket(i, run)
        self._restart()

    def _add_bucket(self, i: int, run: list[tuple[nn.Parameter, int]]) -> None:
        if not run:
            return
        low, (first, at) = run[-1][1], run[0]
        high, size, pieces = at + first.numel(), self.zero.partition_size[i], []
        while low < high:
            end = min(high, (low // size + 1) * size)
            pieces.append((low // size, self.flat[i][low:end]))
            low = end
        bucket = GradientBucket(pieces, self.zero.real_dp_process_group[i], {p for p, _ in run})
        self.buckets.append(bucket)
        self.bucket |= dict.fromkeys(bucket.params, bucket)

    def _restart(self) -> None:
        self.written.clear()
        self.launched = 0
        for bucket in self.buckets:
            bucket.missing = set(bucket.params)

    @torch.no_grad()
    def take(self, p: nn.Parameter) -> None:
        """Called when ``p.grad`` is complete: add it to the flat gradient; in the last micro-batch, send full buckets."""
        if p.grad is None:
            return
        if p in self.written:
            self.view[p].add_(p.grad, alpha=self.share[p])
        else:
            torch.mul(p.grad, self.share[p], out=self.view[p])
            self.written.add(p)
        p.grad = None
        if self.zero.is_gradient_accumulation_boundary():
            self.bucket[p].missing.discard(p)
            self._launch()

    def _launch(self, everything: bool = False) -> None:
        """Start the collectives of complete buckets in the order of the list, which is the same on all ranks."""
        while self.launched < len(self.buckets) and (everything or not self.buckets[self.launched].missing):
            bucket = self.buckets[self.launched]
            for owner, piece in bucket.pieces:
                to = dist.get_global_rank(bucket.group, owner)
                self.handles.append(dist.reduce(piece, to, group=bucket.group, async_op=True))
            self.launched += 1

    @torch.no_grad()
    def collect(self, pipeline_parallel: bool = False) -> None:
        """The end of a backward pass: at the last micro-batch the rank's part of the flat gradient is the average."""
        zero = self.zero
        if not zero.is_gradient_accumulation_boundary():
            return
        for p, view in self.view.items():
            if p not in self.written:
                view.zero_()
        self._launch(everything=True)
        for handle in self.handles:
            handle.wait()
        self.handles.clear()
        self._restart()
        for i, flat in enumerate(self.flat):
            size, group = zero.partition_size[i], zero.real_dp_process_group[i]
            first = dist.get_rank(group) * size
            zero.all_grad_tensors[i], zero.averaged_gradients[i] = None, []
            for p, at in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
                low, high = max(at, first), min(at + p.numel(), first + size)
                if low < high:
                    zero.averaged_gradients[i].append(flat[low:high])

    def partition_of(self, i: int) -> Tensor:
        """The rank's part of the flat gradient of group ``i``, (partition,), which the optimizer reads."""
        size = self.zero.partition_size[i]
        part: Tensor = self.flat[i].narrow(0, dist.get_rank(self.zero.real_dp_process_group[i]) * size, size)
        return part
