"""One step of decoding, from the tokens drawn so far to the next token's logits; and the CUDA graphs of whole steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megastar.model.factorised import FactorisedHead
from megastar.model.token_order import Placement
from megastar.model.transformer import Transformer
from megastar.sampling.guidance import doubled_labels, guide
from megastar.sampling.kv_cache import KVCache
from megastar.sampling.packed_linear import decoding_copy
from megastar.sampling.step_schedules import DecodingStep


class CachedDecoder:
    """A network and its cache for ``batch`` images.

    ``guided``: the cache also has rows for the null class. ``passes`` 1 runs conditional and null rows as one batch, 2 one
    after the other (half the activations; the same logits up to rounding).
    """

    def __init__(self, model: Transformer, batch: int, guided: bool, *, passes: int = 1):
        assert passes in (1, 2), passes
        weight = next(model.parameters())
        self.cfg, self.device, self.dtype = model.cfg, weight.device, weight.dtype
        self.model = decoding_copy(model)
        self.split = guided and passes == 2
        rows = batch * (2 if guided and not self.split else 1)
        self.caches = [KVCache.for_model(self.cfg, rows, weight.dtype, self.device) for _ in range(1 + self.split)]

    def logits(self, labels: Tensor, tokens: Tensor, position: int, scale: float, with_null: bool) -> Tensor:
        """labels (B,), tokens (B, T) of which the first ``position`` are sampled -> fp32 logits (B, V) of the next.

        ``with_null``: also run the null rows, required up to the last guided position; ``scale`` is the guidance scale.
        """
        caches = self.caches if with_null else self.caches[:1]
        if position == 0:
            rows, empty = (doubled_labels(labels, self.cfg.num_classes) if with_null else labels), tokens[:, :0]
            parts = rows.chunk(len(caches))
            out = [self._run(p, empty[:1].expand(len(p), 0), c, 0) for p, c in zip(parts, caches, strict=True)]
        else:
            last = tokens[:, position - 1 : position]  # (B, 1)
            if with_null and not self.split:
                last = torch.cat([last, last])
            out = [self._run(None, last, c, position) for c in caches]
        joined = torch.cat(out) if len(out) > 1 else out[0]  # (B or 2B, V)
        if not with_null:
            return joined.float()
        return guide(joined.float(), scale) if scale != 1 else joined[: len(labels)].float()

    def states(self, labels: Tensor, tokens: Tensor, position: int, with_null: bool) -> Tensor:
        """As ``logits``, for a factorised head: the input (B or 2B, D) of the head of the first sub-code, null rows last."""
        caches = self.caches if with_null else self.caches[:1]
        rows = doubled_labels(labels, self.cfg.num_classes) if with_null else labels
        last = tokens[:, :0] if position == 0 else tokens[:, position - 1 : position]
        last = torch.cat([last, last]) if with_null else last
        parts = zip(rows.chunk(len(caches)), last.chunk(len(caches)), caches, strict=True)
        out = [self._state(p if position == 0 else None, t, c, position) for p, t, c in parts]
        return torch.cat(out) if len(out) > 1 else out[0]

    def _state(self, labels: Tensor | None, tokens: Tensor, cache: KVCache, start: int) -> Tensor:
        last = self.model(labels, tokens, cache=cache, start=start, need_logits=False).last
        assert last is not None
        state: Tensor = self.model.norm(last)[:, -1]
        return state

    def query_states(
        self, labels: Tensor, tokens: Tensor, orders: Tensor, step: DecodingStep, with_null: bool
    ) -> Tensor:
        """For a network of random order: the head's inputs (B or 2B, count, D) for the tokens of ``step``, null rows last.

        labels (B,), tokens and orders (B, T) in the order of drawing. Input i > 0 is token i - 1. The inputs from ``start``
        to before ``first`` enter the cache, as in training: each with the target that came next. Then the last known token
        is the input of ``drawn`` queries, one for each target: a query computes what it would in training if its target
        came next, so the tokens of a step are drawn independently given all earlier ones.
        """
        caches = self.caches if with_null else self.caches[:1]
        start, first, count = step
        own = torch.cat([torch.zeros_like(orders[:, :1]), 1 + orders[:, :first]], 1)  # (B, 1 + first) of the inputs
        again = first + 1 - start  # the inputs of this pass, before the last one is repeated
        own = torch.cat([own[:, start:], own[:, -1:].expand(-1, count - 1)], 1)  # (B, again + count - 1)
        inputs = labels[:, None].expand(-1, count)
        if first:
            known = tokens[:, start - 1 : first]  # (B, again)
            inputs = torch.cat([known, known[:, -1:].expand(-1, count - 1)], 1)
        null = torch.full_like(inputs, self.cfg.num_classes) if not first else inputs
        placement = Placement(own, orders[:, start : first + count])
        assert inputs.shape[1] == again + count - 1 == placement.target.shape[1]
        if with_null:
            inputs = torch.cat([inputs, null])
            placement = Placement(*(torch.cat([p, p]) for p in placement))
        parts = zip(*(x.chunk(len(caches)) for x in (inputs, *placement)), caches, strict=True)
        out = []
        for some, at, target, cache in parts:
            cache.queries = count
            given = (None, some) if first else (some, None)
            where = Placement(at, target)
            last = self.model(*given, cache=cache, start=start, need_logits=False, placement=where).last
            cache.queries = 1
            assert last is not None
            out.append(self.model.norm(last[:, -count:]))
        return torch.cat(out) if len(out) > 1 else out[0]

    def code_logits(self, states: Tensor, rows: int, scale: float | Tensor) -> Tensor:
        """States of a full head (``rows`` or twice as many, count, D) -> guided fp32 logits (rows, count, V)."""
        return self._guided(self.model.output(states).float(), rows, scale)

    def _guided(self, logits: Tensor, rows: int, scale: float | Tensor) -> Tensor:
        if len(logits) == rows:
            return logits
        return logits[:rows] if isinstance(scale, float) and scale == 1 else guide(logits, scale)

    def sub_logits(self, states: Tensor, index: int, rows: int, scale: float | Tensor) -> Tensor:
        """States of sub-code ``index`` (``rows`` or twice as many, ..., D) -> guided fp32 logits (rows, ..., V_index)."""
        return self._guided(self._head.heads[index](states).float(), rows, scale)

    def next_states(self, states: Tensor, index: int, drawn: Tensor) -> Tensor:
        """States of sub-code ``index`` and what was drawn (rows, ...) -> the states of the next one; null rows get the same."""
        codes = drawn if len(states) == len(drawn) else torch.cat([drawn, drawn])
        out: Tensor = self._head.mixers[index](states, codes)
        return out

    @property
    def _head(self) -> FactorisedHead:
        head = self.model.output
        assert isinstance(head, FactorisedHead)
        return head

    def _run(self, labels: Tensor | None, tokens: Tensor, cache: KVCache, start: int) -> Tensor:
        logits = self.model(labels, tokens, cache=cache, start=start).logits
        assert logits is not None
        return logits[:, -1]


class StepGraphs:
    """A CUDA graph for each position (or parallel step) of ``step``, which reads and writes only tensors that exist before its first call.

    A step is hundreds of small kernels that take less time than their launches. The first call at a position runs the
    step and records it; later ones replay it. All graphs use one memory pool: no result of a step outlives it there, so
    the pool is as large as the largest step. The prefix length is part of a graph: nothing beyond the prefix is read.
    """

    def __init__(self, step: Callable[[int], None], device: torch.device):
        self.step, self.stream = step, torch.cuda.Stream(device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __contains__(self, position: int) -> bool:
        return position in self.graphs

    def __call__(self, position: int) -> None:
        """Run the step at ``position``; the current stream waits for it."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            if position in self.graphs:
                self.graphs[position].replay()
            else:
                self.step(position)  # selects kernels and creates constants, which a capture must not do
                self._capture(position)
        current.wait_stream(self.stream)

    def _capture(self, position: int) -> None:
        """Record the step: nothing runs. (``torch.cuda.graph`` would synchronize and collect garbage for each.)"""
        graph, first = torch.cuda.CUDAGraph(), next(iter(self.graphs.values()), None)
        graph.capture_begin(pool=None if first is None else first.pool(), capture_error_mode="thread_local")
        try:
            self.step(position)
        finally:
            graph.capture_end()
        self.graphs[position] = graph
