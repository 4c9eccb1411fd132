"""Pictures to token shards: decode, crop, encode, write, with any number of processes; stop them at any moment and the
same command goes on.

The pictures are permuted by the seed and cut into shards, so a shard is a random draw. A shard is the work of one
process, in batches of a fixed composition: its bytes depend on nothing else. Processes share nothing but the folder:
each claims the next unfinished shard (data/claims.py), and the last one writes the manifest. While they run,
``OUT/.progress`` holds the plan, the listing of the source, the claims and a record of each finished shard.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from megastar.data.images.crops import parse_crops
from megastar.data.images.dataset import PictureSet
from megastar.data.order import permutation
from megastar.data.pretokenize.encoding import Pipeline, ViewEncoder
from megastar.data.pretokenize.progress import Bar, Finder
from megastar.data.shards.manifest import MAX_CODEBOOK, Manifest, load_manifest
from megastar.data.shards.writer import LAYOUTS, open_writer
from megastar.data.storage.shard_info import MANIFEST, ShardInfo
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, tokenizer_hash
from megastar.utils.device import DTYPES, pick_device
from megastar.utils.files import write_atomic
from megastar.utils.lockfile import Claims

SKIPPED = "skipped.jsonl"
PROGRESS = ".progress"
POLL = 0.5  # seconds between looks at what other processes finish


def pretokenize(
    source: str | Path,
    subset: str | None,
    tokenizer_path: str | Path,
    out: str | Path,
    *,
    crops: str = "ten:1.1",
    shard_size: int = 1000,
    layout: str = "plain",
    workers: int = 0,
    device: str | torch.device = "auto",
    dtype: str = "fp32",
    batch: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Manifest:
    """Encode the pictures of ``source`` (below ``subset``) and write token shards with a manifest to ``out``.

    Any number of processes may do so at once with the same arguments: each returns when all shards are finished.

    Args:
        crops: see ``parse_crops``.
        shard_size: pictures a shard. A killed process repeats at most one shard.
        layout: how a shard holds its samples, see data/shards.py.
        workers: threads that decode (and on the CPU encode); 0: as many as there are cores.
        dtype: "fp32", or "bf16": faster on a GPU, codes differ in near ties.
        batch: crops an encoder call; 0: by device and picture size.

    Finished shards are kept and never written again. A finished folder is reported and left alone; shards that it lacks
    are made again. Raises ``UserError`` for a bad source, tokenizer or setting, and when ``out`` holds shards of other
    settings.
    """
    console, out = console or Console(), Path(out)
    make, views = parse_crops(crops)
    if shard_size < 1:
        raise UserError(f"shard_size {shard_size} must be at least 1")
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown: use {' or '.join(LAYOUTS)}")
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"dtype {dtype!r} is unknown: use fp32 or bf16")
    where = pick_device(device) if isinstance(device, str) else device
    model = load_tokenizer(tokenizer_path, where)
    config = model.config
    if config.codebook_size > MAX_CODEBOOK:
        raise UserError(
            f"tokenizer {tokenizer_path} has {config.codebook_size} codes; shards hold at most {MAX_CODEBOOK}"
        )

    def about(pictures: PictureSet) -> Manifest:
        return Manifest(
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
            layout=layout,
            made_by={
                "subset": subset or "",
                "seed": seed,
                "shard_size": shard_size,
                "dtype": dtype,
                "pictures": len(pictures),
                "pictures_sha256": pictures.digest(),
            },
        )

    def pipeline(pictures: PictureSet) -> Pipeline:
        threads = workers or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if pictures.remote is not None and where.type != "cpu" and not workers:
            threads *= 4  # they wait for S3 more than they decode
        return Pipeline(pictures, make, views, ViewEncoder(model, where, DTYPES[dtype], batch), threads)

    find = partial(PictureSet, source, subset)
    try:
        return _pretokenize(out, find, about, pipeline, console)
    except FileNotFoundError:
        if (out / PROGRESS).exists() or not (out / MANIFEST).is_file():
            raise
        done = load_manifest(out)  # another process has just finished the set
        _say(console, f"{out} is done: {done.samples} pictures in {len(done.shards)} shards")
        return done
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error}): the finished shards are kept, run the same command again once it is mended"
        ) from error


def _pretokenize(
    out: Path,
    find: Callable[..., PictureSet],
    describe: Callable[[PictureSet], Manifest],
    pipeline: Callable[[PictureSet], Pipeline],
    console: Console,
) -> Manifest:
    progress = out / PROGRESS
    if (out / MANIFEST).is_file() and not (progress / "plan.json").is_file():
        with Finder(console) as finder:
            pictures = find(report=finder.report)
        done, about = load_manifest(out), describe(pictures)
        _compare(out, _settings(done), _settings(about))
        if not (lost := [s for s in done.shards if not _is_there(out, s)]):
            _clear(out)
            _say(console, f"{out} is done: {done.samples} pictures in {len(done.shards)} shards")
            return done
        names = ", ".join(s.name for s in lost[:3]) + (", ..." if len(lost) > 3 else "")
        _say(console, f"{out} lacks {len(lost)} of its shards ({names}): making them again")
        _reopen(out, done, lost)
    made = not out.exists()
    _check_strangers(out)
    progress.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if made:
            stack.callback(_remove_empty, out)
        claims = stack.enter_context(Claims(progress))
        with Finder(console) as finder:
            pictures = _list_once(progress, claims, partial(find, report=finder.report))
        about = describe(pictures)
        run = PretokenizeRun(out, about, len(pictures), claims)
        run.join()
        with Bar(console, about, run.sizes) as bar, pipeline(pictures) as encode:
            while (shard := run.next(bar)) is not None:
                with claims.holding(run.name(shard)):
                    run.write(shard, pictures, encode, bar)
        manifest = run.finish()
        if skipped := manifest.skipped:
            names = ", ".join(s["picture"] for s in skipped[:3]) + (", ..." if len(skipped) > 3 else "")
            _say(console, f"{len(skipped)} pictures skipped ({names}): {out / SKIPPED} says why")
        _say(
            console,
            f"{out}: {manifest.samples} pictures x {manifest.views} views in {len(manifest.shards)} shards; "
            f"here {bar.rate:.3g} pictures/s, the encoder waited {100 * encode.waiting:.1f} % of the time for pictures",
        )
        return manifest


@dataclass
class PretokenizeRun:
    """One process at work on a set: what ``OUT/.progress`` says of it, and what this process adds."""

    out: Path
    about: Manifest
    pictures: int
    claims: Claims

    def __post_init__(self) -> None:
        self.progress = self.out / PROGRESS
        size = int(str(self.about.made_by["shard_size"]))
        self.starts = range(0, self.pictures, size)
        self.sizes = [min(size, self.pictures - start) for start in self.starts]
        self.order = permutation(self.pictures, int(str(self.about.made_by["seed"])))

    def name(self, shard: int) -> str:
        return f"shard-{shard:05d}"

    def join(self) -> None:
        """Write the plan, or compare with the one that is there. Forget records of shards that were lost since."""
        plan = self.progress / "plan.json"
        while not plan.is_file():  # one process says what all must do, or two settings would share a folder
            if self.claims.take("plan"):
                with self.claims.holding("plan"):
                    if not plan.is_file():
                        write_atomic(plan, (json.dumps(_settings(self.about), indent=1) + "\n").encode())
            else:
                time.sleep(POLL / 5)
        _compare(self.out, json.loads(plan.read_text(encoding="utf-8")), _settings(self.about))
        for path in self.progress.glob("shard-*.json"):
            if not _is_there(self.out, _record(path)[0]):
                path.unlink(missing_ok=True)

    def next(self, bar: Bar) -> int | None:
        """The next shard to make, claimed; None when all are finished. Waits for those that others are making."""
        try:
            return self._next(bar)
        except FileNotFoundError:  # another process has finished the set
            bar.finished(range(len(self.sizes)))
            return None

    def _next(self, bar: Bar) -> int | None:
        while True:
            there = set(os.listdir(self.progress))
            todo = [s for s in range(len(self.sizes)) if f"{self.name(s)}.json" not in there]
            bar.finished(set(range(len(self.sizes))).difference(todo))
            if not todo:
                return None
            for shard in sorted(todo, key=lambda s: f"{self.name(s)}.claim" in there):
                if self.claims.take(name := self.name(shard)):
                    if not (self.progress / f"{name}.json").is_file():
                        return shard
                    self.claims.release(name)  # finished since
                    break
            else:  # each look asks the file server about each claim: many processes must not all ask it all the time
                time.sleep(POLL * min(len(todo), 20))

    def write(self, shard: int, pictures: PictureSet, encode: Pipeline, bar: Bar) -> None:
        """Make a shard and its record."""
        start, skipped = self.starts[shard], []
        tar, record = self.out / f"{self.name(shard)}.tar", self.progress / f"{self.name(shard)}.json"
        places = [(p, int(self.order[p])) for p in range(start, start + self.sizes[shard])]
        try:
            with open_writer(tar, self.about.layout) as writer:
                for c in encode(places):
                    for (place, i), codes in zip(c.places, c.data, strict=True):
                        p = pictures.pictures[i]
                        writer.add(f"{place:09d}", codes, p.label, p.key)
                    skipped += [{**s, "shard": tar.name} for s in c.skipped]
                    bar.advance(c.pictures)
            about = {**asdict(writer.info()), "skipped": skipped}
            write_atomic(record, json.dumps(about).encode())
        except OSError:
            if not record.is_file() and self.progress.is_dir():  # else another process took it over and was faster
                raise
        bar.finished({shard})

    def finish(self) -> Manifest:
        """Write skipped.jsonl and, last, the manifest. One process does it, the others wait."""
        try:
            while not self.claims.take("finish"):
                time.sleep(POLL / 5)
        except FileNotFoundError:
            return load_manifest(self.out)
        records = [_record(self.progress / f"{self.name(shard)}.json") for shard in range(len(self.sizes))]
        shards, skipped = [info for info, _ in records], [s for _, some in records for s in some]
        samples = sum(s.samples for s in shards)
        if not samples:
            raise UserError(f"none of {len(skipped)} pictures could be used; the first: {skipped[0]['reason']}")
        manifest = replace(self.about, samples=samples, shards=shards, skipped=skipped)
        if skipped:
            lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in skipped)
            write_atomic(self.out / SKIPPED, lines.encode())
        write_atomic(self.out / MANIFEST, manifest.to_json().encode())
        _clear(self.out)
        return manifest


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _record(path: Path) -> tuple[ShardInfo, list[dict[str, str]]]:
    record = json.loads(path.read_text(encoding="utf-8"))
    skipped = record.pop("skipped")
    return ShardInfo(**record), skipped


def _list_once(progress: Path, claims: Claims, find: Callable[..., PictureSet]) -> PictureSet:
    """One process lists the source, the others take its list."""
    cache = progress / "pictures.npz"
    while not cache.is_file():
        if claims.take("pictures"):
            with claims.holding("pictures"):
                return find(cache=cache)
        time.sleep(POLL / 5)
    return find(cache=cache)


def _check_strangers(out: Path) -> None:
    """Raise ``UserError`` for a folder that holds other things than a set of shards."""
    if not out.exists() or (out / PROGRESS / "plan.json").is_file():
        return
    strangers = sorted(p.name for p in out.iterdir() if not p.name.startswith(PROGRESS))
    if strangers and not (out / PROGRESS / "plan.json").is_file() and not (out / MANIFEST).is_file():
        raise UserError(f"{out} holds other files, {strangers[0]!r} for one: give a new or an empty folder")


def _is_there(out: Path, info: ShardInfo) -> bool:
    try:
        return (out / info.name).stat().st_size == info.bytes
    except FileNotFoundError:
        return False


def _reopen(out: Path, done: Manifest, lost: list[ShardInfo]) -> None:
    """Turn a finished set into one that lacks some shards. The manifest stays until it is written again."""
    progress = out / PROGRESS
    progress.mkdir(exist_ok=True)
    for info in done.shards:
        if info not in lost:
            skipped = [s for s in done.skipped if s.get("shard") == info.name]
            record = json.dumps({**asdict(info), "skipped": skipped}).encode()
            write_atomic(progress / f"{Path(info.name).stem}.json", record)
    write_atomic(progress / "plan.json", (json.dumps(_settings(done), indent=1) + "\n").encode())


def _clear(out: Path) -> None:
    """Remove what only an unfinished set needs. The rename makes it vanish as one for the other processes."""
    with suppress(FileNotFoundError):
        (out / PROGRESS).rename(out / f"{PROGRESS}.{os.urandom(4).hex()}")
    for folder in out.glob(f"{PROGRESS}.*"):
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in out.glob("*.tmp"):  # of killed processes
        leftover.unlink(missing_ok=True)


def _remove_empty(out: Path) -> None:
    with suppress(OSError):
        (out / PROGRESS).rmdir()
        out.rmdir()


def _settings(m: Manifest) -> dict[str, object]:
    """What two runs must share to write the same shards."""
    return {"tokenizer": m.tokenizer_sha256, "crops": m.crops, "layout": m.layout, **m.made_by}


def _compare(out: Path, there: dict[str, object], now: dict[str, object]) -> None:
    differ = [
        f"{k} ({there.get(k)!r} there, {now.get(k)!r} now)" for k in {**there, **now} if there.get(k) != now.get(k)
    ]
    if differ:
        raise UserError(
            f"{out} holds token shards of other settings: {'; '.join(differ)}: choose another folder, or remove this one"
        )
