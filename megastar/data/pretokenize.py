"""Pictures to token shards: decode, crop, encode, write; stop it at any moment and the same command goes on.

The pictures are permuted by the seed and cut into shards, so a shard is a random draw. A shard is encoded in
batches of a fixed composition, one CPU thread each: its bytes do not depend on the number of workers or on restarts.
While it runs, ``OUT/.progress`` holds the plan and a record of each finished shard; ``manifest.json`` comes last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megastar.data.files import write_atomic
from megastar.data.manifest import MAX_CODEBOOK, Manifest, ShardInfo, load_manifest
from megastar.data.order import permutation
from megastar.data.pictures import PictureError, PictureSet, center_crop, ten_crop
from megastar.data.shards import ShardWriter
from megastar.data.store import MANIFEST
from megastar.device import DTYPES, pick_device
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, tokenizer_hash
from megastar.tokenizer.train import to_images
from megastar.tokenizer.vq import VQModel

SKIPPED = "skipped.jsonl"
PROGRESS = ".progress"
_CPU_BYTES = 5 << 20  # of one full-resolution activation: 20 crops of the demo, measured 1.4 times as fast as 80
_GPU_CROPS = 64

Crops = Callable[..., np.ndarray]


# Crops -------------------------------------------------------------------------------------------------------
def parse_crops(text: str) -> tuple[Crops, int]:
    """``ten:SCALE``, ``center-flip`` or ``center`` -> (picture, size) -> (views, size, size, 3) uint8, and views."""
    name, _, scale = text.partition(":")
    try:
        if name == "ten" and 1.0 <= (factor := float(scale or 1.1)) <= 4.0:
            return partial(ten_crop, scale=factor), 10
    except ValueError:
        pass
    if text == "center-flip":
        return _center_flip, 2
    if text == "center":
        return _center, 1
    raise UserError(f"crops {text!r} is unknown: use ten:1.1 (scale 1 to 4), center-flip or center")


def _center(image, size: int) -> np.ndarray:
    return np.asarray(center_crop(image, size))[None]


def _center_flip(image, size: int) -> np.ndarray:
    """LlamaGen's extraction without ten-crop: the centre and its mirror image."""
    pixels = np.asarray(center_crop(image, size))
    return np.stack([pixels, pixels[:, ::-1]])


# Encoding ----------------------------------------------------------------------------------------------------
class Encoder:
    """A tokenizer with its batch size: uint8 crops (N, size, size, 3) -> codes (N, T) int64 on the CPU."""

    def __init__(self, model: VQModel, device: torch.device, dtype: torch.dtype, batch: int):
        self.model = model.to(memory_format=torch.channels_last)  # 1.6 times the speed of NCHW on the CPU
        self.device, self.dtype, self.size = device, dtype, model.config.image_size
        activation = self.size**2 * model.config.channels * 4
        self.batch = batch or (_GPU_CROPS if device.type == "cuda" else min(64, max(1, _CPU_BYTES // activation)))

    @torch.inference_mode()
    def __call__(self, crops: np.ndarray) -> np.ndarray:
        parts = []
        for part in torch.from_numpy(crops).split(self.batch):
            images = to_images(part, self.device).contiguous(memory_format=torch.channels_last)
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # fp32 means fp32, on a GPU too
            with exact, torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                parts.append(self.model.encode(images).cpu())
        return torch.cat(parts).numpy()


@dataclass(frozen=True)
class Job:
    """Some pictures of one shard: (place in the permutation, picture number)."""

    shard: int
    pictures: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """The crops of a job's n readable pictures; once encoded, their codes."""

    job: Job
    places: list[tuple[int, int]]
    data: np.ndarray  # (n, views, size, size, 3) uint8, then (n, views, T) int64
    skipped: list[dict[str, str]]


def cut(pictures: PictureSet, crops: Crops, size: int, job: Job) -> Cut:
    """Decode and crop; a picture that cannot be used is named in ``skipped``."""
    places, made, skipped = [], [], []
    for place, i in job.pictures:
        try:
            made.append(crops(pictures.read(i), size))
            places.append((place, i))
        except PictureError as error:
            skipped.append({"picture": pictures.pictures[i].key, "reason": str(error)})
    return Cut(job, places, np.stack(made) if made else np.empty(0, np.uint8), skipped)


def encode(encoder: Encoder, c: Cut) -> Cut:
    if not c.places:
        return c
    n, views = c.data.shape[:2]
    return replace(c, data=encoder(c.data.reshape(n * views, *c.data.shape[2:])).reshape(n, views, -1))


def encoded(jobs: Iterator[Job], pictures: PictureSet, crops: Crops, encoder: Encoder, workers: int) -> Iterator[Cut]:
    """Jobs in order -> their codes in order.

    On the CPU each worker decodes and encodes its own job with one torch thread: no barriers, nobody waits for
    decoding. For a GPU the workers decode and this thread encodes.
    """
    on_cpu = encoder.device.type == "cpu"

    def work(job: Job) -> Cut:
        c = cut(pictures, crops, encoder.size, job)
        return encode(encoder, c) if on_cpu else c

    threads = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)
    pool, ahead = ThreadPoolExecutor(workers), deque[Future[Cut]]()
    try:
        for job in jobs:
            ahead.append(pool.submit(work, job))
            if len(ahead) > 2 * workers + 2:
                c = ahead.popleft().result()
                yield c if on_cpu else encode(encoder, c)
        while ahead:
            c = ahead.popleft().result()
            yield c if on_cpu else encode(encoder, c)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


# The whole ---------------------------------------------------------------------------------------------------
def pretokenize(
    source: str | Path,
    subset: str | None,
    tokenizer_path: str | Path,
    out: str | Path,
    *,
    crops: str = "ten:1.1",
    shard_size: int = 1000,
    workers: int = 0,
    device: str | torch.device = "auto",
    dtype: str = "fp32",
    batch: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Manifest:
    """Encode the pictures of ``source`` (below ``subset``) and write token shards with a manifest to ``out``.

    Args:
        crops: ``ten:SCALE`` (LlamaGen's ten-crop), ``center-flip`` or ``center``.
        shard_size: pictures a shard. A killed run repeats at most one shard.
        workers: threads that decode (and on the CPU encode); 0: as many as there are cores.
        dtype: "fp32", or "bf16": faster on a GPU, codes differ in near ties.
        batch: crops an encoder call; 0: by device and picture size.

    Finished shards are kept and never written again; a finished folder is reported and left alone. Raises
    ``UserError`` for a bad source, tokenizer or setting, and when ``out`` holds shards of other settings.
    """
    console, out = console or Console(), Path(out)
    make, views = parse_crops(crops)
    if shard_size < 1:
        raise UserError(f"shard_size {shard_size} must be at least 1")
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"dtype {dtype!r} is unknown: use fp32 or bf16")
    where = pick_device(device) if isinstance(device, str) else device
    model = load_tokenizer(tokenizer_path, where)
    config = model.config
    if config.codebook_size > MAX_CODEBOOK:
        raise UserError(
            f"tokenizer {tokenizer_path} has {config.codebook_size} codes; shards hold at most {MAX_CODEBOOK}"
        )
    pictures = PictureSet(source, subset)
    about = Manifest(
        samples=0,
        classes=pictures.class_names,
        grid=config.grid,
        tokens=config.grid**2,
        views=views,
        codebook_size=config.codebook_size,
        crops=crops,
        image_size=config.image_size,
        tokenizer_sha256=tokenizer_hash(tokenizer_path),
        shards=[],
        made_by={
            "subset": subset or "",
            "seed": seed,
            "shard_size": shard_size,
            "dtype": dtype,
            "pictures": len(pictures),
            "pictures_sha256": _digest(pictures),
        },
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _only_writer(out):
            if (out / MANIFEST).is_file():
                done = load_manifest(out)
                _compare(out, _settings(done), _settings(about))
                shutil.rmtree(out / PROGRESS, ignore_errors=True)  # a kill between the manifest and this
                console.print(f"{out} is done: {done.samples} pictures in {len(done.shards)} shards", markup=False)
                return done
            encoder = Encoder(model, where, DTYPES[dtype], batch)
            finished = _start(out, about)
            _write_shards(
                out, about, pictures, make, encoder, workers or len(os.sched_getaffinity(0)), finished, console
            )
            return _finish(out, about, finished, console)
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error}): the finished shards are kept, run the same command again once it is mended"
        ) from error


def _write_shards(
    out: Path,
    about: Manifest,
    pictures: PictureSet,
    crops: Crops,
    encoder: Encoder,
    workers: int,
    finished: dict[int, dict],
    console: Console,
) -> None:
    """Encode and write every shard that is not in ``finished``, and add it there."""
    order = permutation(len(pictures), int(about.made_by["seed"]))
    size, at_once = int(about.made_by["shard_size"]), max(1, encoder.batch // about.views)

    def jobs() -> Iterator[Job]:
        for shard, start in enumerate(range(0, len(order), size)):
            if shard not in finished:
                places = [(p, int(order[p])) for p in range(start, min(start + size, len(order)))]
                for i in range(0, len(places), at_once):
                    yield Job(shard, tuple(places[i : i + at_once]))

    done = sum(f["samples"] + len(f["skipped"]) for f in finished.values())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pictures"),
        TimeRemainingColumn(),
    )
    results = encoded(jobs(), pictures, crops, encoder, workers)
    with closing(results), Progress(*columns, console=console) as bar:
        task = bar.add_task(f"pretokenize {about.made_by['subset']}".strip(), total=len(order), completed=done)
        c = next(results, None)
        while c is not None:
            shard, skipped = c.job.shard, []
            name = f"shard-{shard:05d}.tar"
            with ShardWriter(out / name) as writer:
                while c is not None and c.job.shard == shard:
                    for (place, i), codes in zip(c.places, c.data, strict=True):
                        p = pictures.pictures[i]
                        writer.add(f"{place:09d}", codes, p.label, p.key)
                    skipped += c.skipped
                    bar.advance(task, len(c.job.pictures))
                    c = next(results, None)
            finished[shard] = {**asdict(writer.info()), "skipped": skipped}
            write_atomic(out / PROGRESS / f"shard-{shard:05d}.json", json.dumps(finished[shard]).encode())


def _start(out: Path, about: Manifest) -> dict[int, dict]:
    """Claim ``out`` for these settings. Returns the records of the shards that an earlier run finished."""
    plan = out / PROGRESS / "plan.json"
    if plan.is_file():
        _compare(out, json.loads(plan.read_text(encoding="utf-8")), _settings(about))
    else:
        strangers = sorted(p.name for p in out.iterdir() if p.name != PROGRESS)
        if strangers:
            raise UserError(f"{out} holds other files, {strangers[0]!r} for one: give a new or an empty folder")
        plan.parent.mkdir(exist_ok=True)
        write_atomic(plan, (json.dumps(_settings(about), indent=1) + "\n").encode())
    for leftover in [*out.glob("*.tmp"), *plan.parent.glob("*.tmp")]:
        leftover.unlink()
    finished = {}
    for path in sorted(plan.parent.glob("shard-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        tar = out / record["name"]
        if tar.is_file() and tar.stat().st_size == record["bytes"]:
            finished[int(path.stem.removeprefix("shard-"))] = record
    return finished


def _finish(out: Path, about: Manifest, finished: dict[int, dict], console: Console) -> Manifest:
    """Write skipped.jsonl and, last, the manifest."""
    records = [finished[i] for i in sorted(finished)]
    skipped = [s for r in records for s in r.pop("skipped")]
    shards = [ShardInfo(**r) for r in records]
    samples = sum(s.samples for s in shards)
    if not samples:
        raise UserError(f"none of {len(skipped)} pictures could be used; the first: {skipped[0]['reason']}")
    manifest = replace(about, samples=samples, shards=shards, skipped=skipped)
    if skipped:
        write_atomic(out / SKIPPED, "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in skipped).encode())
        names = ", ".join(s["picture"] for s in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        console.print(f"{len(skipped)} pictures skipped ({names}): {out / SKIPPED} says why", markup=False)
    write_atomic(out / MANIFEST, manifest.to_json().encode())
    shutil.rmtree(out / PROGRESS)
    console.print(f"{out}: {samples} pictures x {about.views} views in {len(shards)} shards", markup=False)
    return manifest


def _digest(pictures: PictureSet) -> str:
    """Of the sorted keys and classes: another set of pictures gives another digest."""
    digest = hashlib.sha256()
    for p in pictures.pictures:
        digest.update(f"{p.key}\t{p.label}\n".encode())
    return digest.hexdigest()


def _settings(m: Manifest) -> dict[str, object]:
    """What two runs must share to write the same shards."""
    return {"tokenizer": m.tokenizer_sha256, "crops": m.crops, **m.made_by}


def _compare(out: Path, there: dict[str, object], now: dict[str, object]) -> None:
    differ = [
        f"{k} ({there.get(k)!r} there, {now.get(k)!r} now)" for k in {**there, **now} if there.get(k) != now.get(k)
    ]
    if differ:
        raise UserError(
            f"{out} holds token shards of other settings: {'; '.join(differ)}: choose another folder, or remove this one"
        )


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold a lock on the folder. The kernel drops it with the process, however that ends."""
    fd = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing to {out}: wait for it, or choose another folder") from error
        yield
    finally:
        os.close(fd)
