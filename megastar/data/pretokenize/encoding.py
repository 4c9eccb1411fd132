"""Images of one shard to codes: decoded ahead, cropped, encoded, in order."""

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
from megastar.data.images.dataset import ImageSet
from megastar.data.images.image_files import ImageError
from megastar.data.pretokenize.features import FeatureEncoder
from megastar.tokenizer.vq import VQModel
from megastar.utils.device import exact_convolutions

_CPU_BYTES = 5 << 20  # of one full-resolution activation: 20 crops in the demo, 1.4 times as fast as 80
_GPU_CROPS = 64


class ViewEncoder:
    """A tokenizer with its batch size: uint8 crops (N, size, size, 3) -> codes (N, T) int64 on the CPU."""

    def __init__(
        self,
        model: VQModel,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        features: FeatureEncoder | None = None,
    ):
        # 1.6 times the speed of NCHW on a CPU.
        torch.nn.utils.convert_conv2d_weight_memory_format(model.encoder, torch.channels_last)
        self.model, self.features = model, features
        self.device, self.dtype, self.size = device, dtype, model.config.image_size
        activation = self.size**2 * model.config.channels * 4
        self.batch = batch or (_GPU_CROPS if device.type == "cuda" else min(64, max(1, _CPU_BYTES // activation)))

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        return self.encode(crops)[0]

    @torch.inference_mode()
    def encode(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Crops -> codes, and where there is an encoder of ``features`` these, (N, P, C) float16."""
        parts, encoded = [], []
        for part in torch.from_numpy(crops).split(self.batch):
            if self.features is not None:
                encoded.append(self.features(part))
            # (B, 3, H, W) in channels_last. The arithmetic of ToTensor and Normalize, so that codes equal LlamaGen's.
            images = part.to(self.device).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)
            with (
                exact_convolutions(),
                torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
            ):
                parts.append(self.model.encode(images).cpu())
        return torch.cat(parts).numpy(), np.concatenate(encoded) if encoded else None


@dataclass(frozen=True)
class ImageBatch:
    """The crops of the readable ones of some images; after encoding, their codes."""

    images: int  # including the skipped ones
    places: list[tuple[int, int]]  # (place in the permutation, image number) of the n readable ones
    data: np.ndarray  # (n, views, size, size, 3) uint8, then (n, views, T) int64
    skipped: list[dict[str, str]]
    features: np.ndarray | None = None  # after encoding, (n, views, P, C) float16; None: none are stored


class Pipeline:
    """Threads that decode ahead of the encoder. A context manager.

    On the CPU each worker decodes and encodes its own images with one torch thread, without barriers. For a GPU the
    workers decode and the caller's thread encodes. The composition of a batch is fixed, so the codes do not depend on
    the number of workers.
    """

    def __init__(self, images: ImageSet, crops: Crops, views: int, encoder: ViewEncoder, workers: int):
        self.images, self.crops, self.encoder, self.workers = images, crops, encoder, workers
        self.at_once = max(1, encoder.batch // views)  # images per encoder call
        self.on_cpu = encoder.device.type == "cpu"
        self.waited = self.encoded = 0.0  # seconds of the encoder, on the CPU summed over the workers
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
        """Share of the encoder's time spent waiting for decoded images."""
        return self.waited / max(1e-9, self.waited + self.encoded)

    def __call__(self, places: list[tuple[int, int]]) -> Iterator[ImageBatch]:
        """(place, image number) of a shard, in order -> their codes in the same order."""
        ahead = deque[Future[ImageBatch]]()
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

    def _work(self, places: list[tuple[int, int]]) -> ImageBatch:
        start = time.perf_counter()
        batch = self._crop(places)
        return self._encode(batch, time.perf_counter() - start) if self.on_cpu else batch

    def _next(self, ahead: deque[Future[ImageBatch]]) -> ImageBatch:
        start = time.perf_counter()
        batch = ahead.popleft().result()
        return batch if self.on_cpu else self._encode(batch, time.perf_counter() - start)

    def _crop(self, places: list[tuple[int, int]]) -> ImageBatch:
        """Decode and crop; an unreadable image is listed in ``skipped``."""
        good, made, skipped = [], [], []
        for place, i in places:
            try:
                made.append(self.crops(self.images.read(i), self.encoder.size))
                good.append((place, i))
            except ImageError as error:
                skipped.append({"picture": self.images[i].key, "reason": str(error)})
        return ImageBatch(len(places), good, np.stack(made) if made else np.empty(0, np.uint8), skipped)

    def _encode(self, batch: ImageBatch, waited: float) -> ImageBatch:
        start = time.perf_counter()
        if batch.places:
            n, views = batch.data.shape[:2]
            codes, encoded = self.encoder.encode(batch.data.reshape(n * views, *batch.data.shape[2:]))
            if encoded is not None:
                encoded = encoded.reshape(n, views, *encoded.shape[1:])
            batch = replace(batch, data=codes.reshape(n, views, -1), features=encoded)
        with self._lock:
            self.waited += waited
            self.encoded += time.perf_counter() - start
        return batch
