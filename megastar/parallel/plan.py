"""Which weight is split how over tensor-parallel ranks. One table; the engine hands it to DeepSpeed's AutoTP."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Weights whose full name matches ``pattern`` are split by output rows ("column") or input columns ("row").

    ``shape`` views a fused weight before the split: (3, -1) gives each rank its share of q, of k and of v.
    ``gather_output`` makes every rank hold the whole output.
    """

    pattern: str
    partition: str
    shape: tuple[int, ...] | None = None
    gather_output: bool = False


# Everything else (embeddings, norms, projector) is whole on every rank.
TENSOR_PLAN: tuple[Split, ...] = (
    Split(r"(.*\.)?layers\.\d+\.attention\.wqkv\.weight$", "column", shape=(3, -1)),
    Split(r"(.*\.)?layers\.\d+\.attention\.wo\.weight$", "row"),
    Split(r"(.*\.)?layers\.\d+\.feed_forward\.w[13]\.weight$", "column"),
    Split(r"(.*\.)?layers\.\d+\.feed_forward\.w2\.weight$", "row"),
    Split(r"(.*\.)?output\.weight$", "column", gather_output=True),
)
