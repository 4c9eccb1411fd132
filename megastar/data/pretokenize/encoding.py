"""Pictures of one shard to codes: decoded ahead, cropped, encoded, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from megastar.data.images.crops import Crops
from megastar.data.images.dataset import PictureError, PictureSet
from megastar.tokenizer.vq import VQModel

_CPU_BYTES = 5 << 20  # of one full-resolution activation: 20 crops of the demo, measured 1.4 times as fast as 80
_GPU_CROPS = 64


class ViewEncoder:
    """A tokenizer with its batch size: uint8 crops (N, size, size, 3) -> codes (N, T) int64 on the CPU."""

    def __init__(self, model: VQModel, device: torch.device, dtype: torch.dtype, batch: int):
        model.encoder.to(memory_format=torch.channels_last)  # 1.6 times the speed of NCHW on the CPU
        self.model = model
        self.device, self.dtype, self.size = device, dtype, model.config.image_size
        activation = self.size**2 * model.config.channels * 4
        self.batch = batch or (_GPU_CROPS if device.type == "cuda" else min(64, max(1, _CPU_BYTES // activation)))

    @torch.inference_mode()
    def __call__(self, crops: np.ndarray) -> np.ndarray:
        parts = []
        for part in torch.from_numpy(crops).split(self.batch):
            # (B, 3, H, W) in channels_last. The arithmetic of ToTensor and Normalize, so that codes equal LlamaGen's.
            images = part.to(self.device).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # fp32 means fp32, on a GPU too
            with exact, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                parts.append(self.model.encode(images).cpu())
        return torch.cat(parts).numpy()


@dataclass(frozen=True)
class Cut:
    """The crops of some pictures, those that can be read; once encoded, their codes."""

    pictures: int  # how many, the skipped ones included
    places: list[tuple[int, int]]  # (place in the permutation, picture number) of the n readable ones
    data: np.ndarray  # (n, views, size, size, 3) uint8, then (n, views, T) int64
    skipped: list[dict[str, str]]


class Pipeline:
    """Threads that decode ahead of the encoder. ``with`` it.

    On the CPU each worker decodes and encodes its own pictures with one torch thread: no barriers, nobody waits for
    another. For a GPU the workers decode and the caller's thread encodes. Batches are of a fixed composition, so the
    codes do not depend on the number of workers.
    """

    def __init__(self, pictures: PictureSet, crops: Crops, views: int, encoder: ViewEncoder, workers: int):
        self.pictures, self.crops, self.encoder, self.workers = pictures, crops, encoder, workers
        self.at_once = max(1, encoder.batch // views)  # pictures an encoder call
        self.on_cpu = encoder.device.type == "cpu"
        self.waited = self.encoded = 0.0  # seconds: of the encoder, or on the CPU of all workers together
        self._lock = threading.Lock()

    def __enter__(self) -> Pipeline:
        self._threads = torch.get_num_threads()
        if self.on_cpu:
            torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    @property
    def waiting(self) -> float:
        """Share of its time that the encoder had to wait for decoded pictures."""
        return self.waited / max(1e-9, self.waited + self.encoded)

    def __call__(self, places: list[tuple[int, int]]) -> Iterator[Cut]:
        """(place, picture number) of a shard, in order -> their codes in the same order."""
        ahead = deque[Future[Cut]]()
        try:
            for i in range(0, len(places), self.at_once):
                ahead.append(self._pool.submit(self._work, places[i : i + self.at_once]))
                if len(ahead) > 2 * self.workers + 2:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            for future in ahead:
                future.cancel()

    def _work(self, places: list[tuple[int, int]]) -> Cut:
        start = time.perf_counter()
        c = self._cut(places)
        return self._encode(c, time.perf_counter() - start) if self.on_cpu else c

    def _next(self, ahead: deque[Future[Cut]]) -> Cut:
        start = time.perf_counter()
        c = ahead.popleft().result()
        return c if self.on_cpu else self._encode(c, time.perf_counter() - start)

    def _cut(self, places: list[tuple[int, int]]) -> Cut:
        """Decode and crop; a picture that cannot be used is named in ``skipped``."""
        good, made, skipped = [], [], []
        for place, i in places:
            try:
                made.append(self.crops(self.pictures.read(i), self.encoder.size))
                good.append((place, i))
            except PictureError as error:
                skipped.append({"picture": self.pictures.pictures[i].key, "reason": str(error)})
        return Cut(len(places), good, np.stack(made) if made else np.empty(0, np.uint8), skipped)

    def _encode(self, c: Cut, waited: float) -> Cut:
        start = time.perf_counter()
        if c.places:
            n, views = c.data.shape[:2]
            codes = self.encoder(c.data.reshape(n * views, *c.data.shape[2:]))
            c = replace(c, data=codes.reshape(n, views, -1))
        with self._lock:
            self.waited += waited
            self.encoded += time.perf_counter() - start
        return c
