"""Images to token shards: decode, crop, encode, write, in any number of processes. A run can be stopped at any time; the
same command continues it.

The images are permuted by the seed and cut into shards, so a shard is a random sample. One process makes a shard, in
batches of a fixed composition, so its bytes depend on nothing else. The processes share only the folder: each claims the
next unfinished shard (utils/lockfile.py), and the last one writes the manifest. Meanwhile ``OUT/.progress`` holds the
plan, the listing of the source, the claims and a record of each finished shard.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from megastar.data.images.classes import DEFAULT, Choice
from megastar.data.images.crops import parse_crops
from megastar.data.images.dataset import ImageSet
from megastar.data.order import permutation
from megastar.data.pretokenize.encoding import Pipeline, ViewEncoder
from megastar.data.pretokenize.features import FeatureEncoder, bytes_of_image, size_of_features
from megastar.data.pretokenize.out_folder import (
    PROGRESS,
    check_settings,
    check_unfinished,
    check_unrelated_files,
    clear,
    is_complete,
    is_finished,
    read_plan,
    read_record,
    remove_empty,
    reopen,
    settings_of,
)
from megastar.data.shards.class_counts import class_summary, count_classes, reasons_in_words
from megastar.data.shards.manifest import MAX_CODEBOOK, Manifest, load_manifest, write_manifest
from megastar.data.shards.sample_parser import check_layout, code_type
from megastar.data.shards.writer import open_writer
from megastar.data.storage.store import FolderStore
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, tokenizer_hash
from megastar.utils.console import PlainConsole
from megastar.utils.device import DTYPES, pick_device
from megastar.utils.files import check_space, write_atomic
from megastar.utils.launcher import cores_of_rank
from megastar.utils.lockfile import Claims
from megastar.utils.progress_bar import ProgressBar, progress_bar, progress_count

SKIPPED = "skipped.jsonl"
POLL = 0.5  # seconds between checks for shards that other processes finish
logger = logging.getLogger(__name__)


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
    choice: Choice = DEFAULT,
    features: str = "",
    feature_weights: str | Path | None = None,
    feature_pool: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Encode the images of ``source`` (below ``subset``) and write token shards with a manifest to ``out``.

    Any number of processes may do so at once with the same arguments; each returns when all shards are finished.

    Args:
        crops: see ``parse_crops``.
        shard_size: images per shard. A killed process repeats at most one shard.
        layout: how a shard stores its samples, see data/shards/sample_parser.py.
        workers: threads that decode (and on the CPU encode); 0: one per core.
        dtype: "fp32", or "bf16", which is faster on a GPU; codes differ in near ties.
        batch: crops per encoder call; 0: by device and image size.
        choice: where the class of an image is read from, see data/images/classes.py.
        features: also store the patch features of this encoder (encoders/spatial.py); empty: none.
        feature_weights: the file of the encoder's weights.
        feature_pool: average the patches of an encoder whose grid is a multiple of the tokens'.
        console: shows a progress bar (default: a new console).

    Finished shards are never written again; shards that a finished folder lacks are. Raises ``UserError`` for a bad
    source, tokenizer or setting, and if ``out`` holds shards of other settings.
    """
    console, out = console or PlainConsole(), Path(out)
    make, views = parse_crops(crops)
    if shard_size < 1:
        raise UserError(f"shard_size {shard_size} must be at least 1")
    check_layout(layout)
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"dtype {dtype!r} is unknown: use fp32 or bf16")
    where = pick_device(device) if isinstance(device, str) else device
    model = load_tokenizer(tokenizer_path, where)
    config = model.config
    if config.codebook_size > MAX_CODEBOOK:
        raise UserError(
            f"tokenizer {tokenizer_path} has {config.codebook_size} codes, shards store at most {MAX_CODEBOOK}: use a tokenizer with fewer codes"
        )

    if not features and (feature_weights is not None or feature_pool):
        raise UserError(
            "feature_weights and feature_pool are options of features, which are not stored: name the encoder"
        )
    encoder = None
    if features:
        encoder = FeatureEncoder(features, feature_weights, where, config.grid, config.image_size, average=feature_pool)

    def describe(images: ImageSet) -> Manifest:
        return Manifest(
            samples=0,
            classes=images.class_names,
            grid=config.grid,
            tokens=config.grid**2,
            views=views,
            codebook_size=config.codebook_size,
            crops=crops,
            image_size=config.image_size,
            tokenizer_sha256=tokenizer_hash(tokenizer_path),
            shards=[],
            layout=layout,
            dtype=code_type(config.codebook_size),
            features=asdict(encoder.stored) if encoder else {},
            made_by={
                "subset": subset or "",
                "seed": seed,
                "shard_size": shard_size,
                "dtype": dtype,
                "pictures": len(images),
                "pictures_sha256": images.digest(),
                "class_source": images.classes.source,
            },
        )

    def pipeline(images: ImageSet) -> Pipeline:
        threads = workers or cores_of_rank(os.environ)
        if images.remote is not None and where.type != "cpu" and not workers:
            threads *= 4  # most of their time is spent waiting for S3
        return Pipeline(images, make, views, ViewEncoder(model, where, DTYPES[dtype], batch, encoder), threads)

    try:
        list_images = partial(ImageSet, source, subset, choice=choice)
        make_set = partial(_pretokenize, out, list_images, describe, pipeline, console)
        try:
            return make_set()
        except FileNotFoundError:
            if not is_finished(out):
                raise
            return make_set()  # another process has just finished the set; its settings are compared
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error}): the finished shards are kept, run the same command again once it can be written"
        ) from error


def _complete(out: Path, manifest: Manifest) -> Manifest:
    logger.info("%s is complete: %d images in %d shards", out, manifest.samples, len(manifest.shards))
    logger.info("%s", class_summary(FolderStore(out), manifest))
    return manifest


def _take_up(out: Path, template: Manifest) -> Manifest | None:
    """The manifest of a finished set, if it has these settings and all its shards; otherwise the set is reopened."""
    done = load_manifest(out)
    check_settings(out, settings_of(done), settings_of(template), old="class_source" not in done.made_by)
    if not (missing := [s for s in done.shards if not is_complete(out, s)]):
        clear(out)
        return _complete(out, done)
    logger.info("%s lacks %d of its shards (%s): writing them", out, len(missing), _some(s.name for s in missing))
    reopen(out, done, missing)
    return None


def _pretokenize(
    out: Path,
    list_images: Callable[..., ImageSet],
    describe: Callable[[ImageSet], Manifest],
    pipeline: Callable[[ImageSet], Pipeline],
    console: Console,
) -> Manifest:
    progress = out / PROGRESS
    if is_finished(out):
        with progress_count(console, "listing images") as report:
            images = list_images(report=report)
        if done := _take_up(out, describe(images)):
            return done
    made = not out.exists()
    check_unrelated_files(out)
    progress.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if made:
            stack.callback(remove_empty, out)
        claims = stack.enter_context(Claims(progress))
        with progress_count(console, "listing images") as report:
            images = _list_once(progress, claims, partial(list_images, report=report))
        run = PretokenizeRun(out, describe(images), len(images), claims)
        if stored := run.template.stored_features:
            logger.info("%s", size_of_features(stored, run.template.views, len(images)))
        if is_finished(out) and (done := _take_up(out, run.template)):  # by another process, since the check above
            return done
        run.check_space()  # before the plan, which would bind the folder to these settings
        run.join()
        title = f"pretokenize {run.template.made_by['subset']}".strip()
        with progress_bar(console, title, len(images)) as bar, pipeline(images) as encode:
            while (shard := run.next(bar)) is not None:
                with claims.holding(run.name(shard)):
                    run.write(shard, images, encode, bar)
        manifest = run.finish()
    for note in images.notes:
        logger.info("%s: %s", images.source, note)
    if skipped := manifest.skipped:
        names = _some(s["picture"] for s in skipped)
        why, file = reasons_in_words(skipped), out / SKIPPED
        logger.warning("%d images skipped (%s): %s; see %s for the reasons", len(skipped), names, why, file)
    logger.info(
        "%s: %d images x %d views in %d shards; %.3g images/s in this process, whose encoder waited %.1f %% of the time "
        "for images", out, manifest.samples, manifest.views, len(manifest.shards), run.rate, 100 * encode.waiting,
    )  # fmt: skip
    logger.info("%s", class_summary(FolderStore(out), manifest))
    return manifest


def _some(names: Iterable[str]) -> str:
    """The first three names, for a message."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


@dataclass
class PretokenizeRun:
    """This process's part in making a set, coordinated through ``OUT/.progress``."""

    out: Path
    template: Manifest  # without shards
    images: int
    claims: Claims

    def __post_init__(self) -> None:
        self.progress = self.out / PROGRESS
        size = int(str(self.template.made_by["shard_size"]))
        self.starts = range(0, self.images, size)
        self.sizes = [min(size, self.images - start) for start in self.starts]
        self.order = permutation(self.images, int(str(self.template.made_by["seed"])))
        self.written, self.start = 0, time.monotonic()  # images by this process

    @property
    def rate(self) -> float:
        """Images per second of this process."""
        return self.written / max(1e-9, time.monotonic() - self.start)

    def name(self, shard: int) -> str:
        return f"shard-{shard:05d}"

    def join(self) -> None:
        """Write the plan, or compare with the existing one. Remove records of shards that are missing."""
        plan = self.progress / "plan.json"
        while not plan.is_file():  # written by one process, so that two settings never share a folder
            if self.claims.take("plan"):
                with self.claims.holding("plan"):
                    check_unfinished(self.out)
                    if not plan.is_file():
                        write_atomic(plan, (json.dumps(settings_of(self.template), indent=1) + "\n").encode())
            else:
                time.sleep(POLL / 5)
        there = read_plan(plan)
        check_settings(self.out, there, settings_of(self.template), old="class_names" not in there)
        for path in self.progress.glob("shard-*.json"):
            with suppress(FileNotFoundError):  # removed by another process, for the same reason or with all others
                if not is_complete(self.out, read_record(path)[0]):
                    path.unlink(missing_ok=True)

    def check_space(self) -> None:
        """Raise ``UserError`` if the missing shards do not fit on the disk of ``out``; some of their bytes may be there."""
        done = set[str]()
        for path in self.progress.glob("shard-*.json"):
            with suppress(FileNotFoundError):  # removed by another process
                if is_complete(self.out, read_record(path)[0]):
                    done.add(path.stem)
        check_unfinished(self.out)  # after the records were read, which are removed at the end
        images = sum(size for shard, size in enumerate(self.sizes) if self.name(shard) not in done)
        begun = 0
        for path in self.out.glob("shard-*.tmp"):
            with suppress(FileNotFoundError):  # renamed by another process
                begun += path.stat().st_size
        need = images * bytes_of_image(self.template) - begun
        rest = "" if images == self.images else f" that are not in {self.out} yet"
        stored = "codes and features" if self.template.features else "codes"
        fewer = "free space, choose another --out or fewer crops (--crops)" + (
            ", or an encoder with narrower features" if self.template.features else ""
        )
        check_space(self.out, need, f"the {stored} of {images} images{rest} need", fewer)

    def next(self, bar: ProgressBar) -> int | None:
        """Claim the next shard; None when all are finished. Waits for the shards of other processes."""
        with suppress(FileNotFoundError):  # another process has finished the set
            while True:
                there = set(os.listdir(self.progress))
                if "plan.json" not in there:  # the set is finished, and a later process has made the folder again
                    break
                todo = [s for s in range(len(self.sizes)) if f"{self.name(s)}.json" not in there]
                bar.update(self.images - sum(self.sizes[s] for s in todo))
                if not todo:
                    return None
                for shard in sorted(todo, key=lambda s: f"{self.name(s)}.claim" in there):
                    if self.claims.take(name := self.name(shard)):
                        if not (self.progress / f"{name}.json").is_file():
                            return shard
                        self.claims.release(name)  # finished since
                        break
                else:  # each check reads every claim: limit the load on the file server
                    time.sleep(POLL * min(len(todo), 20))
        bar.update(self.images)
        return None

    def write(self, shard: int, images: ImageSet, encode: Pipeline, bar: ProgressBar) -> None:
        """Write a shard and its record."""
        start, skipped = self.starts[shard], []
        tar, record = self.out / f"{self.name(shard)}.tar", self.progress / f"{self.name(shard)}.json"
        places = [(p, int(self.order[p])) for p in range(start, start + self.sizes[shard])]
        try:
            stored = self.template.stored_features
            with open_writer(tar, self.template.layout, self.template.dtype, stored) as writer:
                for batch in encode(places):
                    encoded = [None] * len(batch.places) if batch.features is None else batch.features
                    for (place, i), codes, of_crops in zip(batch.places, batch.data, encoded, strict=True):
                        image = images[i]
                        writer.add(f"{place:09d}", codes, image.label, image.key, of_crops)
                    skipped += [{**s, "shard": tar.name} for s in batch.skipped]
                    self.written += batch.images
                    bar.advance(batch.images, f"{self.rate:.3g} images/s here")
            write_atomic(record, json.dumps({**asdict(writer.info()), "skipped": skipped}).encode())
        except OSError:
            if not record.is_file() and self.progress.is_dir():  # else another process has made it
                raise

    def finish(self) -> Manifest:
        """Write skipped.jsonl and then the manifest, in one process; the others wait."""
        try:
            while not self.claims.take("finish"):
                time.sleep(POLL / 5)
            check_unfinished(self.out)
            records = [read_record(self.progress / f"{self.name(shard)}.json") for shard in range(len(self.sizes))]
        except FileNotFoundError as error:
            if is_finished(self.out):
                return load_manifest(self.out)
            raise UserError(f"{error.filename} was removed: run the same command again") from error
        shards, skipped = [info for info, _ in records], [s for _, some in records for s in some]
        samples = sum(s.samples for s in shards)
        if not samples:
            raise UserError(
                f"none of {len(skipped)} images could be read: correct the source; the first error: {skipped[0]['reason']}"
            )
        manifest = replace(self.template, samples=samples, shards=shards, skipped=skipped)
        manifest = replace(manifest, class_counts=count_classes(FolderStore(self.out), manifest) or [])
        if skipped:
            lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in skipped)
            write_atomic(self.out / SKIPPED, lines.encode())
        write_manifest(FolderStore(self.out), manifest)
        clear(self.out)
        return manifest


def _list_once(progress: Path, claims: Claims, list_images: Callable[..., ImageSet]) -> ImageSet:
    """One process lists the source; the others read its listing."""
    cache = progress / "pictures.npz"
    while not cache.is_file():
        if claims.take("pictures"):
            with claims.holding("pictures"):
                return list_images(cache=cache)
        time.sleep(POLL / 5)
    return list_images(cache=cache)
