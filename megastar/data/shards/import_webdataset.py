"""Token shards of other writers: writes a manifest and indexes for WebDataset tars, which train as they are.

A sample has its codes in ``KEY.codes.npy`` or ``KEY.npy``, integers of shape (T,), (views, T) or (1, views, T), and its
class in ``KEY.cls`` or as "label" in ``KEY.json``.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console

from megastar.config.schema import DataConfig
from megastar.data.shards.index import ShardIndex, pack_index
from megastar.data.shards.manifest import MAX_CODEBOOK, MAX_VIEWS, Manifest, parse_manifest, write_manifest
from megastar.data.shards.sample_parser import Expected, Samples, check_classes, check_codes, check_layout, find_samples
from megastar.data.shards.tar_reader import shown
from megastar.data.storage.shard_info import MANIFEST, ShardInfo, index_name, is_shard_name
from megastar.data.storage.store import Store, open_store
from megastar.errors import UserError
from megastar.tokenizer.io import read_tokenizer_metadata, tokenizer_hash
from megastar.utils.console import PlainConsole
from megastar.utils.progress_bar import progress_bar

logger = logging.getLogger(__name__)
WRITER = "megastar data index"


def index_webdataset(
    where: str | Path,
    *,
    tokenizer: str | Path | None = None,
    tokenizer_sha256: str = "",
    codebook_size: int | None = None,
    classes: list[str] | int | None = None,
    grid: int | None = None,
    crops: str = "foreign",
    centre_view: int | None = None,
    image_size: int | None = None,
    layout: str = "plain",
    data: DataConfig | None = None,
    console: Console | None = None,
) -> Manifest:
    """Read the tars of a folder or s3:// URL and write manifest.json and the indexes beside them.

    Args:
        tokenizer: file of the tokenizer that made the codes; sets ``tokenizer_sha256`` and ``codebook_size``.
        classes: their names by number, or their number; None: the highest class plus one.
        grid: side of the token grid; None: the square root of the arrays' last axis.
        crops: how the views were cut, if known (``ten:1.1``, ...); it determines the centre view.
        centre_view: index of the unmirrored centre crop, which validation, probes and references use; None: that of
            ``crops``, else 0 with a warning.
        image_size: side of the images in pixels, if no tokenizer is given; None: not known, with a warning.

    A set that was indexed before is indexed again. Raises ``UserError``, naming file and member, for a set that cannot
    be trained on (no shards or samples, arrays of different shapes, codes outside the codebook, a missing or unknown
    class, a duplicate key, a cut tar), and for a set written by pretokenize.
    """
    check_layout(layout)
    store = open_store(where, data)
    if tokenizer is not None:
        config, _ = read_tokenizer_metadata(tokenizer)
        if codebook_size not in (None, config.codebook_size):
            raise UserError(
                f"codebook_size {codebook_size} differs from the {config.codebook_size} of tokenizer {tokenizer}: omit it"
            )
        if image_size not in (None, config.image_size):
            raise UserError(
                f"image size {image_size} differs from the {config.image_size} of tokenizer {tokenizer}: omit it"
            )
        codebook_size, image_size = config.codebook_size, config.image_size
        tokenizer_sha256, grid = tokenizer_hash(tokenizer), grid or config.grid
    if codebook_size is None:
        raise UserError(f"the codebook of {where} is unknown: give its tokenizer, or codebook_size")
    if not 1 <= codebook_size <= MAX_CODEBOOK:
        raise UserError(f"codebook_size {codebook_size} must be 1 to {MAX_CODEBOOK}")
    if grid is not None and not 1 <= grid <= 1024:
        raise UserError(f"grid {grid} must be 1 to 1024")
    if centre_view is not None and not 0 <= centre_view < MAX_VIEWS:
        raise UserError(f"centre view {centre_view} must be 0 to {MAX_VIEWS - 1}")
    names = _tars(store, where)
    expected: Expected | None = None
    shards, highest, counts = list[ShardInfo](), -1, Counter[int]()
    num_classes = classes if isinstance(classes, int) or classes is None else len(classes)
    with progress_bar(console or PlainConsole(), "index", len(names), transient=True) as bar:
        for name in names:
            path, (f, sha256) = store.where(name), store.open_uncached(name)
            with f:
                tar = _map(f, path)
                found = find_samples(tar, path, layout, expected)
                if found.expected is not None and len(found.offsets):
                    expected = found.expected
                    _check_grid(found, expected.tokens, path, grid)
                    _check_views(expected, path, centre_view, image_size)
                    check_codes(tar, found, path, codebook_size)
                    check_classes(found, path, num_classes)
                    highest = max(highest, int(found.labels.max()))
                    counts.update(
                        dict(zip(*(c.tolist() for c in np.unique(found.labels, return_counts=True)), strict=True))
                    )
                info = ShardInfo(name, len(found.offsets), len(tar), sha256)
            index = ShardIndex(found.offsets, found.labels)
            store.put(index_name(name), pack_index(index, info, layout, expected or Expected("uint16", 0, 0)))
            shards.append(info)
            bar.advance()
    if expected is None:
        raise UserError(
            f"{where} contains no samples in {len(names)} tars: members must be named KEY.codes.npy, or KEY.npy"
        )
    side = math.isqrt(expected.tokens)
    names = [str(i) for i in range(num_classes or highest + 1)] if not isinstance(classes, list) else classes
    given: dict[str, object] = {"image_size": "given"} if image_size else {}
    origin = "classes of the samples" + (", names given" if isinstance(classes, list) else ", numbers")
    manifest = Manifest(
        samples=sum(s.samples for s in shards),
        classes=names,
        grid=side,
        tokens=expected.tokens,
        views=expected.views,
        codebook_size=codebook_size,
        crops=crops,
        image_size=image_size or 0,
        tokenizer_sha256=tokenizer_sha256,
        shards=shards,
        made_by={"writer": WRITER, "class_source": origin} | given,
        layout=layout,
        dtype=expected.dtype,
        class_counts=[counts[i] for i in range(len(names))],
        centre=-1 if centre_view is None else centre_view,
    )
    write_manifest(store, manifest)
    if not manifest.image_size:
        logger.warning(
            "%s: the size of the images is not known and recorded as 0: give it with --image-size, or the tokenizer with "
            "--tokenizer", where,
        )  # fmt: skip
    if note := manifest.centre_note:
        logger.warning("%s: %s", where, note)
    return manifest


def _tars(store: Store, where: str | Path) -> list[str]:
    """Names of the shards, sorted. Raises ``UserError`` if there are none, or pretokenize wrote them."""
    files = store.names()
    if MANIFEST in files and parse_manifest(store).made_by.get("writer") != WRITER:
        raise UserError(f"{where} has a {MANIFEST} written by pretokenize and needs no index")
    names = sorted(name for name in files if is_shard_name(name))
    if not names:
        raise UserError(f"{where} contains no .tar: give the folder that contains the shards, uncompressed")
    return names


def _map(f: BinaryIO, where: str) -> mmap.mmap:
    if not os.fstat(f.fileno()).st_size:
        raise UserError(f"token shard {where} is empty: copy it again or remove it")
    return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _check_views(expected: Expected, where: str, centre_view: int | None, image_size: int | None) -> None:
    if centre_view is not None and centre_view >= expected.views:
        raise UserError(
            f"centre view {centre_view} is not one of the {expected.views} views, numbered from 0, of token shard {where}: correct it"
        )
    side = math.isqrt(expected.tokens)
    if image_size is not None and image_size % side:
        raise UserError(
            f"image size {image_size} is not a multiple of the {side} codes of a side in token shard {where}: correct it"
        )


def _check_grid(found: Samples, tokens: int, where: str, grid: int | None) -> None:
    side = math.isqrt(tokens)
    if side * side != tokens or grid not in (None, side):
        wanted = "a square number" if grid is None else f"{grid} x {grid}"
        raise UserError(
            f"token shard {where}: {shown(found.arrays[0].name)} has {tokens} codes per view, not {wanted}: correct the grid or the shards"
        )
