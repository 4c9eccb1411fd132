"""What a set of token shards holds, counted: classes, codes, duplicates."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from megastar.config.schema import DataConfig
from megastar.data.shards.progress_bar import bar_of
from megastar.data.shards.reader import ShardSet
from megastar.errors import UserError

_AT_ONCE = 4 << 20  # codes that are counted at once


@dataclass(frozen=True)
class Stats:
    """Of a set with n samples, C classes and V codes."""

    labels: np.ndarray  # (n,) int64, class of each sample by its id
    classes: np.ndarray  # (C,) int64, samples of each class
    codes: np.ndarray  # (V,) int64, how often each code occurs, in all views
    duplicates: list[list[int]]  # ids of samples that have all codes in common, two or more each

    @property
    def entropy(self) -> float:
        """Of the codes' distribution, in bits; log2 V where all are used alike."""
        p = self.codes[self.codes > 0] / self.codes.sum()
        return float(-(p * np.log2(p)).sum())

    @property
    def perplexity(self) -> float:
        """How many codes, used alike, would have that entropy."""
        return float(2**self.entropy)

    @property
    def usage(self) -> float:
        """Share of the code book that occurs."""
        return float((self.codes > 0).mean())


def count(folder: str | Path, data: DataConfig | None = None, progress: Console | None = None) -> Stats:
    """Read every sample of a folder or ``s3://bucket/prefix``. ``progress`` shows a bar.

    Raises ``UserError`` for a set that cannot be read, and for a code or class out of range.
    """
    with closing(ShardSet(folder, data=data, max_open=1)) as shards:
        m = shards.manifest
        labels, digests = np.empty(m.samples, np.int64), np.empty(m.samples, "V16")
        codes = np.zeros(m.codebook_size, np.int64)
        shards.store.read_ahead(m.shards)
        with bar_of("count", m.shards, progress) as step:
            for number, info in enumerate(m.shards):
                first, end = int(shards.starts[number]), int(shards.starts[number + 1])
                for start in range(first, end, size := max(1, _AT_ONCE // (m.views * m.tokens))):
                    ids = np.arange(start, min(start + size, end))
                    found, labels[ids] = shards.gather(ids, np.tile(np.arange(m.views), (len(ids), 1)))
                    flat = found.reshape(len(ids), -1)  # (b, views * T)
                    if flat.max() >= m.codebook_size:
                        row = int(np.argmax(flat.max(axis=1)))
                        raise UserError(
                            f"{shards.where(int(ids[row]))} of {folder} holds code {flat[row].max()}, outside the code book of {m.codebook_size}: see `megastar data verify {folder}`"
                        )
                    codes += np.bincount(flat.ravel(), minlength=m.codebook_size)
                    digests[ids] = [hashlib.blake2b(row, digest_size=16).digest() for row in flat]
                step(info)
        outside = (labels < 0) | (labels >= len(m.classes))
        if outside.any():
            row = int(np.argmax(outside))
            raise UserError(
                f"{shards.where(row)} of {folder} has class {labels[row]}, outside 0 to {len(m.classes) - 1}: see `megastar data verify {folder}`"
            )
    return Stats(labels, np.bincount(labels, minlength=len(m.classes)), codes, _groups(digests))


def _groups(digests: np.ndarray) -> list[list[int]]:
    """Places (in order) of equal entries, for those that are not alone."""
    pairs = digests.view([("high", "<u8"), ("low", "<u8")])  # which numpy can sort
    _, inverse, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[inverse] > 1)
    groups: dict[int, list[int]] = {}
    for i in several.tolist():
        groups.setdefault(int(inverse[i]), []).append(i)
    return sorted(groups.values())
