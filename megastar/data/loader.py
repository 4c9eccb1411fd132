"""Batches of codes for one rank. Which rows a batch holds is decided by the run's seed and the step alone.

The global batch of a step is cut into ``accumulation`` micro-batches, each of these into one slice a rank: with any
number of ranks, and after a resume, step k trains on the same images, views and dropped labels.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch

from megastar.config.schema import DataConfig, ModelConfig, RunConfig
from megastar.data.online_features import OnlineFeatures
from megastar.data.order import OrderSpec, sample_ids, shards_from, slot_of
from megastar.data.prefetch import Batch, ReadAhead, ToDevice
from megastar.data.shards.manifest import Manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.shard_table import largest
from megastar.data.storage.store import is_remote
from megastar.data.token_order import draw_orders, random_shares, validation_orders
from megastar.data.views import draw_label_drop, draw_views
from megastar.errors import UserError

_ROWS = 2048  # maximum rows of one read
_FEATURE_BYTES = 256 << 20  # of features that are read ahead


def check_manifest(manifest: Manifest, model: ModelConfig, tokenizer_sha256: str | None, views: int) -> None:
    """Raise one ``UserError`` with all differences between the shards and the model, the tokenizer and the views.

    Shards written by other tools may record no tokenizer hash: it is then assumed to match.
    """
    problems = []
    if tokenizer_sha256 is not None and manifest.tokenizer_sha256 not in ("", tokenizer_sha256):
        problems.append(
            f"the shards were made with another tokenizer (SHA-256 {manifest.tokenizer_sha256[:12]}..., data.tokenizer is {tokenizer_sha256[:12]}...)"
        )
    if manifest.codebook_size != model.vocab_size:
        problems.append(f"the shards have {manifest.codebook_size} codes, model.vocab_size is {model.vocab_size}")
    if manifest.tokens != model.image_tokens:
        problems.append(
            f"the shards have {manifest.tokens} tokens per image, a grid of {manifest.grid}, model.image_tokens is {model.image_tokens}"
        )
    if len(manifest.classes) > model.num_classes:
        problems.append(f"the shards have {len(manifest.classes)} classes, model.num_classes is {model.num_classes}")
    if views > manifest.views:
        problems.append(f"{views} views are requested, the shards store {manifest.views} (crops {manifest.crops})")
    if problems:
        raise UserError("; ".join(problems) + ": change the configuration, or pretokenize again")


def check_enough(shards: str | Path, manifest: Manifest, global_batch: int) -> None:
    """Raise ``UserError`` for fewer samples than one global batch."""
    if manifest.samples < global_batch:
        raise UserError(
            f"{shards} holds {manifest.samples} samples, fewer than one global batch of {global_batch}: lower train.global_batch or add images"
        )


def open_shards(url: str | Path, data: DataConfig) -> ShardSet:
    """The training set for a ``TokenLoader``, its store and manifest opened once. Errors as ``parse_manifest``."""
    # A batch may run over the end of a slot, which touches one shard more than are mixed. From S3 no more maps than
    # that: each keeps its shard in the cache.
    touched = data.window + 1
    return ShardSet(url, data=data, max_open=touched if is_remote(url) else max(64, touched))


class TokenLoader:
    """Endless iterator over the micro-batches of this rank, read ahead by one thread.

    A batch is a dict: ``step``; ``codes`` (b, M, T) int64; ``labels`` (b,) int64, dropped ones are ``num_classes``;
    ``true_labels`` (b,) as stored; ``ids`` and ``epochs`` (b,) int64; with ``token_order.kind`` random also ``orders``
    (b, M, T) int32 (token_order.py); under representation alignment also ``features`` (b, M, T, C) float16.
    b = global_batch / accumulation / world. With ``device`` codes, labels and features are there already, copied ahead
    of use; the others stay on the CPU.
    ``shards`` come from ``open_shards``; the loader closes their files when it is closed. Of ``cfg`` it uses the
    model's sizes and class dropout, the number of views, ``data.window``, ``token_order`` and the length of the run for
    its annealing, ``train.seed``, ``train.global_batch`` and whether ``repa`` is active.
    ``online`` computes the features, which are else read from the shards.
    The shards of this window and as many after it are fetched and verified in the background. Raises ``UserError`` for
    shards or sizes that do not match, here or when a row is read.
    """

    def __init__(
        self,
        shards: ShardSet,
        cfg: RunConfig,
        *,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        start_step: int = 0,
        prefetch: int = 8,
        device: torch.device | str | None = None,
        online: OnlineFeatures | None = None,
    ):
        self.shards, self.views, self.seed = shards, cfg.views, cfg.train.seed
        self.global_batch, self.accumulation, self.rank, self.world = cfg.train.global_batch, accumulation, rank, world
        self.num_classes, self.class_dropout_prob = cfg.model.num_classes, cfg.model.class_dropout_prob
        self._cfg, window = cfg, cfg.data.window
        manifest = shards.manifest
        check_manifest(manifest, cfg.model, None, cfg.views)
        self._features: ShardSet | OnlineFeatures = online or shards
        stored = (online.stored if online else manifest.stored_features) if cfg.repa.active else None
        self.feature_shape = (manifest.tokens, stored.width) if stored else None  # (T, C); None: batches have none
        if self.global_batch < 1 or self.global_batch % (world * accumulation):
            raise UserError(
                f"global batch {self.global_batch} cannot be divided among {world} ranks x {accumulation} accumulation steps: make it a multiple of {world * accumulation}"
            )
        check_enough(shards.folder, manifest, self.global_batch)
        if window < 1:
            raise UserError(f"window {window} must be at least 1 shard")
        shards.store.check_room(largest(manifest.shards, window + 1))
        self.order = OrderSpec(self.seed, manifest.shard_sizes, window)
        self.step, self._micro, self._prefetch = start_step, 0, prefetch
        b = self.global_batch // (accumulation * world)
        # From S3 one by one: a batch whose shards are cached must not wait for another shard.
        self._together = 1 if shards.store.remote else max(1, min(prefetch, _ROWS // b))
        if stored:
            self._together = 1
            self._prefetch = max(1, min(prefetch, _FEATURE_BYTES // (b * cfg.views * stored.bytes)))
        self._to_device = ToDevice(device)
        self._reader: ReadAhead | None = None
        self._announced: tuple[int, int] | None = None
        self._waited = 0.0

    # The position is state -------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, int]:
        """The samples of all whole steps returned so far, over all ranks; the next batch follows them. Batches read ahead do
        not count, and a step whose micro-batches were returned in part starts again.
        """
        return {"samples": self.step * self.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after ``state``, saved with any number of ranks and micro-batches. Raises ``UserError``."""
        samples = state.get("samples")
        if not isinstance(samples, int) or samples < 0:
            raise UserError(
                f"{state!r} is not a state of the loader: it must be {{'samples': N}}, the samples consumed"
            )
        if samples % self.global_batch:
            raise UserError(
                f"the loader's state is at {samples} samples, inside a batch of {self.global_batch}: continue with the global batch it was saved with, or one that divides {samples}"
            )
        self.close()
        self.step, self._micro = samples // self.global_batch, 0

    def messages(self) -> tuple[str, str]:
        """The store's last message about a wait, and the cause of slow reading; empty: none."""
        return self.shards.store.last_message, self.shards.store.degraded

    def waited(self) -> float:
        """Seconds that the consumer has waited for batches since the last call."""
        total = self._waited + (self._reader.waited if self._reader else 0.0)
        self._waited -= total
        return total

    # Batches ---------------------------------------------------------------------------------------------------
    def batch(self, step: int, micro: int = 0) -> Batch:
        """Micro-batch ``micro`` of step ``step`` for this rank: a pure function of both."""
        return self._to_device.receive(self._to_device.send(self._read([(step, micro)])[0]))

    def _rows(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's sample ids and epochs, (b,) each."""
        b = self.global_batch // (self.accumulation * self.world)
        return sample_ids(self.order, step * self.global_batch + (micro * self.world + self.rank) * b, b)

    def _read(self, micros: Sequence[tuple[int, int]]) -> list[Batch]:
        """Some micro-batches, (step, micro) each, at once, which shares the fixed cost of a read."""
        rows = [self._rows(step, micro) for step, micro in micros]
        ids, epochs = (np.concatenate(column) for column in zip(*rows, strict=True))
        views = draw_views(self.seed, epochs, ids, self.shards.manifest.views, self.views)
        codes, true_labels = self.shards.gather(ids, views)
        dropped = draw_label_drop(self.seed, epochs, ids, self.class_dropout_prob)
        columns = {
            "codes": codes.view(np.int16) if codes.itemsize == 2 else codes,  # (n * b, M, T)
            "labels": np.where(dropped, self.num_classes, true_labels),
            "true_labels": true_labels,
            "ids": ids,
            "epochs": epochs,
        }
        if self.feature_shape:
            columns["features"] = self._features.gather_features(ids, views)  # (n * b, M, T, C)
        if self._cfg.token_order.kind == "random":
            shares = random_shares(self._cfg, np.array([step for step, _ in micros]), self.shards.manifest.samples)
            each = np.repeat(shares, [len(r[0]) for r in rows])
            columns["orders"] = draw_orders(self.seed, epochs, ids, self.views, codes.shape[-1], each)
        parts = {name: torch.from_numpy(column).chunk(len(micros)) for name, column in columns.items()}
        return [{"step": step, **{name: part[n] for name, part in parts.items()}} for n, (step, _) in enumerate(micros)]

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, give_up: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """The batches from ``step`` on. One iterator at a time: a new one stops the thread of the previous one.

        ``give_up`` is called ten times a second while no batch is ready; ``GaveUp`` is raised when it returns true.
        The thread ends with the iteration.
        """
        self.close()
        self._micro = 0
        stop = self.shards.renew_stop()
        depth = max(1, self._prefetch // self._together)
        self._reader = reader = ReadAhead(self._from(self.step), depth, stop)
        atexit.register(self.close)
        try:
            for batch in reader.iterate(give_up):
                self._micro += 1
                if self._micro == self.accumulation:
                    self.step, self._micro = self.step + 1, 0
                yield self._to_device.receive(batch)
        finally:
            reader.close()
            if self._reader is reader:
                self.close()

    def _from(self, step: int) -> Iterator[list[Batch]]:
        """All from ``step`` on. The shards of the first batch come first, because the caller waits for it."""
        self._fetch(np.unique(self.shards.starts.searchsorted(self._rows(step, 0)[0], side="right") - 1))
        micros = ((k, micro) for k in count(step) for micro in range(self.accumulation))
        together = 1  # the first batch does not wait for later ones
        while True:
            group = list(islice(micros, together))
            try:
                yield self._send(group)
            except UserError:
                if len(group) == 1:
                    raise
                for one in group:  # return the batches before the one that cannot be read
                    yield self._send([one])
            self._announce(group[-1][0])
            together = self._together

    def _send(self, micros: Sequence[tuple[int, int]]) -> list[Batch]:
        return [self._to_device.send(batch) for batch in self._read(micros)]

    def _announce(self, step: int) -> None:
        """Tell the store which shards come next: the rest of this window's, and as many behind it."""
        position = step * self.global_batch
        if (slot := slot_of(self.order, position)) != self._announced:
            self._announced = slot
            self._fetch(islice(shards_from(self.order, position), 2 * self.order.window))

    def _fetch(self, shards: Iterable[int]) -> None:
        self.shards.store.read_ahead(self.shards.manifest.shards[s] for s in shards)

    def close(self) -> None:
        """Stop the reading thread and the background fetches. The loader can be iterated again."""
        atexit.unregister(self.close)
        if self._reader is not None:
            self._reader.close()
            self._waited += self._reader.waited
            self._reader = None
        if isinstance(self._features, OnlineFeatures):
            self._features.close()
        self.shards.close()
        self._announced = None


def validation_batches(
    shards: ShardSet,
    n_images: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    view: int | None = None,
    permuted: bool = False,
) -> list[Batch]:
    """The first ``n_images`` samples (all, if fewer) with one fixed view each, cut into this rank's batches.

    The shards hold a random draw, so the first ones are one too. ``view`` is by default the centre crop. Every rank
    gets the same number of batches, of at most ``batch`` rows, as ZeRO's gathers need; up to ``world`` - 1 samples
    are left out if ``n_images`` is too small to divide evenly. A batch has ``codes`` (b, 1, T), ``labels`` and ``ids`` (b,),
    and if ``permuted`` ``orders`` (b, 1, T), of each image always the same.
    """
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
        codes, labels = shards.gather(ids, np.full((len(ids), 1), chosen))
        row = {"codes": torch.from_numpy(codes.astype(np.int64)), "labels": torch.from_numpy(labels)}
        if permuted:
            row["orders"] = torch.from_numpy(validation_orders(ids, codes.shape[-1]))
        batches.append(row | {"ids": torch.from_numpy(ids)})
    return batches
