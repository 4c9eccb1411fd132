"""Statistics of a set of token shards: classes, codes, duplicates."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from megastar.config.schema import DataConfig
from megastar.data.shards.reader import ShardSet
from megastar.utils.progress_bar import progress_bar

_CODES_AT_ONCE = 4 << 20


@dataclass(frozen=True)
class Stats:
    """Statistics of a set with n samples, C classes and V codes."""

    labels: np.ndarray  # (n,) int64, class of each sample, by id
    classes: np.ndarray  # (C,) int64, samples per class
    codes: np.ndarray  # (V,) int64, occurrences of each code in all views
    duplicates: list[list[int]]  # groups of ids of samples with equal codes

    @property
    def entropy(self) -> float:
        """Entropy of the codes' distribution in bits; log2 V if it is uniform."""
        p = self.codes[self.codes > 0] / self.codes.sum()
        return float(-(p * np.log2(p)).sum())

    @property
    def perplexity(self) -> float:
        """The number of codes whose uniform distribution has that entropy."""
        return float(2**self.entropy)

    @property
    def usage(self) -> float:
        """Share of the codebook that is used."""
        return float((self.codes > 0).mean())


def count(folder: str | Path, data: DataConfig | None = None, progress: Console | None = None) -> Stats:
    """Read every sample of a folder or ``s3://bucket/prefix``; ``progress`` shows a bar.

    Raises ``UserError`` for a set that cannot be read and for a code or class out of range.
    """
    with closing(ShardSet(folder, data=data, max_open=1)) as shards:
        m = shards.manifest
        labels, digests = np.empty(m.samples, np.int64), np.empty(m.samples, "V16")
        codes = np.zeros(m.codebook_size, np.int64)
        shards.store.read_ahead(m.shards)
        total = sum(s.bytes for s in m.shards)
        with progress_bar(progress, "count", total, bytes=True, transient=True) as bar:
            for number, info in enumerate(m.shards):
                first, end = int(shards.starts[number]), int(shards.starts[number + 1])
                for start in range(first, end, size := max(1, _CODES_AT_ONCE // (m.views * m.tokens))):
                    ids = np.arange(start, min(start + size, end))
                    found, labels[ids] = shards.gather(ids, np.tile(np.arange(m.views), (len(ids), 1)))
                    flat = found.reshape(len(ids), -1)  # (b, views * T)
                    codes += np.bincount(flat.ravel(), minlength=m.codebook_size)
                    digests[ids] = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in flat]
                bar.advance(info.bytes)
    return Stats(labels, np.bincount(labels, minlength=len(m.classes)), codes, _groups(digests))


def _groups(digests: np.ndarray) -> list[list[int]]:
    """Groups of places with equal entries, each and all in order."""
    pairs = digests.view([("high", "<u8"), ("low", "<u8")])  # a type that numpy can sort
    _, inverse, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[inverse] > 1)
    groups: dict[int, list[int]] = {}
    for i in several.tolist():
        groups.setdefault(int(inverse[i]), []).append(i)
    return sorted(groups.values())
