"""Many pictures by many processes: chunks that any rank can draw, kept as files, so that nothing is drawn twice.

Chunk c holds pictures c * batch ... (c + 1) * batch - 1 of a plan, whoever draws it: its bytes do not depend on the
number of ranks, on which of them died, or on how often the work was taken up again. Ranks share a folder and nothing
else: no process group is made.

  FOLDER/plan.json        what is drawn: labels' hash, seed, guidance, weights' and tokenizer's hash ... another is refused
  FOLDER/part-00000.npz   a finished chunk (arr_0 pictures, arr_1 classes), there whole or not at all
  FOLDER/00000.claim      a chunk that a living process draws
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.sampling.npz import read_npz, save_npz, write_record
from megastar.sampling.options import SamplingOptions
from megastar.sampling.sampler import Sampler, check_tokenizer, decode_pictures, sample_seeds
from megastar.tokenizer.vq import VQModel
from megastar.utils.device import DTYPES
from megastar.utils.lockfile import Claims, is_running
from megastar.utils.progress_bar import picture_bar

PLAN = "plan.json"
FORMAT = 1
LABEL_PLANS = ("balanced", "random")
POLL = 0.5  # seconds between two looks at what other ranks still draw
_STREAM = int.from_bytes(b"labels", "big")  # keeps the labels' draws apart from other uses of the seed


def plan_labels(plan: str, count: int, classes: list[int], seed: int) -> list[int]:
    """The class of each of ``count`` pictures, all of ``classes``.

    ``balanced``: in turn, so each class has count / classes of them, the first ones one more if it does not divide.
    ``random``: each drawn for itself, as LlamaGen's sample_c2i_ddp.py does; the first of them do not change with count.
    """
    assert plan in LABEL_PLANS and classes, plan
    if plan == "balanced":
        return [classes[i % len(classes)] for i in range(count)]
    numbers = np.random.Philox(key=[seed, _STREAM]).random_raw(count) >> np.uint64(11)
    return [classes[int(u * 2.0**-53 * len(classes))] for u in numbers]


class SamplingPipeline:
    """Draws any chunk of a plan: ``labels`` (N,), picture i with seed ``seed`` and number i.

    ``size``: pictures are resized to it before they become uint8 (LlamaGen scores its 384-pixel models at 256).
    ``rank`` is only named in errors. Raises ``UserError`` for a tokenizer of other codes and for options that make no
    sense.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: VQModel,
        labels: list[int],
        *,
        seed: int = 0,
        options: SamplingOptions | None = None,
        batch: int = 64,
        passes: int = 1,
        rank: int = 0,
        size: int | None = None,
    ):
        check_tokenizer(model.cfg, tokenizer)
        outside = [c for c in labels if not 0 <= c < model.cfg.num_classes]
        if outside:
            raise UserError(f"class {outside[0]} is outside 0..{model.cfg.num_classes - 1}, the classes of this model")
        self.size = size or tokenizer.config.image_size
        self.tokenizer, self.labels, self.seeds = tokenizer, labels, sample_seeds(seed, len(labels))
        self.batch, self.seed, self.options = batch, seed, options or SamplingOptions()
        self.sampler = Sampler(model, self.options, batch, passes=passes, rank=rank)

    @property
    def chunks(self) -> int:
        return -(-len(self.labels) // self.batch)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, 3)"""
        return len(self.labels), self.size, self.size, 3

    def indices(self, chunk: int) -> np.ndarray:
        """Numbers of the chunk's pictures, (n,) int64."""
        return np.arange(chunk * self.batch, min((chunk + 1) * self.batch, len(self.labels)))

    def paint(self, chunk: int, show: Callable[[float], object] = lambda share: None) -> np.ndarray:
        """The chunk's pictures (n, H, W, 3) uint8."""
        some = slice(chunk * self.batch, (chunk + 1) * self.batch)
        codes = self.sampler.draw(torch.tensor(self.labels[some]), self.seeds[some], show)
        return decode_pictures(self.tokenizer, codes, self.batch, self.size)

    def identity(self) -> dict[str, Any]:
        """What the pictures depend on, but for the weights and the tokenizer, whose files the caller hashes."""
        labels = hashlib.sha256(np.asarray(self.labels, "<i8").tobytes()).hexdigest()
        own, dtype = self.tokenizer.config.image_size, self.sampler.decoder.dtype
        known = {"count": len(self.labels), "labels_sha256": labels, "seed": self.seed, "image_size": self.size}
        known |= {"resize": None if own == self.size else f"bicubic from {own}"}
        known |= {"dtype": next(name for name, kind in DTYPES.items() if kind == dtype)}
        return {"format": FORMAT} | known | vars(self.options) | {"batch": self.batch}


def iterate_images(
    painter: SamplingPipeline,
    *,
    rank: int = 0,
    world: int = 1,
    folder: Path | None = None,
    console: Console | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """This rank's share of the pictures while they are drawn: (numbers (n,) int64, pictures (n, H, W, 3) uint8).

    Chunks go round the ranks (rank, rank + world ...), so that all ranks' shares together are every picture once.
    Nothing is written; with ``folder``, chunks that ``sample_folder`` finished there are read instead of drawn.
    """
    mine = range(rank, painter.chunks, world)
    total = sum(len(painter.indices(c)) for c in mine)
    done = 0
    with picture_bar(console, total) as bar:
        for chunk in mine:
            numbers = painter.indices(chunk)
            if folder is not None and (part := part_of(folder, chunk)).is_file():
                pictures, _ = read_npz(part)
            else:

                def show(share: float, count: int = len(numbers), done: int = done) -> None:
                    bar(done + share * count)

                pictures = painter.paint(chunk, show)
            done += len(numbers)
            bar(done)
            yield numbers, pictures


def part_of(folder: Path, chunk: int) -> Path:
    return folder / f"part-{chunk:05d}.npz"


def open_folder(folder: Path, identity: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
    """Begin the plan in ``folder`` or find it there. ``UserError`` lists the fields in which another plan differs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith(PLAN))
        if others and not path.is_file():
            raise UserError(
                f"{folder} holds other things ({', '.join(others[:3])}) and no {PLAN}: name an empty folder"
            )
        mine = folder / f"{PLAN}.{socket.gethostname()}.{os.getpid()}"  # containers on two nodes share process numbers
        write_record(mine, identity, about or {})
        try:
            os.link(mine, path)  # the first rank's stays; all are equal, or the others are refused below
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    check_plan(path, identity)


def check_plan(path: Path, identity: Mapping[str, Any]) -> None:
    """Raises ``UserError`` unless the plan in the file is this one."""
    try:
        there = json.loads(path.read_text())["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no plan of pictures ({error}): name another place") from error
    keys = sorted({*there, *identity})
    differ = [
        f"{k} {_short(there.get(k))}, not {_short(identity.get(k))}" for k in keys if there.get(k) != identity.get(k)
    ]
    if differ:
        raise UserError(f"{path} is of other pictures: {'; '.join(differ)}; name another place, or ask for the same")


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def sample_folder(
    painter: SamplingPipeline, folder: Path, *, rank: int = 0, world: int = 1, console: Console | None = None
) -> None:
    """Draw what is missing in ``folder`` (see ``open_folder``) together with the other ranks.

    Each rank begins at its own place and goes round, so that the ranks seldom meet. Rank 0 stays until every part is
    there, and draws those of ranks that died; the others leave when nothing is left to claim.
    """
    order = np.roll(np.arange(painter.chunks), -(painter.chunks * rank // world)).tolist()
    missing = set(order)

    def done() -> int:
        there = {p.name for p in folder.iterdir()}  # one look, not one a part: the folder may lie on a network
        missing.difference_update([c for c in missing if part_of(folder, c).name in there])
        return len(painter.labels) - sum(len(painter.indices(c)) for c in missing)

    with Claims(folder) as claims, picture_bar(console, len(painter.labels), done()) as bar:
        while missing:
            drawn = False
            for chunk in [c for c in order if c in missing]:
                if chunk not in missing or part_of(folder, chunk).is_file() or not claims.take(f"{chunk:05d}"):
                    continue
                if not part_of(folder, chunk).is_file():  # its owner may have finished just before the claim
                    now, count = done(), len(painter.indices(chunk))

                    def show(share: float, now: int = now, count: int = count) -> None:
                        bar(now + share * count)

                    pictures = painter.paint(chunk, show)
                    labels = np.asarray(painter.labels)[painter.indices(chunk)]
                    save_npz(part_of(folder, chunk), pictures.shape, [pictures], labels)
                claims.release(f"{chunk:05d}")
                drawn = True
                bar(done())
            if not drawn and rank:
                return
            if not drawn:
                time.sleep(POLL)
            bar(done())
    if rank == 0:
        clear_leftovers(folder)


def clear_leftovers(folder: Path) -> None:
    """What ranks leave that are killed between two steps: the claim of a finished part, half a part."""
    for claim in folder.glob("*.claim"):
        if part_of(folder, int(claim.stem)).is_file():
            claim.unlink(missing_ok=True)
    for half in folder.glob("part-*.tmp"):
        host, pid = half.name.removesuffix(".tmp").split(".npz.")[1].rsplit(".", 1)
        if host == socket.gethostname() and not is_running(int(pid)):
            half.unlink(missing_ok=True)


def join_parts(painter: SamplingPipeline, folder: Path, out: Path) -> None:
    """All parts as one .npz, a part at a time in memory."""
    parts = (read_npz(part_of(folder, c))[0] for c in range(painter.chunks))
    save_npz(out, painter.shape, parts, np.asarray(painter.labels))
