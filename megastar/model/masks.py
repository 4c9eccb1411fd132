"""Who attends to whom: causal, minus the key columns that self-guided training hides.

B sequences, S positions, T image tokens; position 0 is the class, position p > 0 holds token p - 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_STREAM = int.from_bytes(b"hidden", "big")  # keeps these draws apart from every other use of the run's seed


@dataclass(eq=False)
class MaskSpec:
    """A mask as one interval a key: key j is visible to query i iff ``j <= i < end[j]``.

    ``end`` (B, S) int32, or None for plain causal attention. Hidden means end = j + 1: a hidden key stays visible to
    its own query. Dense forms are built once and shared by all blocks.
    """

    end: Tensor | None = None
    _built: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def hidden(cls, hidden: Tensor) -> MaskSpec:
        """From the hidden keys: (B, S) bool."""
        size = hidden.shape[1]
        j = torch.arange(size, dtype=torch.int32, device=hidden.device)
        return cls(torch.where(hidden, j + 1, size).to(torch.int32))

    @property
    def is_plain_causal(self) -> bool:
        return self.end is None

    def dense(self, size: int, device: torch.device | str) -> Tensor:
        """True where query i (rows) sees key j (columns): (B, 1, S, S) bool, or (1, 1, S, S) for plain causal."""
        device = torch.device(device)
        key = (size, device)
        if key not in self._built:
            i = torch.arange(size, device=device)
            seen = (i[:, None] >= i)[None, None]  # (1, 1, S, S)
            if self.end is not None:
                seen = seen & (i[:, None] < self.end.to(device)[:, None, None, :size])
            self._built[key] = seen
        return self._built[key]

    def additive(self, size: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The same as 0 and minus infinity, to be added to the logits: (B or 1, 1, S, S) of ``dtype``."""
        device = torch.device(device)
        key = (size, device, dtype)
        if key not in self._built:
            seen = self.dense(size, device)
            self._built[key] = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        return self._built[key]


def draw_hidden(
    seed: int, epochs: Tensor | np.ndarray, ids: Tensor | np.ndarray, tokens: int, ratio: float, view: int = 0
) -> Tensor:
    """Hidden keys of one view of each sample: (B, T) bool, on CPU, exactly round(ratio * (T - 1)) true in each row.

    Drawn from the T - 1 image-token inputs: column 0, the class, is never hidden. A pure function of (seed, epoch, id,
    view) of each row, so ranks, batch order and restarts do not matter. epochs, ids (B,) integers >= 0.
    """
    count = round(ratio * (tokens - 1))
    hidden = np.zeros((len(ids), tokens), dtype=bool)
    for row, epoch, sample in zip(hidden, np.asarray(epochs), np.asarray(ids), strict=True):
        # A counter-based generator, set to a place of its own for each sample and view.
        rng = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, view, int(epoch), int(sample)]))
        row[1 + rng.permutation(tokens - 1)[:count]] = True
    return torch.from_numpy(hidden)
