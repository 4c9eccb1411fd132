"""Token shards of other writers: WebDataset tars without a manifest get one, and train as they are.

A sample has its codes in ``KEY.codes.npy`` or ``KEY.npy``, integers of shape (T,), (views, T) or (1, views, T), and its
class in ``KEY.cls`` or as "label" in ``KEY.json``.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import track

from megastar.config.schema import DataConfig
from megastar.data.shards.index import ShardIndex, pack_index
from megastar.data.shards.manifest import MAX_CODEBOOK, Manifest, is_plain_name, load_manifest
from megastar.data.shards.sample_parser import LAYOUTS, Expected, Samples, check_classes, check_codes, find_samples
from megastar.data.shards.tar_reader import shown
from megastar.data.storage.protocol import Store
from megastar.data.storage.s3_store import S3Store
from megastar.data.storage.shard_info import MANIFEST, ShardInfo, index_name
from megastar.data.storage.store import FolderStore, open_store
from megastar.errors import UserError
from megastar.tokenizer.io import read_tokenizer_metadata, tokenizer_hash
from megastar.utils.files import sha256_of, write_atomic

WRITER = "megastar data index"


def index_foreign(
    where: str | Path,
    *,
    tokenizer: str | Path | None = None,
    tokenizer_sha256: str = "",
    codebook_size: int | None = None,
    classes: list[str] | int | None = None,
    grid: int | None = None,
    crops: str = "foreign",
    layout: str = "plain",
    data: DataConfig | None = None,
    console: Console | None = None,
) -> Manifest:
    """Walk the tars of a folder or s3:// URL and write manifest.json and the indexes beside them.

    Args:
        tokenizer: file of the tokenizer that made the codes; gives ``tokenizer_sha256`` and ``codebook_size``.
        classes: their names by number, or how many there are; None: as many as the highest class needs.
        grid: side of the token grid; None: the arrays' last axis must be a square.
        crops: how the views were cut, if known (``ten:1.1``, ...): which of them is the centre depends on it.

    A set that was indexed before is indexed again. Raises ``UserError``, naming file and member, for whatever cannot be
    trained on: no shards or samples, arrays of different shapes, codes outside the code book, a class that is missing
    or unknown, a key twice, a cut tar; and for a set that pretokenize has finished.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown: use {' or '.join(LAYOUTS)}")
    store = open_store(where, data)
    image_size = 0
    if tokenizer is not None:
        config, _ = read_tokenizer_metadata(tokenizer)
        if codebook_size not in (None, config.codebook_size):
            raise UserError(f"codebook_size {codebook_size} is not the {config.codebook_size} of tokenizer {tokenizer}")
        codebook_size, image_size = config.codebook_size, config.image_size
        tokenizer_sha256, grid = tokenizer_hash(tokenizer), grid or config.grid
    if codebook_size is None:
        raise UserError(f"the code book of {where} is unknown: name its tokenizer, or codebook_size")
    if not 1 <= codebook_size <= MAX_CODEBOOK:
        raise UserError(f"codebook_size {codebook_size} must be 1 to {MAX_CODEBOOK}")
    if grid is not None and not 1 <= grid <= 1024:
        raise UserError(f"grid {grid} must be 1 to 1024")
    names = _tars(store, where)
    expected: Expected | None = None
    shards, highest = list[ShardInfo](), -1
    known = classes if isinstance(classes, int) or classes is None else len(classes)
    for name in track(names, "index", console=console or Console(), transient=True):
        with _opened(store, name) as f, _mapped(f, store.where(name)) as tar:
            found = find_samples(tar, store.where(name), layout, expected)
            if found.expected is not None and len(found.offsets):
                expected = found.expected
                _check_grid(found, expected.tokens, store.where(name), grid)
                check_codes(tar, found, store.where(name), codebook_size)
                check_classes(found, store.where(name), known)
                highest = max(highest, int(found.labels.max()))
            info = ShardInfo(name, len(found.offsets), len(tar), sha256_of(f))
            about = expected or Expected("uint16", 0, 0)
            index = ShardIndex(found.offsets, found.labels)
            _keep_index(store, info, pack_index(index, info, layout, about.dtype, about.views, about.tokens))
            shards.append(info)
    if expected is None:
        raise UserError(
            f"{where} holds no samples in {len(names)} tars: members must be named KEY.codes.npy, or KEY.npy"
        )
    side = math.isqrt(expected.tokens)
    manifest = Manifest(
        samples=sum(s.samples for s in shards),
        classes=[str(i) for i in range(known or highest + 1)] if not isinstance(classes, list) else classes,
        grid=side,
        tokens=expected.tokens,
        views=expected.views,
        codebook_size=codebook_size,
        crops=crops,
        image_size=image_size or 16 * side,  # VQGAN's sixteen pixels a code
        tokenizer_sha256=tokenizer_sha256,
        shards=shards,
        made_by={"writer": WRITER},
        layout=layout,
        dtype=expected.dtype,
    )
    _write(store, manifest)
    return manifest


def _tars(store: Store, where: str | Path) -> list[str]:
    """Names of the shards, in order. Raises ``UserError`` where there are none, or they are pretokenize's."""
    if isinstance(store, S3Store):
        files = [name for name, _, _ in store.s3.list()]
    elif not Path(where).is_dir():
        raise UserError(f"token shards folder {where} does not exist: name the folder that holds the tars")
    else:
        files = [p.name for p in Path(where).iterdir() if p.is_file()]
    if MANIFEST in files and load_manifest(where).made_by.get("writer") != WRITER:
        raise UserError(f"{where} has a {MANIFEST} that pretokenize wrote: there is nothing to index")
    names = sorted(name for name in files if is_plain_name(name))
    if not names:
        raise UserError(f"{where} holds no .tar: give the folder that holds the shards themselves, not packed (.gz)")
    return names


@contextmanager
def _opened(store: Store, name: str) -> Iterator[BinaryIO]:
    """A shard as a local file; from S3 as a temporary one."""
    if isinstance(store, S3Store):
        with tempfile.TemporaryFile() as f:
            store.s3.fetch(name, f, None, store.s3.stall(name))
            f.flush()
            yield f
    else:
        assert isinstance(store, FolderStore)
        with (store.folder / name).open("rb") as f:
            yield f


@contextmanager
def _mapped(f: BinaryIO, where: str) -> Iterator[mmap.mmap]:
    if not os.fstat(f.fileno()).st_size:
        raise UserError(f"token shard {where} is empty: copy it again, or remove it")
    yield mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def _check_grid(found: Samples, tokens: int, where: str, grid: int | None) -> None:
    side = math.isqrt(tokens)
    if side * side != tokens or grid not in (None, side):
        wanted = "the square of a grid" if grid is None else f"{grid} x {grid}"
        raise UserError(f"token shard {where}: {shown(found.arrays[0].name)} has {tokens} codes a view, not {wanted}")


def _keep_index(store: Store, info: ShardInfo, data: bytes) -> None:
    """Beside the shard, where every node finds it."""
    if isinstance(store, S3Store):
        store.s3.put(index_name(info.name), data)
    else:
        store.keep_index(info, data)


def _write(store: Store, manifest: Manifest) -> None:
    text = manifest.to_json().encode()
    if isinstance(store, S3Store):
        store.s3.put(MANIFEST, text)
        return
    assert isinstance(store, FolderStore)
    try:
        write_atomic(store.folder / MANIFEST, text)
    except OSError as error:
        raise UserError(f"cannot write {store.where(MANIFEST)} ({error.strerror}): make the folder writable") from error
