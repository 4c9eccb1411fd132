"""``manifest.json``: what a set of token shards holds. It comes last, so a set without one is unfinished."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megastar.config.schema import DataConfig
from megastar.data.shards.sample_parser import DTYPES, LAYOUTS, Expected
from megastar.data.storage.protocol import Store
from megastar.data.storage.shard_info import MANIFEST, ShardInfo
from megastar.data.storage.store import open_store
from megastar.errors import UserError

FORMAT = 1
MAX_VIEWS = 1024  # a draw among them costs 8 bytes each, for each sample of a batch
MAX_CODEBOOK = 2**16  # codes are stored as uint16
_MOST = 2**45  # bytes of a shard, samples of a set: beyond it a number is nonsense


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
    tokenizer_sha256: str  # empty: a set of another writer, made with a tokenizer that nobody named
    shards: list[ShardInfo]
    skipped: list[dict[str, str]] = field(default_factory=list)  # {"picture": key, "reason": sentence}
    made_by: dict[str, object] = field(
        default_factory=dict
    )  # subset, seed, shard size, dtype, digest of the picture list
    layout: str = "plain"  # how a shard holds its samples: LAYOUTS
    dtype: str = "uint16"  # of the stored codes: DTYPES
    format: int = FORMAT

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(s.samples for s in self.shards)

    @property
    def centre_view(self) -> int:
        """Index of the unmirrored centre crop: the fifth of ten, else the first."""
        return 4 if self.crops.startswith("ten") and self.views > 4 else 0

    @property
    def expected(self) -> Expected:
        """What every array of codes must be."""
        return Expected(self.dtype, self.views, self.tokens)

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
        _check_types(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{error}".split())[:200]
        raise UserError(
            f"{path} is not a manifest of token shards ({type(error).__name__}: {reason}): pretokenize again"
        ) from error
    if problem := _problem(manifest):
        raise UserError(f"{path} {problem}: pretokenize again")
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Raise ``TypeError`` for a field of another type than it is declared with."""
    _are(manifest, {"samples", "grid", "tokens", "views", "codebook_size", "image_size", "format"}, int)
    _are(manifest, {"crops", "tokenizer_sha256", "layout", "dtype"}, str)
    _are(manifest, {"classes", "skipped"}, list)
    _are(manifest, {"made_by"}, dict)
    for shard in manifest.shards:
        _are(shard, {"name", "sha256"}, str)
        _are(shard, {"samples", "bytes"}, int)
    if not all(isinstance(c, str) for c in manifest.classes):
        raise TypeError("classes must be names")
    if not all(isinstance(s, dict) for s in manifest.skipped):
        raise TypeError("skipped must name pictures")


def _are(thing: Any, names: set[str], kind: type) -> None:
    for name in sorted(names):
        if type(value := getattr(thing, name)) is not kind:  # True is no number
            raise TypeError(f"{name} is {value!r}, not of type {kind.__name__}")


def _problem(m: Manifest) -> str:
    """What cannot be in a manifest, whatever its shards hold; else nothing."""
    if m.layout not in LAYOUTS:
        return f"has layout {m.layout!r}, this version of megastar reads {' and '.join(LAYOUTS)}"
    if m.dtype not in DTYPES:
        return f"has codes of dtype {m.dtype!r}, this version of megastar reads {', '.join(DTYPES)}"
    if m.grid < 1 or m.tokens != m.grid**2:
        return f"promises {m.tokens} tokens on a grid of {m.grid} x {m.grid}"
    if not 1 <= m.views <= MAX_VIEWS or m.tokens > 2**20:
        return f"promises {m.views} views of {m.tokens} tokens"
    if not 1 <= m.codebook_size <= MAX_CODEBOOK:
        return f"has a code book of {m.codebook_size}, not of 1 to {MAX_CODEBOOK} codes"
    if m.samples != sum(m.shard_sizes):
        return f"promises {m.samples} samples and its shards {sum(m.shard_sizes)}"
    if m.samples < 1:
        return "holds no samples"
    if not m.classes:
        return "names no classes"
    sample = m.views * m.tokens * np.dtype(DTYPES[m.dtype]).itemsize
    names = set[str]()
    for s in m.shards:
        if not is_plain_name(s.name):
            return f"names a shard {s.name[:200]!r}: it must be the plain name of a .tar beside it"
        if s.name in names:
            return f"names the shard {s.name} twice"
        if not re.fullmatch("[0-9a-f]{64}", s.sha256):
            return f"says {s.sha256[:80]!r} is the SHA-256 of {s.name}"
        if not (0 <= s.bytes <= _MOST and 0 <= s.samples * sample <= s.bytes):
            return f"promises {s.samples} samples of {sample} bytes in the {s.bytes} bytes of {s.name}"
        names.add(s.name)
    return ""


def is_plain_name(name: str) -> bool:
    """Whether it names a tar of the folder itself, and nothing else."""
    fine = name.isprintable() and not set(name) & set("/\\") and len(name.encode(errors="replace")) <= 250
    return fine and name.endswith(".tar") and not name.startswith(".")
