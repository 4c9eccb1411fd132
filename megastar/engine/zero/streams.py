"""DeepSpeed's CUDA streams wait for each other on the device; the host, which DeepSpeed lets wait, goes on queueing work
(read against DeepSpeed 0.19.8)."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


class OrderedStream(torch.cuda.Stream):
    """A stream whose ``synchronize`` makes the current stream wait for it, not the host."""

    def synchronize(self) -> None:
        torch.cuda.current_stream().wait_stream(self)


def order_streams(engine: Any) -> None:
    """Replace the host's waits for the reduction of gradients. With an offloaded optimizer the host reads them: it waits."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if not torch.cuda.is_available():
        return
    if stage == 3:
        partition_parameters.NoGatherCoalescedHandle.wait = _wait_for_no_gather
        partition_parameters.NoGatherHandle.wait = _wait_for_one
        if not zero.offload_optimizer and zero.reduce_and_partition_stream != torch.cuda.default_stream():
            zero.reduce_and_partition_stream = OrderedStream()
    if stage not in (1, 2) or not zero.overlap_comm:
        return
    epilogue = zero.independent_gradient_partition_epilogue

    def reduce_in_order() -> None:
        zero.reduce_ipg_grads()
        torch.cuda.current_stream().wait_stream(zero.reduction_stream)
        zero._clear_previous_reduced_grads()
        zero.overlap_comm = False  # the epilogue has nothing left to reduce, and does not synchronize the device
        try:
            epilogue()
        finally:
            zero.overlap_comm = True

    zero.independent_gradient_partition_epilogue = reduce_in_order


def _wait_for_no_gather(handle: Any, **_: Any) -> None:
    """With one data rank a gather is a view, which the device has in order. Called for each parameter of the handle."""
    if not handle._NoGatherCoalescedHandle__complete:
        for p in handle._NoGatherCoalescedHandle__params:
            p.ds_status = ZeroParamStatus.AVAILABLE
        handle._NoGatherCoalescedHandle__complete = True


def _wait_for_one(handle: Any, **_: Any) -> None:
    """The same for a gather of one parameter."""
    if not handle._NoGatherHandle__complete:
        handle._NoGatherHandle__param.ds_status = ZeroParamStatus.AVAILABLE
        handle._NoGatherHandle__complete = True


def gather_after_updates(engine: Any) -> None:
    """Let the stream on which ZeRO-3 gathers weights wait for their update, which DeepSpeed queues on the current one."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    stream = getattr(offload, "_DeepSpeedZeRoOffload__allgather_stream", None)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
