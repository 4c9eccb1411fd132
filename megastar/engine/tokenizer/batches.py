"""The images of the tokenizer's training: random crops for a step, centre crops of the held-out ones. Each rank reads its part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import numpy as np
import torch
from PIL import Image

from megastar.config.schema import TokenizerTrainConfig
from megastar.data.images.dataset import ImageSet, center_crop, crop_at, draw_crop
from megastar.data.images.image_files import ImageError
from megastar.errors import UserError
from megastar.parallel.replicas import Replicas

logger = logging.getLogger(__name__)
POLL = 0.1  # seconds between looks at the stop signal while a batch is read
DECODERS = 4


class Batches:
    """step -> this rank's part of the step's uint8 images, (B / ranks, H, W, 3), computed one step ahead.

    The batch is a pure function of the step and the seed, the same on any number of ranks. An unreadable image is replaced
    by the next one and recorded in ``broken``.
    """

    def __init__(self, pictures: ImageSet, cfg: TokenizerTrainConfig, replicas: Replicas | None = None):
        self.pictures, self.cfg, self.replicas = pictures, cfg, replicas or Replicas()
        self.broken: set[str] = set()
        self.ahead: dict[int, Future[torch.Tensor]] = {}
        self.maker, self.decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(DECODERS)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.maker.shutdown(wait=False, cancel_futures=True)
        self.decoders.shutdown(wait=False, cancel_futures=True)

    def __call__(self, step: int) -> torch.Tensor:
        found = self.wait(step)
        assert found is not None
        return found

    def wait(self, step: int, stopped: Callable[[], bool] = lambda: False) -> torch.Tensor | None:
        """The part of ``step``; None once ``stopped``, while it is read. Raises ``UserError``."""
        if step not in self.ahead:
            self.ahead = {step: self.maker.submit(self.make, step)}
        while True:
            try:
                found = self.ahead[step].result(POLL)
            except NotYet:
                if stopped():
                    return None
                continue
            self.ahead = {step + 1: self.maker.submit(self.make, step + 1)}
            return found

    def make(self, step: int) -> torch.Tensor:
        c, size = self.cfg, self.cfg.tokenizer.image_size
        epoch, k = divmod(step, len(self.pictures) // c.batch)
        order = np.random.default_rng([c.seed, epoch]).permutation(len(self.pictures))
        chosen = order[k * c.batch : (k + 1) * c.batch]
        rng = np.random.default_rng([c.seed, step, 1])
        places = [draw_crop(size, rng, c.max_scale) for _ in range(c.batch)]  # of all ranks
        mine = self.replicas.part(c.batch)
        images = self.decoders.map(self.read, chosen[mine].tolist())
        return torch.from_numpy(np.stack([crop_at(i, size, p) for i, p in zip(images, places[mine], strict=True)]))

    def read(self, i: int) -> Image.Image:
        for k in range(len(self.pictures)):
            j = (i + k) % len(self.pictures)
            try:
                return self.pictures.read(j)
            except ImageError:
                self.broken.add(self.pictures[j].key)
        raise UserError(f"no image of {self.pictures.source} can be read: check the files")


class HeldOut:
    """Centre crops of the images of a subset; each rank reads a contiguous part, in batches, anew for each validation."""

    def __init__(self, pictures: ImageSet, size: int, replicas: Replicas):
        self.pictures, self.size, self.reported = pictures, size, False
        count, rank, world = len(pictures), replicas.rank, replicas.world
        self.mine = range(count * rank // world, count * (rank + 1) // world)
        self.most = -(-count // world)  # images of a rank

    def __len__(self) -> int:
        """Images of all ranks."""
        return len(self.pictures)

    def rounds(self, batch: int) -> int:
        """The number of batches of the rank that has the most."""
        return -(-self.most // batch)

    def batches(self, batch: int) -> Iterator[torch.Tensor]:
        """uint8 (B, H, W, 3) of this rank. Unreadable images are skipped, with a warning the first time."""
        bad: list[str] = []
        with ThreadPoolExecutor(DECODERS) as pool:
            parts = [self.mine[i : i + batch] for i in range(0, len(self.mine), batch)]
            ahead: list[Future[np.ndarray | str]] = []
            for part, following in zip(parts, [*parts[1:], range(0)], strict=False):  # a rank may have no part
                current = ahead or [pool.submit(self._read, i) for i in part]
                ahead = [pool.submit(self._read, i) for i in following]
                read = [f.result() for f in current]
                bad += [r for r in read if isinstance(r, str)]
                if good := [r for r in read if isinstance(r, np.ndarray)]:
                    yield torch.from_numpy(np.stack(good))
        if bad and not self.reported:
            self.reported = True
            where = f"{self.pictures.source} ({self.pictures.subset})"
            logger.warning("%s: %d images cannot be read, they are not scored: %s", where, len(bad), "; ".join(bad[:3]))

    def first(self, count: int) -> torch.Tensor:
        """The first ``count`` readable images of all ranks': uint8 (N, H, W, 3), N at most ``count``."""
        found: list[np.ndarray] = []
        for i in range(min(len(self.pictures), 4 * count)):
            if len(found) < count and isinstance(image := self._read(i), np.ndarray):
                found.append(image)
        return (
            torch.from_numpy(np.stack(found)) if found else torch.zeros(0, self.size, self.size, 3, dtype=torch.uint8)
        )

    def _read(self, i: int) -> np.ndarray | str:
        try:
            return np.asarray(center_crop(self.pictures.read(i), self.size))
        except ImageError as error:
            return str(error)
