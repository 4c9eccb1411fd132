"""Re-read a finished set of token shards against its manifest, and name every shard that differs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from megastar.config.schema import DataConfig
from megastar.data.files import sha256_of
from megastar.data.manifest import ShardInfo
from megastar.data.shard_set import ShardSet
from megastar.errors import UserError

_SAMPLES = 256  # that are looked at together


def broken_shards(
    folder: str | Path, data: DataConfig | None = None, console: Console | None = None
) -> list[tuple[ShardInfo, str]]:
    """Shards that differ from the manifest of a folder or s3:// URL, each with the reason; reads every byte.

    Looked at are bytes, SHA-256, the number of samples, the shape of the views, that codes are of the code book and
    labels of the classes. Raises ``UserError`` for a manifest that cannot be read.
    """
    with closing(ShardSet(folder, data=data)) as shards:
        numbers = range(len(shards.manifest.shards))
        bar = track(numbers, "verify", console=console or Console(), transient=True)
        return [(shards.manifest.shards[i], "; ".join(reasons)) for i in bar if (reasons := list(_faults(shards, i)))]


def _faults(shards: ShardSet, number: int) -> Iterator[str]:
    m, info = shards.manifest, shards.manifest.shards[number]
    try:
        with shards.store.open(info) as f:
            if (found := sha256_of(f)) != info.sha256:
                yield f"SHA-256 is {found}, the manifest says {info.sha256}"
        if not info.samples:
            return
        shards.open(number)
        highest, classes = -1, -1
        first, end = int(shards.starts[number]), int(shards.starts[number + 1])
        for start in range(first, end, _SAMPLES):
            ids = np.arange(start, min(end, start + _SAMPLES))
            codes, labels = shards.gather(ids, np.tile(np.arange(m.views), (len(ids), 1)))
            highest, classes = max(highest, int(codes.max())), max(classes, int(labels.max()))
            if labels.min() < 0:
                yield f"holds class {labels.min()}"
        if highest >= m.codebook_size:
            yield f"holds code {highest}, the code book has {m.codebook_size}"
        if classes >= len(m.classes):
            yield f"holds class {classes}, the manifest names {len(m.classes)}"
    except UserError as error:
        yield str(error)
