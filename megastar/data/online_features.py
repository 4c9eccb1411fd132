"""Features for representation alignment that are computed in training, from the images that the shards were made from.

They take the place of stored features (data/shards/features.py): the same crops, encoder, averaging and rounding to
float16. A sample names its image (``KEY.json``); view v is crop v of that image.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from megastar.config.sections.repa import RepaConfig
from megastar.data.images.crops import parse_crops
from megastar.data.images.dataset import ImageSet
from megastar.data.images.image_files import ImageError
from megastar.data.pretokenize.encoding import ViewEncoder
from megastar.data.pretokenize.features import FeatureEncoder
from megastar.data.shards.features import StoredFeatures
from megastar.data.shards.manifest import Manifest
from megastar.data.shards.reader import ShardSet
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer
from megastar.utils.launcher import cores_of_rank

_COMPARED = 8  # images whose codes are compared, once
# Share of their codes that must be equal, by the encoder's type: near ties differ between processors, and more in bf16.
_LEAST_EQUAL = {"fp32": 0.9, "bf16": 0.5}


class OnlineFeatures:
    """Features of the samples of ``shards``, from ``repa.pictures``.

    Args:
        tokenizer: file of the tokenizer that made the shards; the codes of the first images are then compared with the
            shards', since images may change under the same name. Empty: not compared.

    Raises ``UserError`` for shards that do not record their images, other images than theirs, and errors of the encoder.
    Not thread-safe.
    """

    def __init__(self, repa: RepaConfig, shards: ShardSet, tokenizer: str = ""):
        m = shards.manifest
        self.repa, self.shards, self.tokenizer = repa, shards, tokenizer
        self.images = _images_of(repa.pictures, m, f"{shards.folder}")
        self.make, views = parse_crops(m.crops)
        if views != m.views:
            raise UserError(
                f"{shards.folder} has {m.views} views of crops {m.crops}, which gives {views}: pretokenize again"
            )
        self.place(torch.device("cpu"))
        self._threads: ThreadPoolExecutor | None = None
        self._numbers: dict[int, np.ndarray] = {}  # shard -> number of the image of each of its samples
        self._compared = not tokenizer

    def place(self, device: torch.device) -> None:
        """Where the encoder runs; on a GPU in a stream of its own. At first on the CPU."""
        m, weights = self.shards.manifest, self.repa.encoder_weights or None
        self.encoder = FeatureEncoder(self.repa.encoder, weights, device, m.grid, m.image_size, self.repa.feature_pool)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def stored(self) -> StoredFeatures:
        """What a manifest would record of them."""
        return self.encoder.stored

    def gather_features(self, ids: Sequence[int] | np.ndarray, views: np.ndarray) -> np.ndarray:
        """ids (B,), view numbers (B, M) -> the encoder's features (B, M, P, C) float16, P patches in raster order.

        Raises ``UserError`` for an image that is gone, cannot be read, or has other codes than its sample.
        """
        ids = np.asarray(ids, np.int64)
        shards = np.searchsorted(self.shards.starts, ids, side="right") - 1
        numbers = [
            int(self._of_shard(s)[i - self.shards.starts[s]])
            for s, i in zip(shards.tolist(), ids.tolist(), strict=True)
        ]
        crops = np.stack(list(self._pool().map(self._crops, ids.tolist(), numbers, views)))  # (B, M, size, size, 3)
        if not self._compared:
            self._compare(ids[:_COMPARED], views[:_COMPARED], crops[:_COMPARED])
            self._compared = True
        flat = torch.from_numpy(crops).flatten(0, 1)
        if self._stream is not None:  # of this thread: leaving the stream would else create a context on the first GPU
            torch.cuda.set_device(self._stream.device)
        with torch.cuda.stream(self._stream):  # does nothing for None
            features = self.encoder(flat)
        return features.reshape(*views.shape, self.stored.patches, self.stored.width)

    def close(self) -> None:
        """End the decoding threads. They are started again when needed."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(16, cores_of_rank(os.environ)), "pictures")
        return self._threads

    def _of_shard(self, shard: int) -> np.ndarray:
        if shard not in self._numbers:
            names = self.shards.sources(shard)
            self._numbers[shard] = np.array([self._number(name, shard) for name in names], np.int64)
        return self._numbers[shard]

    def _number(self, name: str, shard: int) -> int:
        """The images are sorted by key."""
        key = os.fsencode(name)
        i = bisect_left(range(len(self.images)), key, key=lambda n: os.fsencode(self.images[n].key))
        if i == len(self.images) or self.images[i].key != name:
            where = f"{self.shards.manifest.shards[shard].name} of {self.shards.folder}"
            raise UserError(
                f"{where} is of the image {name!r:.200}, which {self.images.source} lacks: pretokenize again"
            )
        return i

    def _crops(self, sample: int, number: int, views: np.ndarray) -> np.ndarray:
        """(M, size, size, 3) uint8."""
        try:
            made = self.make(self.images.read(number), self.shards.manifest.image_size)
            return np.asarray(made[views])
        except ImageError as error:
            where = f"{self.shards.where(sample)} of {self.shards.folder}"
            raise UserError(
                f"the image of {where} cannot be read ({error}): restore it in {self.images.source}"
            ) from error

    def _compare(self, ids: np.ndarray, views: np.ndarray, crops: np.ndarray) -> None:
        wanted, _ = self.shards.gather(ids, views)  # (B, M, T)
        cpu = torch.device("cpu")
        encode = ViewEncoder(load_tokenizer(self.tokenizer, cpu), cpu, torch.float32, batch=0)
        codes = encode(crops.reshape(-1, *crops.shape[2:])).reshape(wanted.shape)
        equal = (codes == wanted).mean((1, 2))
        least = _LEAST_EQUAL.get(str(self.shards.manifest.made_by.get("dtype")), _LEAST_EQUAL["bf16"])
        if (worst := float(equal.min())) < least:
            sample = int(ids[equal.argmin()])
            raise UserError(
                f"{self.shards.where(sample)} of {self.shards.folder} is not of the image in {self.images.source} that it names: "
                f"{self.tokenizer} gives {worst:.0%} of its codes. The images were changed: restore them, or pretokenize again"
            )


def _images_of(source: str, m: Manifest, shards: str) -> ImageSet:
    """The images of ``source`` that the shards were made from. Raises ``UserError`` for others."""
    count, digest, subset = (m.made_by.get(name) for name in ("pictures", "pictures_sha256", "subset"))
    if not m.image_size or type(count) is not int or not isinstance(digest, str) or not isinstance(subset, str):
        raise UserError(
            f"{shards} does not record the images that it was made from, which repa.online reads: make the set again with "
            "megastar pretokenize"
        )
    images = ImageSet(source if "://" in source else Path(source), subset)
    if len(images) != count or images.digest() != digest:
        part = f" (subset {subset!r})" if subset else ""
        raise UserError(
            f"repa.pictures = {source}{part} has {len(images)} images in {len(images.class_names)} classes, which are not the "
            f"{count} images that {shards} was made from: name the folder or tar that was pretokenized, with its classes as folders"
        )
    return images
