"""Token shards as a map-style ``torch.utils.data.Dataset``, for training code other than megastar's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megastar.config.schema import DataConfig
from megastar.data.shards.manifest import Manifest, load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.errors import UserError


class TokenDataset(Dataset[dict[str, Any]]):
    """The samples of a folder of token shards, or of ``s3://bucket/prefix``, in the order of the manifest.

    A sample is a dict: ``codes`` (M, T) int64 tensor, ``label`` and ``id``, integers. A ``DataLoader`` may shuffle it and
    read it in any number of workers, forked or spawned: each process opens the shards itself.

    Args:
        path: folder with a ``manifest.json``, or its URL.
        views: which of the stored crops of an image. None: all in their order; a sequence of numbers: these; an integer
            M: M different ones, drawn anew by torch's generator whenever the sample is read.
        cache: folder that keeps shards read from s3:// (empty: a per-user directory under $TMPDIR). Shuffled reading
            is fast only if it holds all of them.
        cache_gib: bound of the cache in GiB.
        patience: seconds that an outage of s3:// may last before reading fails.

    Raises ``UserError`` for shards that are missing or damaged, when they are read, and for views that do not exist.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        views: int | Sequence[int] | None = None,
        cache: str | Path = "",
        cache_gib: float = 64.0,
        patience: float = 1800.0,
    ):
        self.path, self._data = path, DataConfig(cache=str(cache), cache_gib=cache_gib, patience=patience)
        self.manifest: Manifest = load_manifest(path, self._data)
        stored = self.manifest.views
        self._drawn = views if isinstance(views, int) else 0
        self._views = np.arange(stored) if views is None or isinstance(views, int) else np.array(views, np.int64)
        if isinstance(views, int) and not 1 <= views <= stored:
            raise UserError(f"views = {views}: the shards in {path} store {stored} views per image; give 1 to {stored}")
        if not self._views.size or self._views.min() < 0 or self._views.max() >= stored:
            raise UserError(f"views = {views}: select at least one of the views 0 to {stored - 1} stored in {path}")
        self._shards: ShardSet | None = None
        self._process = 0  # that opened them

    @property
    def classes(self) -> list[str]:
        """The name of each class, by number."""
        return self.manifest.classes

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Some samples at once: how ``DataLoader`` asks for a batch."""
        n = len(self)
        for i in indices:
            if not -n <= i < n:
                raise IndexError(f"sample {i} is outside the {n} samples of {self.path}")
        ids = np.asarray([i % n for i in indices], np.int64)
        views = np.tile(self._views, (len(ids), 1))
        if self._drawn:
            views = torch.rand(len(ids), self.manifest.views).argsort(1)[:, : self._drawn].numpy()
        codes, labels = self._open().gather(ids, views)
        rows = torch.from_numpy(codes.astype(np.int64))
        return [{"codes": c, "label": int(y), "id": int(i)} for c, y, i in zip(rows, labels, ids, strict=True)]

    def _open(self) -> ShardSet:
        """The shards as this process opened them: files and threads of a parent process are not used."""
        if self._shards is None or self._process != os.getpid():
            self._shards, self._process = ShardSet(self.path, data=self._data), os.getpid()
        return self._shards

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": None}

    def close(self) -> None:
        """Close the shards; they are opened again when a sample is read."""
        if self._shards is not None and self._process == os.getpid():
            self._shards.close()
        self._shards = None
