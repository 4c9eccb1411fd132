"""Token shards: plain WebDataset tars of codes with a manifest, written atomically, read by position.

A shard holds three members a sample: ``KEY.cls`` (the class, ASCII), ``KEY.codes.npy`` (uint16, (views, T)) and
``KEY.json`` ({"source": key of the picture}). ``manifest.json`` counts and hashes them: a tar that was cut, even at a
member boundary, where tar readers see a clean end, no longer agrees with it.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType

import numpy as np

from megastar.config.schema import DataConfig
from megastar.data.files import sha256, sha256_of, sync_folder
from megastar.data.store import MANIFEST, Store, is_remote, open_store
from megastar.errors import UserError

FORMAT = 1
MAX_CODEBOOK = 2**16  # codes are stored as uint16
_BLOCK = 512  # tar's unit


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a set: what the manifest says about it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: everything training must know before it opens a shard."""

    samples: int
    classes: list[str]  # name of each class, by number
    grid: int  # side of the token grid
    tokens: int  # T = grid * grid
    views: int  # stored crops a picture
    codebook_size: int
    crops: str  # how the views were cut, e.g. "ten:1.1"
    image_size: int
    tokenizer_sha256: str
    shards: list[ShardInfo]
    skipped: list[dict[str, str]] = field(default_factory=list)  # {"picture": key, "reason": sentence}
    made_by: dict[str, object] = field(
        default_factory=dict
    )  # subset, seed, shard size, dtype, digest of the picture list
    format: int = FORMAT

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(s.samples for s in self.shards)

    @property
    def centre_view(self) -> int:
        """Index of the unmirrored centre crop: the fifth of ten, else the first."""
        return 4 if self.crops.startswith("ten") else 0

    def to_json(self) -> str:
        return json.dumps({"format": self.format, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def load_manifest(folder: str | Path, data: DataConfig | None = None) -> Manifest:
    """Read manifest.json of a folder or s3:// URL. Raises ``UserError`` when it is missing, unfinished or not one."""
    return parse_manifest(open_store(folder, data))


def parse_manifest(store: Store) -> Manifest:
    """Read and check the manifest of a store. Errors as ``load_manifest``."""
    text, path = store.manifest(), store.where(MANIFEST)
    try:
        data = json.loads(text)
        found = data["format"]
        if found != FORMAT:
            raise UserError(f"{path} has format {found!r}, this version of megastar reads {FORMAT}: pretokenize again")
        known = {f.name for f in fields(Manifest)}
        manifest = Manifest(
            **{k: v for k, v in data.items() if k in known and k != "shards"},
            shards=[ShardInfo(**s) for s in data["shards"]],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a manifest of token shards ({type(error).__name__}: {error}): pretokenize again"
        ) from error
    if manifest.samples != sum(manifest.shard_sizes) or manifest.samples == 0:
        counted = sum(manifest.shard_sizes)
        raise UserError(f"{path} promises {manifest.samples} samples and its shards {counted}: pretokenize again")
    return manifest


# Writing -----------------------------------------------------------------------------------------------------
class ShardWriter:
    """Writes one shard; it appears under its name only when the ``with`` block ends without an error.

    The bytes depend on the samples alone: no times, no owners.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.samples = 0
        self._temporary = self.path.with_name(self.path.name + ".tmp")

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def add(self, key: str, codes: np.ndarray, label: int, source: str) -> None:
        """Append a sample: ``codes`` (views, T) integers below 65536, its class, the key of its picture."""
        assert "." not in key and codes.ndim == 2, (key, codes.shape)
        if codes.min() < 0 or codes.max() >= MAX_CODEBOOK:
            raise UserError(
                f"code {int(codes.max())} of {source!r} does not fit in 16 bits: the code book may have {MAX_CODEBOOK} codes"
            )
        npy = io.BytesIO()
        np.lib.format.write_array(npy, np.ascontiguousarray(codes, dtype="<u2"), version=(1, 0), allow_pickle=False)
        note = json.dumps({"source": source}, ensure_ascii=False).encode()
        for extension, data in (("cls", str(int(label)).encode()), ("codes.npy", npy.getvalue()), ("json", note)):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size, member.mode = len(data), 0o644
            self._tar.addfile(member, io.BytesIO(data))
        self.samples += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()
            return
        self._file.close()
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def info(self) -> ShardInfo:
        """What the manifest says about the finished shard."""
        return ShardInfo(self.path.name, self.samples, self.path.stat().st_size, sha256(self.path))


# Reading -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Index:
    """Where each sample of a shard lies."""

    offsets: np.ndarray  # (n,) int64, of the first code
    labels: np.ndarray  # (n,) int64


class ShardSet:
    """Random access to the samples of a folder of shards, or of ``s3://bucket/prefix`` (``data``: cache and patience).

    A sample's id is its place in the manifest's order: shard by shard, tar order within. A shard is indexed when it is
    first touched. At most ``max_open`` are mapped at once. The event ``stop`` ends a wait for a shard with ``Stopped``.
    """

    def __init__(self, folder: str | Path, *, data: DataConfig | None = None, max_open: int = 64):
        self.folder = folder if is_remote(folder) else Path(folder)
        self.store = open_store(folder, data)
        self.manifest = parse_manifest(self.store)
        self.stop = threading.Event()
        self.starts = np.concatenate([[0], np.cumsum(self.manifest.shard_sizes)]).astype(np.int64)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._indexes: dict[int, _Index] = {}
        self._max_open = max_open

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, shard: int, sample: int) -> tuple[np.ndarray, int, int]:
        """Sample ``sample`` of shard ``shard`` -> codes (views, T) uint16 (a view of the file), class, id."""
        data = self.open(shard)
        index = self._indexes[shard]
        m = self.manifest
        codes = np.frombuffer(data, "<u2", m.views * m.tokens, int(index.offsets[sample])).reshape(m.views, m.tokens)
        return codes, int(index.labels[sample]), int(self.starts[shard]) + sample

    def gather(self, ids: Sequence[int] | np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids (B,), view numbers (B, M) -> codes (B, M, T) uint16, classes (B,) int64."""
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        codes = np.empty((*views.shape, self.manifest.tokens), np.uint16)
        labels = np.empty(len(ids), np.int64)
        for row, (i, shard) in enumerate(zip(ids, shards, strict=True)):
            stored, labels[row], _ = self.read(int(shard), int(i - self.starts[shard]))
            codes[row] = stored[views[row]]
        return codes, labels

    def where(self, sample_id: int) -> str:
        """ "shard-00003.tar, sample 17": for messages."""
        shard = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return f"{self.manifest.shards[shard].name}, sample {sample_id - int(self.starts[shard])}"

    def close(self) -> None:
        """Drop the memory maps; arrays that still look into one keep it alive. Ends the reading ahead."""
        self._maps.clear()
        self.store.close()

    def open(self, shard: int) -> mmap.mmap:
        """Map shard ``shard``, the first time index and check it. Raises ``UserError`` for a cut or changed file."""
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        info = self.manifest.shards[shard]
        path = self.store.where(info.name)
        while len(self._maps) >= self._max_open:  # before the next one: a map keeps its shard in the cache
            self._maps.popitem(last=False)
        with self.store.open(info, self.stop) as f:
            if (size := os.fstat(f.fileno()).st_size) != info.bytes:
                raise UserError(
                    f"token shard {path} has {size} bytes, the manifest says {info.bytes}: it was cut or changed, copy it again or pretokenize again"
                )
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        if shard not in self._indexes:
            self._indexes[shard] = self._walk(data, path, info)
        self._maps[shard] = data
        return data

    def _walk(self, data: mmap.mmap, path: str, info: ShardInfo) -> _Index:
        """Find every sample by walking the headers, and check them: a tar's own end mark proves nothing."""
        m = self.manifest
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<u2", "fortran_order": False, "shape": (m.views, m.tokens)}
        )
        npy, wanted = header.getvalue(), m.views * m.tokens * 2
        offsets: dict[str, int] = {}
        labels: dict[str, int] = {}
        position, end = 0, len(data)
        while position + _BLOCK <= end:
            block = data[position : position + _BLOCK]
            if block[0] == 0:  # the end mark
                break
            name, size = _parse_header(block, path, position)
            start = position + _BLOCK
            if start + size > end:
                raise UserError(
                    f"token shard {path} ends inside {name}: it was cut, copy it again or pretokenize again"
                )
            key, _, extension = name.partition(".")
            if extension == "codes.npy":
                if data[start : start + len(npy)] != npy or size != len(npy) + wanted:
                    raise UserError(
                        f"token shard {path}: {name} is not {m.views} views of {m.tokens} codes as the manifest says: pretokenize again"
                    )
                offsets[key] = start + len(npy)
            elif extension == "cls":
                labels[key] = int(data[start : start + size])
            position = start + -(-size // _BLOCK) * _BLOCK
        if len(offsets) != info.samples or offsets.keys() != labels.keys():
            raise UserError(
                f"token shard {path} holds {len(offsets)} samples, the manifest says {info.samples}: it was cut or changed, copy it again or pretokenize again"
            )
        return _Index(np.fromiter(offsets.values(), np.int64), np.fromiter((labels[k] for k in offsets), np.int64))


def _parse_header(block: bytes, path: str, position: int) -> tuple[str, int]:
    """A tar header -> member name and size. The check sum tells a header from data."""
    try:
        total = sum(block) - sum(block[148:156]) + 8 * 32
        if total != int(block[148:156].strip(b" \0"), 8):
            raise ValueError("check sum")
        return block[:100].rstrip(b"\0").decode(), int(block[124:136].strip(b" \0"), 8)
    except ValueError as error:
        raise UserError(
            f"token shard {path} has a broken header at byte {position}: copy it again or pretokenize again"
        ) from error


def verify(folder: str | Path) -> Manifest:
    """Read every shard and compare its SHA-256 with the manifest. Raises ``UserError`` naming the first that differs."""
    shards = ShardSet(folder)
    for number, info in enumerate(shards.manifest.shards):
        shards.open(number)
        with shards.store.open(info) as f:
            found = sha256_of(f)
        if found != info.sha256:
            raise UserError(
                f"token shard {shards.store.where(info.name)} has SHA-256 {found}, the manifest says {info.sha256}: copy it again or pretokenize again"
            )
    return shards.manifest
