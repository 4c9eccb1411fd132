"""One step of decoding: from the tokens drawn so far to the next token's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megastar.model.transformer import Transformer
from megastar.sampling.guidance import doubled_labels, guide
from megastar.sampling.kv_cache import KVCache
from megastar.sampling.packed_linear import decoding_copy


class CachedDecoder:
    """A network, its cache for ``batch`` images, and on a GPU one CUDA graph per position.

    ``guided``: the cache also has rows for the null class. ``passes`` 1 runs conditional and null rows as one batch, 2 one
    after the other (half the activations; the same logits up to rounding). ``cuda_graphs`` None means on a GPU: a step
    is hundreds of small kernels that take less time than their launches. A graph is captured when a full batch first
    reaches its position; the prefix length is part of it, so nothing beyond the prefix is read.
    """

    def __init__(
        self, model: Transformer, batch: int, guided: bool, *, passes: int = 1, cuda_graphs: bool | None = None
    ):
        assert passes in (1, 2), passes
        weight = next(model.parameters())
        self.cfg, self.device, self.dtype = model.cfg, weight.device, weight.dtype
        self.model = decoding_copy(model)
        self.batch, self.split = batch, guided and passes == 2
        rows = batch * (2 if guided and not self.split else 1)
        self.caches = [KVCache.for_model(self.cfg, rows, weight.dtype, self.device) for _ in range(1 + self.split)]
        self.cuda_graphs = self.device.type == "cuda" if cuda_graphs is None else cuda_graphs
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self.pool: Any = None  # the graphs' memory pool

    def logits(self, labels: Tensor, tokens: Tensor, position: int, scale: float, with_null: bool) -> Tensor:
        """labels (B,), tokens (B, T) of which the first ``position`` are sampled -> fp32 logits (B, V) of the next.

        ``with_null``: also run the null rows, required up to the last guided position; ``scale`` is the guidance scale.
        """
        if position == 0:
            rows, empty = (doubled_labels(labels, self.cfg.num_classes) if with_null else labels), tokens[:, :0]
            parts = rows.chunk(len(self.caches)) if with_null else (rows,)
            out = [self._run(p, empty[:1].expand(len(p), 0), c, 0) for p, c in zip(parts, self.caches, strict=False)]
        else:
            last = tokens[:, position - 1 : position]  # (B, 1)
            if with_null and not self.split:
                last = torch.cat([last, last])
            caches = self.caches if with_null else self.caches[:1]
            out = [self._step(last, c, position) for c in caches]
        joined = torch.cat(out) if len(out) > 1 else out[0]  # (B or 2B, V)
        if not with_null:
            return joined.float()
        return guide(joined.float(), scale) if scale != 1 else joined[: len(labels)].float()

    def _run(self, labels: Tensor | None, tokens: Tensor, cache: KVCache, start: int) -> Tensor:
        logits = self.model(labels, tokens, cache=cache, start=start).logits
        assert logits is not None
        return logits[:, -1]

    def _step(self, last: Tensor, cache: KVCache, position: int) -> Tensor:
        """Logits (R, V) after the tokens ``last`` (R, 1) at ``position`` of the sequence."""
        full = len(last) == cache.rows  # a smaller last batch does not justify its own graphs
        if not (self.cuda_graphs and full):
            return self._run(None, last, cache, position)
        key = (id(cache), position)
        if key not in self.graphs:
            self.graphs[key] = self._capture(last, cache, position)
        graph, tokens, logits = self.graphs[key]
        tokens.copy_(last)
        graph.replay()
        return logits.clone()  # the graphs share memory: the next one may overwrite it

    def _capture(
        self, last: Tensor, cache: KVCache, position: int
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:  # pragma: no cover  (needs a GPU)
        tokens = last.clone()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # warm-up: kernels are selected and constants created outside the capture
            self._run(None, tokens, cache, position)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self._run(None, tokens, cache, position)
        self.pool = self.pool or graph.pool()
        return graph, tokens, logits
