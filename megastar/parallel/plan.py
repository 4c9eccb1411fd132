"""How each weight is split over tensor-parallel ranks: one table, used for DeepSpeed's AutoTP and for splitting and
joining checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Weights whose full name matches ``pattern`` are split by output rows ("column") or input columns ("row").

    ``fused`` weights are stacked in one tensor: each rank has its share of q, of k and of v.
    """

    pattern: str
    partition: str
    fused: int = 1

    def cut(self, whole: Tensor, degree: int, rank: int) -> Tensor:
        """The part (rows / degree, columns) or (rows, columns / degree) of rank ``rank``."""
        if self.partition == "row":
            return whole.chunk(degree, 1)[rank]
        parts: Tensor = whole.unflatten(0, (self.fused, degree, -1))[:, rank]  # (fused, rows / fused / degree, columns)
        return parts.flatten(0, 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole weight from every rank's part, in rank order."""
        import torch

        if self.partition == "row":
            return torch.cat(list(parts), 1)
        return torch.cat([p.unflatten(0, (self.fused, 1, -1)) for p in parts], 1).flatten(0, 2)

    def local_shape(self, shape: Sequence[int], degree: int) -> tuple[int, ...]:
        """Shape of a rank's part of a weight of ``shape``."""
        rows, columns = shape
        return (rows, columns // degree) if self.partition == "row" else (rows // degree, columns)


# Everything else (embeddings, norms, projector) is replicated. The head's output stays split: the loss is computed on
# each rank's share of the vocabulary (cross_entropy.py).
TENSOR_PLAN: tuple[Split, ...] = (
    Split(r"(.*\.)?layers\.\d+\.attention\.wqkv\.weight$", "column", fused=3),
    Split(r"(.*\.)?layers\.\d+\.attention\.wo\.weight$", "row"),
    Split(r"(.*\.)?layers\.\d+\.feed_forward\.w[13]\.weight$", "column"),
    Split(r"(.*\.)?layers\.\d+\.feed_forward\.w2\.weight$", "row"),
    Split(r"(.*\.)?output\.weight$", "column"),
)


def split_of(name: str) -> Split | None:
    """The row of the table for the weight of that name; None for a replicated weight."""
    return next((split for split in TENSOR_PLAN if re.match(split.pattern, name)), None)


def block_matrix(name: str) -> Split | None:
    """The row of the table for a 2-D weight of a block, which Muon updates; None for every other weight."""
    return split_of(name) if re.search(r"(^|\.)layers\.\d+\.", name) else None


def autotp_section(degree: int) -> dict[str, Any]:
    """The table as DeepSpeed's ``tensor_parallel`` section."""
    specs = []
    for split in TENSOR_PLAN:
        spec: dict[str, Any] = {"patterns": [split.pattern], "partition_type": split.partition}
        if split.fused > 1:
            spec["shape"] = [split.fused, -1]
        specs.append(spec)
    return {"autotp_size": degree, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


# Logits per chunk of the loss (cross_entropy.py): few enough for a CPU's caches, enough to utilize a GPU.
CHUNK = {"cpu": 1 << 23, "cuda": 1 << 26}


def chunk_rows(rows: int, columns: int, device: str = "cuda") -> int:
    """Rows per chunk of ``rows`` x ``columns`` logits; all chunks but the last have the same size."""
    chunks = -(-rows * columns // CHUNK.get(device, CHUNK["cuda"]))
    return -(-rows // max(chunks, 1))


def own_masters(stage: int, data: int, dtype: str) -> bool:
    """Whether the weights are their own fp32 masters (engine/zero/one_data_rank.py, flat_gradients.py)."""
    return stage == 0 or (dtype == "fp32" and (stage == 1 or (stage == 2 and data == 1)))
