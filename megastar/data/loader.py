"""Batches of codes for one rank. Which rows a batch holds is decided by the run's seed and the step alone.

The global batch of a step is cut into ``accumulation`` micro-batches, each of these into one slice a rank: with any
number of ranks, and after a resume, step k trains on the same images, views and dropped labels.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megastar.config.schema import DataConfig, ModelConfig
from megastar.data.manifest import Manifest
from megastar.data.order import OrderSpec, batch_ids, shards_from
from megastar.data.shard_set import ShardSet
from megastar.data.store import is_remote
from megastar.data.views import draw_label_drop, draw_views
from megastar.errors import UserError

Batch = dict[str, Any]


def check_manifest(manifest: Manifest, model: ModelConfig, tokenizer_sha256: str | None, views: int) -> None:
    """Raise one ``UserError`` that names everything in which the shards do not fit the model, tokenizer and views."""
    problems = []
    if tokenizer_sha256 is not None and tokenizer_sha256 != manifest.tokenizer_sha256:
        problems.append(
            f"the shards were made with another tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}..., data.tokenizer is {tokenizer_sha256[:12]}...)"
        )
    if manifest.codebook_size != model.vocab_size:
        problems.append(f"the shards have {manifest.codebook_size} codes, model.vocab_size is {model.vocab_size}")
    if manifest.tokens != model.image_tokens:
        problems.append(
            f"the shards have {manifest.tokens} tokens a picture, model.image_tokens is {model.image_tokens}"
        )
    if len(manifest.classes) > model.num_classes:
        problems.append(f"the shards have {len(manifest.classes)} classes, model.num_classes is {model.num_classes}")
    if views > manifest.views:
        problems.append(f"{views} views are asked for, the shards store {manifest.views} (crops {manifest.crops})")
    if problems:
        raise UserError("; ".join(problems) + ": change the configuration, or pretokenize again")


class TokenLoader:
    """Endless iterator over the micro-batches of this rank, read ahead by one thread.

    A batch is a dict: ``step``; ``codes`` (b, M, T) int64; ``labels`` (b,) int64, dropped ones are ``num_classes``;
    ``true_labels`` (b,) as stored; ``ids`` and ``epochs`` (b,) int64. b = global_batch / accumulation / world.
    ``data`` says how shards of s3:// are kept and waited for (None: the defaults); those of the next two windows are
    fetched in the background. Raises ``UserError`` for shards or sizes that do not fit, here or when the row is read.
    """

    def __init__(
        self,
        shards_dir: str | Path,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        views: int,
        class_dropout_prob: float,
        num_classes: int,
        vocab_size: int,
        tokens: int,
        window: int = 16,
        start_step: int = 0,
        prefetch: int = 4,
        data: DataConfig | None = None,
    ):
        # Each map keeps its shard in the cache: no more of them than are mixed at once.
        self.shards = ShardSet(shards_dir, data=data, max_open=window if is_remote(shards_dir) else max(64, 2 * window))
        manifest = self.shards.manifest
        check_manifest(
            manifest, ModelConfig(vocab_size=vocab_size, image_tokens=tokens, num_classes=num_classes), None, views
        )
        if global_batch < 1 or global_batch % (world * accumulation):
            raise UserError(
                f"global batch {global_batch} cannot be divided among {world} ranks x {accumulation} accumulation steps: make it a multiple of {world * accumulation}"
            )
        if manifest.samples < global_batch:
            raise UserError(
                f"{shards_dir} holds {manifest.samples} samples, fewer than one global batch of {global_batch}: lower the batch or add pictures"
            )
        if window < 1:
            raise UserError(f"window {window} must be at least 1 shard")
        self.shards.store.check_room(sorted(manifest.shards, key=lambda s: -s.bytes)[:window])
        self.order = OrderSpec(seed, manifest.shard_sizes, window)
        self.seed, self.global_batch, self.accumulation = seed, global_batch, accumulation
        self.rank, self.world, self.views = rank, world, views
        self.class_dropout_prob, self.num_classes, self.vocab_size = class_dropout_prob, num_classes, vocab_size
        self.step, self._micro, self._prefetch = start_step, 0, prefetch
        self._reader: _ReadAhead | None = None
        self._announced: list[int] = []

    # The position is state -------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, int]:
        """The step to hand out next. In the middle of a step's micro-batches: that step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self.step, self._micro = int(state["step"]), 0

    # Batches ---------------------------------------------------------------------------------------------------
    def batch(self, step: int, micro: int = 0) -> Batch:
        """Micro-batch ``micro`` of step ``step`` for this rank: a pure function of both."""
        ids, epochs = batch_ids(self.order, step, self.global_batch)
        b = self.global_batch // (self.accumulation * self.world)
        first = (micro * self.world + self.rank) * b
        ids, epochs = ids[first : first + b], epochs[first : first + b]
        views = draw_views(self.seed, epochs, ids, self.shards.manifest.views, self.views)
        codes, true_labels = read_checked(self.shards, ids, views, self.vocab_size, self.num_classes)
        dropped = draw_label_drop(self.seed, epochs, ids, self.class_dropout_prob)
        return {
            "step": step,
            "codes": torch.from_numpy(codes),  # (b, M, T)
            "labels": torch.from_numpy(np.where(dropped, self.num_classes, true_labels)),
            "true_labels": torch.from_numpy(true_labels),
            "ids": torch.from_numpy(ids),
            "epochs": torch.from_numpy(epochs),
        }

    def __iter__(self) -> Iterator[Batch]:
        """Go on at ``step``. One iterator at a time: a new one ends the former's reading."""
        self.close()
        self._micro = 0
        self.shards.stop = stop = threading.Event()
        self._reader = reader = _ReadAhead(self._from(self.step), self._prefetch, stop)
        try:
            for batch in reader:
                self._micro += 1
                if self._micro == self.accumulation:
                    self.step, self._micro = self.step + 1, 0
                yield batch
        finally:
            reader.close()
            if self._reader is reader:
                self.close()

    def _from(self, step: int) -> Iterator[Batch]:
        while True:
            self._announce(step)
            for micro in range(self.accumulation):
                yield self.batch(step, micro)
            step += 1

    def _announce(self, step: int) -> None:
        """Tell the store which shards come next: the rest of this window's and the whole of the next one's."""
        if self.shards.store.remote:
            ahead = list(islice(shards_from(self.order, step * self.global_batch), 2 * self.order.window))
            if ahead != self._announced:
                self._announced = ahead
                self.shards.store.read_ahead(self.shards.manifest.shards[s] for s in ahead)

    def close(self) -> None:
        """End the reading thread and the reading ahead. The loader can be iterated again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self.shards.close()
        self._announced = []


def validation_batches(
    shards_dir: str | Path,
    n_images: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    view: int | None = None,
    data: DataConfig | None = None,
) -> list[Batch]:
    """The first ``n_images`` samples (all, if fewer) with one fixed view each, cut into this rank's batches.

    The shards hold a random draw, so the first ones are one too. ``view`` is by default the centre crop. Every rank
    gets the same number of batches, of at most ``batch`` rows, as ZeRO's gathers need; up to ``world`` - 1 samples
    are left out where there are too few to go round. A batch has ``codes`` (b, 1, T), ``labels`` and ``ids`` (b,).
    """
    with closing(ShardSet(shards_dir, data=data, max_open=1)) as shards:  # they are read one after the other
        return _validation_batches(shards, n_images, batch, rank, world, view)


def _validation_batches(
    shards: ShardSet, n_images: int, batch: int, rank: int, world: int, view: int | None
) -> list[Batch]:
    m = shards.manifest
    n = min(n_images, m.samples)
    if n < world:
        raise UserError(
            f"{n} validation images of {shards.folder} are fewer than {world} ranks: raise train.val_images"
        )
    pieces = -(-n // (batch * world)) * world
    if n < pieces:
        n = n // world * world
        pieces = -(-n // (batch * world)) * world
    chosen = m.centre_view if view is None else view
    batches = []
    shards.store.read_ahead(m.shards[: int(np.searchsorted(shards.starts, n))])
    for ids in np.array_split(np.arange(n), pieces)[rank::world]:
        codes, labels = read_checked(shards, ids, np.full((len(ids), 1), chosen), m.codebook_size, len(m.classes))
        row = {"codes": torch.from_numpy(codes), "labels": torch.from_numpy(labels), "ids": torch.from_numpy(ids)}
        batches.append(row)
    return batches


def read_checked(
    shards: ShardSet, ids: np.ndarray, views: np.ndarray, vocab_size: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids (b,), views (b, M) -> codes (b, M, T) int64, labels (b,) int64. Raises ``UserError`` for one out of range."""
    codes, labels = shards.gather(ids, views)
    if codes.size and codes.max() >= vocab_size:
        row = int(np.argmax(codes.max(axis=(1, 2))))
        raise UserError(
            f"{shards.where(int(ids[row]))} of {shards.folder} holds code {codes[row].max()}, outside the vocabulary of {vocab_size}: pretokenize again"
        )
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(np.argmax(outside))
        raise UserError(
            f"{shards.where(int(ids[row]))} of {shards.folder} has class {labels[row]}, outside 0 to {num_classes - 1}: correct its class, or set model.num_classes"
        )
    return codes.astype(np.int64), labels


class _ReadAhead:
    """Runs an iterator in a thread, a few items ahead; an error comes out where its item would have."""

    def __init__(self, items: Iterator[Batch], depth: int, stop: threading.Event):
        self._items = items
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(max(1, depth))
        self._stop = stop
        self._thread = threading.Thread(target=self._work, name="token-loader", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Batch]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
