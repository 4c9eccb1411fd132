"""Attention masks: one interval of queries per key, and a window on the token grid.

B sequences, S positions, T image tokens; position 0 is the class, position p > 0 holds token p - 1. Random-order decoding
permutes the tokens and stays causal: it needs no pattern of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from megastar.errors import UserError

T = TypeVar("T")
_STREAM = int.from_bytes(b"hidden", "big")  # makes these random numbers independent of other uses of the run's seed


@dataclass(frozen=True)
class Window:
    """Keys at most ``rows`` rows and ``columns`` columns away on a grid ``width`` tokens wide.

    The window never hides the class (position 0), neither as a key nor as a query; the intervals still apply.
    """

    width: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.rows < 0 or self.columns < 0:
            raise UserError(f"{self}: the width must be at least 1, rows and columns at least 0")

    def near(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether the window makes key positions j visible to query positions i (broadcast): bool."""
        ti, tj = i - 1, j - 1
        rows = (ti // self.width - tj // self.width).abs() <= self.rows
        columns = (ti % self.width - tj % self.width).abs() <= self.columns
        return (i == 0) | (j == 0) | (rows & columns)


@dataclass(eq=False)
class MaskSpec:
    """Key j is visible to query i iff ``start[b, j] <= i < end[b, j]`` and the ``window`` contains both.

    ``end`` (B or 1, S) int32, None: S, the end of the sequence. ``start`` likewise, None: j, which is causal. One row
    applies to all sequences. Raises ``UserError`` for a query without a visible key. Copies on other devices and forms
    built for kernels are cached, so one spec per step serves all blocks.
    """

    end: Tensor | None = None
    start: Tensor | None = None
    window: Window | None = None
    trusted: InitVar[bool] = False  # built by a constructor below, so each query sees a key: the check would sync a GPU
    _built: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self, trusted: bool) -> None:
        given = [t for t in (self.end, self.start) if t is not None]
        if any(t.ndim != 2 for t in given) or len({t.shape[1] for t in given}) > 1:
            raise UserError(
                f"mask start and end: shapes {[tuple(t.shape) for t in given]}; pass the same (B, S) for both"
            )
        self.end, self.start = (None if t is None else t.to(torch.int32) for t in (self.end, self.start))
        if given and not trusted:
            sees = self.dense(given[0].shape[1], given[0].device).any(-1)[:, 0]  # (B, S)
            self._built.clear()
            if not bool(sees.all()):
                b, i = (~sees).nonzero()[0].tolist()
                raise UserError(f"query {i} of sequence {b} sees no key: set start <= {i} < end for at least one key")

    # Constructors ----------------------------------------------------------------------------------------------------
    @classmethod
    def causal(cls) -> MaskSpec:
        return cls()

    @classmethod
    def hidden(cls, hidden: Tensor) -> MaskSpec:
        """Causal without the hidden keys, (B, S) bool: each stays visible to its own query only."""
        j, size = _positions(hidden), hidden.shape[1]
        return cls(torch.where(hidden, j + 1, size), trusted=True)

    @classmethod
    def prefix(cls, lengths: Tensor, size: int) -> MaskSpec:
        """The first ``lengths`` (B,) keys are visible to all queries, also earlier ones; then causal."""
        if size < 1 or lengths.ndim != 1:
            raise UserError(f"prefix: lengths of shape {tuple(lengths.shape)}, size {size}; pass (B,) and at least 1")
        j = torch.arange(size, device=lengths.device)[None]
        return cls(start=torch.where(j < lengths[:, None], 0, j), trusted=True)

    @classmethod
    def documents(cls, ids: Tensor) -> MaskSpec:
        """Packed documents, causal inside each: ``ids`` (B, S), consecutive equal numbers are one document."""
        j, size = _positions(ids), ids.shape[1]
        last = torch.ones_like(ids, dtype=torch.bool)
        last[:, :-1] = ids[:, 1:] != ids[:, :-1]
        ends = torch.where(last, j + 1, size).flip(1).cummin(1).values.flip(1)  # where the next document starts
        return cls(ends, trusted=True)

    @classmethod
    def sliding_window(cls, size: int, width: int) -> MaskSpec:
        """Causal, each query sees the last ``width`` keys, its own included."""
        if width < 1:
            raise UserError(f"sliding window of width {width} contains no key: use at least 1")
        return cls((torch.arange(size) + width).clamp(max=size)[None], trusted=True)

    @classmethod
    def neighbourhood(cls, width: int, rows: int, columns: int) -> MaskSpec:
        """Causal, each token sees the tokens within ``rows`` and ``columns`` on a grid ``width`` wide, and the class."""
        return cls(window=Window(width, rows, columns), trusted=True)

    @classmethod
    def row_blocks(cls, size: int, width: int, rows: int) -> MaskSpec:
        """Causal over blocks of ``rows`` rows of a grid ``width`` wide; inside a block all tokens see each other."""
        if width < 1 or rows < 1:
            raise UserError(f"blocks of {rows} rows of {width} tokens are empty: use at least 1 of each")
        j = torch.arange(size)
        return cls(start=torch.where(j > 0, 1 + (j - 1) // (width * rows) * (width * rows), 0)[None], trusted=True)

    # Views -----------------------------------------------------------------------------------------------------------
    @property
    def is_plain_causal(self) -> bool:
        return self.end is None and self.start is None and self.window is None

    @property
    def is_causal(self) -> bool:
        """No key is visible to an earlier query."""
        return self.start is None

    @property
    def kind(self) -> str:
        """What a kernel must support, in words: for messages and for choosing a kernel."""
        if self.is_plain_causal:
            return "plain causal"
        parts = ["causal"] if self.is_causal else ["not causal"]
        parts += ["column intervals"] if self.end is not None or self.start is not None else []
        return ", ".join(parts + (["2-D window"] if self.window else []))

    def to(self, device: torch.device | str) -> MaskSpec:
        """On that device; cached."""
        device = torch.device(device)
        given = [t for t in (self.end, self.start) if t is not None]
        if all(t.device == device for t in given):
            return self

        def move() -> MaskSpec:
            end, start = (None if t is None else t.to(device, non_blocking=True) for t in (self.end, self.start))
            return MaskSpec(end, start, self.window, trusted=True)

        return self.cached(("to", device), move)

    def rows(self, count: int) -> MaskSpec:
        """The mask of the first ``count`` sequences."""
        end, start = (None if t is None else t[:count] for t in (self.end, self.start))
        return MaskSpec(end, start, self.window, trusted=True)

    def dense(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """True where query i (rows) sees key j (columns): (B or 1, 1, S, S) bool."""
        at = self.to(device)
        self.check_size(size)
        i = torch.arange(size, device=device)
        seen = i[:, None] >= (i if at.start is None else at.start[:, None, None])  # (S, S) or (B, 1, S, S)
        if at.end is not None:
            seen = seen & (i[:, None] < at.end[:, None, None])
        if at.window is not None:
            seen = seen & at.window.near(i[:, None], i)
        return seen if seen.ndim == 4 else seen[None, None]

    def additive(self, size: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The same as 0 and minus infinity, to be added to the logits: (B or 1, 1, S, S) of ``dtype``; cached."""

        def make() -> Tensor:
            seen = self.dense(size, device)
            bias = torch.zeros(seen.shape, dtype=dtype, device=device)
            return bias.masked_fill_(seen.logical_not_(), float("-inf"))

        return self.cached(("additive", size, torch.device(device), dtype), make)

    def flex(self, size: int, device: torch.device | str, block: int = 128) -> Any:
        """A ``BlockMask`` for torch's flex_attention; cached.

        Its blocks are always the lower triangle (all blocks if not causal), and its ``mask_mod`` reads tensors: a new
        random mask does not recompile.
        """

        def make() -> Any:
            from torch.nn.attention.flex_attention import BlockMask

            self.check_size(size)
            n = -(-size // block)
            indices = torch.arange(n, dtype=torch.int32, device=device).expand(1, 1, n, n).contiguous()
            counts = indices[:, :, 0] + 1 if self.is_causal else torch.full_like(indices[:, :, 0], n)
            reads = mask_mod(self.to(device))
            return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=block, mask_mod=reads, seq_lengths=(size, size))

        return self.cached(("flex", size, torch.device(device), block), make)

    def cached(self, key: Any, make: Callable[[], T]) -> T:
        """The result of ``make``, called once: another form of this mask, for a kernel."""
        if key not in self._built:
            with torch.inference_mode(False):  # a form built while sampling must be usable in training
                self._built[key] = make()
        return self._built[key]

    def check_size(self, size: int) -> None:
        for t in (self.end, self.start):
            if t is not None and t.shape[1] != size:
                raise UserError(f"mask for {t.shape[1]} positions, but the sequence has {size}: build it for {size}")


def mask_mod(spec: MaskSpec) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """``spec`` as flex_attention's function of (batch, head, query, key), which reads the intervals from the tensors."""
    end, start, window = spec.end, spec.start, spec.window

    def at(intervals: Tensor, b: Tensor, j: Tensor) -> Tensor:
        return intervals[0 if intervals.shape[0] == 1 else b, j]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= (j if start is None else at(start, b, j))
        if end is not None:
            seen = seen & (i < at(end, b, j))
        return seen if window is None else seen & window.near(i, j)

    return visible


def _positions(like: Tensor) -> Tensor:
    """0..S - 1 of like (B, S): (1, S) int64."""
    if like.ndim != 2 or not like.shape[1]:
        raise UserError(f"mask from a tensor of shape {tuple(like.shape)}: pass (B, S) with S of at least 1")
    return torch.arange(like.shape[1], device=like.device)[None]


PATTERNS: dict[str, Callable[..., MaskSpec]] = {
    "causal": MaskSpec.causal,
    "hidden": MaskSpec.hidden,
    "prefix": MaskSpec.prefix,
    "documents": MaskSpec.documents,
    "sliding_window": MaskSpec.sliding_window,
    "neighbourhood": MaskSpec.neighbourhood,
    "row_blocks": MaskSpec.row_blocks,
}


def draw_hidden(seed: int, epochs: ArrayLike, ids: ArrayLike, tokens: int, ratio: float, view: int = 0) -> Tensor:
    """Random hidden keys of one view of each sample: (B, T) bool, on CPU, exactly round(ratio * (T - 1)) true per row.

    Drawn from the T - 1 image-token inputs: column 0, the class, is never hidden. A row is a pure function of (seed,
    epoch, id, view), independent of ranks, batch order and restarts. epochs, ids (B,) integers >= 0.
    """
    count = round(ratio * (tokens - 1))
    ids = np.asarray(ids)
    hidden = np.zeros((len(ids), tokens), dtype=bool)
    # One counter-based generator, moved to the counter of each sample and view: cheaper than a new one per sample.
    bits = np.random.Philox(key=[seed, _STREAM])
    rng, state = np.random.Generator(bits), bits.state
    for row, epoch, sample in zip(hidden, np.asarray(epochs), ids, strict=True):
        state["state"]["counter"][:] = (0, view, int(epoch), int(sample))
        bits.state = state
        row[1 + rng.permutation(tokens - 1)[:count]] = True
    return torch.from_numpy(hidden)
