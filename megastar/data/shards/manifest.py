"""``manifest.json``: the content of a set of token shards. It is written last: a set without one is unfinished."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from pydantic_core import from_json

from megastar.config.schema import DataConfig
from megastar.data.shards.features import StoredFeatures, stored_features
from megastar.data.shards.sample_parser import DTYPES, LAYOUTS, Expected
from megastar.data.shards.shard_table import (
    TABLE,
    TABLE_ABOVE,
    ShardTable,
    describe_table,
    pack_table,
    read_table,
)
from megastar.data.storage.shard_info import MANIFEST, ShardInfo, is_shard_name
from megastar.data.storage.store import Store, open_store
from megastar.errors import UserError

FORMAT = 1
TABLE_FORMAT = 2  # the shards are listed in a table (shard_table.py)
MAX_VIEWS = 1024  # drawing among them takes 8 bytes each, for each sample of a batch
MAX_CODEBOOK = 2**18  # as model.vocab_size
MAX_SIDE = 2**20  # pixels of an image
_MAX_BYTES = 2**45  # of a shard


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``: everything training needs before it opens a shard."""

    samples: int
    classes: list[str]  # name of each class, by number
    grid: int  # side of the token grid
    tokens: int  # T = grid * grid
    views: int  # stored crops per image
    codebook_size: int
    crops: str  # how the views were cut, e.g. "ten:1.1"
    image_size: int  # pixels of a side; 0: not known, for a set of another writer
    tokenizer_sha256: str  # empty: unknown, for a set of another writer
    shards: Sequence[ShardInfo]
    skipped: list[dict[str, str]] = field(default_factory=list)  # {"picture": key, "reason": message}
    # subset, seed, shard size, dtype, digest of the image list
    made_by: dict[str, object] = field(default_factory=dict)
    layout: str = "plain"  # how a shard stores its samples: LAYOUTS
    dtype: str = "uint16"  # of the stored codes: DTYPES
    format: int = FORMAT
    class_counts: list[int] = field(default_factory=list)  # samples of each class, by number; empty: not recorded
    features: dict[str, object] = field(default_factory=dict)  # of an encoder, stored with the codes; empty: none
    centre: int = -1  # index of the centre crop, named by the user; -1: that of ``crops``

    @property
    def shard_sizes(self) -> tuple[int, ...] | np.ndarray:
        return self.shards.samples if isinstance(self.shards, ShardTable) else tuple(s.samples for s in self.shards)

    @property
    def model_sizes(self) -> dict[str, int]:
        """The fields of ``ModelConfig`` that the set determines."""
        return {"vocab_size": self.codebook_size, "num_classes": len(self.classes), "image_tokens": self.tokens}

    @property
    def centre_view(self) -> int:
        """Index of the unmirrored centre crop: the named one, the fifth of ten, else the first."""
        if self.centre >= 0:
            return self.centre
        return 4 if self.crops.startswith("ten") and self.views > 4 else 0

    @property
    def centre_note(self) -> str:
        """A sentence for sets of several views that do not record which is the centre crop; else empty."""
        known = self.centre >= 0 or self.crops.startswith("center") or self.centre_view > 0
        if known or self.views == 1:
            return ""
        return (
            f"crops {self.crops!r} of {self.views} views do not determine the centre crop: view 0, the first, is used as the "
            "centre crop; megastar data index --centre-view names another"
        )

    @property
    def stored_features(self) -> StoredFeatures | None:
        """What ``features`` records."""
        return stored_features(self.features)

    @property
    def expected(self) -> Expected:
        """Type and shape of a sample's codes, and of its features."""
        return Expected(self.dtype, self.views, self.tokens, features=self.stored_features)

    def as_record(self) -> dict[str, object]:
        """For JSON. A set without features or a named centre crop is recorded as by versions that knew none."""
        record = {"format": self.format, **asdict(self)}
        left_out = {"features": not self.features, "centre": self.centre < 0}
        return {k: v for k, v in record.items() if not left_out.get(k)}

    def to_json(self) -> str:
        return json.dumps(self.as_record(), indent=1, ensure_ascii=False) + "\n"


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Write manifest.json, and before it a table of the shards if there are many. Raises ``UserError``."""
    text = ""
    if len(manifest.shards) > TABLE_ABOVE:
        table = pack_table(manifest.shards)
        store.put(TABLE, table)
        rest = replace(manifest, shards=[], format=TABLE_FORMAT).as_record()
        text = json.dumps({**rest, "table": describe_table(table)}, indent=1, ensure_ascii=False) + "\n"
    store.put(MANIFEST, (text or manifest.to_json()).encode())


def load_manifest(folder: str | Path, data: DataConfig | None = None) -> Manifest:
    """Read manifest.json of a folder or s3:// URL. Raises ``UserError`` if it is missing or invalid."""
    return parse_manifest(open_store(folder, data))


def parse_manifest(store: Store) -> Manifest:
    """Read and check the manifest of a store. Errors as ``load_manifest``."""
    text, path = store.manifest(), store.where(MANIFEST)
    try:
        data = from_json(text)  # unlike json.loads it refuses half a surrogate pair, which cannot be printed
        if (version := data["format"]) not in (FORMAT, TABLE_FORMAT):
            raise UserError(
                f"{path} has format {version!r:.80}, but this version of megastar reads formats {FORMAT} and {TABLE_FORMAT}: pretokenize again"
            )
        names = {f.name for f in fields(Manifest)}
        known = {k: v for k, v in data.items() if k in names}
        manifest = Manifest(**{**known, "shards": [ShardInfo(**s) for s in data["shards"]]})
        _check_types(manifest)
        if version == TABLE_FORMAT:
            manifest = replace(manifest, shards=read_table(store, data["table"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{error}".split())[:200]
        raise UserError(
            f"{path} is not a manifest of token shards ({type(error).__name__}: {reason}): pretokenize again"
        ) from error
    if problem := _problem(manifest):
        raise UserError(f"{path} {problem[:500]}: pretokenize again")
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Raise ``TypeError`` for a field whose value is not of its declared type."""
    kinds = {"int": int, "str": str, "list": list, "Sequence": list, "dict": dict}
    entries: list[Manifest | ShardInfo] = [manifest, *manifest.shards]
    for entry in entries:
        for f in fields(entry):
            kind = kinds[str(f.type).partition("[")[0]]
            if type(value := getattr(entry, f.name)) is not kind:  # isinstance would accept True as an int
                raise TypeError(f"{f.name} is {value!r}, not of type {kind.__name__}")
    if not all(isinstance(c, str) for c in manifest.classes):
        raise TypeError("classes must be strings")
    if not all(type(n) is int for n in manifest.class_counts):
        raise TypeError("class_counts must be integers")
    stored_features(manifest.features)
    if not all(isinstance(s, dict) for s in manifest.skipped):
        raise TypeError("skipped must contain mappings")


def _problem(m: Manifest) -> str:
    """What is impossible in a manifest, whatever its shards hold; else the empty string."""
    if m.layout not in LAYOUTS:
        return f"has layout {m.layout!r}, this version of megastar reads {' and '.join(LAYOUTS)}"
    if m.dtype not in DTYPES:
        return f"has codes of dtype {m.dtype!r}, this version of megastar reads {', '.join(DTYPES)}"
    if m.grid < 1 or m.tokens != m.grid**2:
        return f"declares {m.tokens} tokens on a grid of {m.grid} x {m.grid}"
    if not 1 <= m.views <= MAX_VIEWS or m.tokens > 2**20:
        return f"declares {m.views} views of {m.tokens} tokens"
    if not 0 <= m.image_size <= MAX_SIDE:
        return f"has images of {m.image_size} pixels, not of 0 (not known) to {MAX_SIDE}"
    if not -1 <= m.centre < m.views:
        return f"names view {m.centre} of {m.views} as the centre crop"
    if not 1 <= m.codebook_size <= MAX_CODEBOOK:
        return f"has a codebook of {m.codebook_size}, not of 1 to {MAX_CODEBOOK} codes"
    if m.samples != (total := sum(m.shard_sizes) if isinstance(m.shards, list) else int(np.sum(m.shard_sizes))):
        return f"declares {m.samples} samples, its shards {total}"
    if m.samples < 1:
        return "holds no samples"
    if not m.classes:
        return "names no classes"
    if m.class_counts and (
        len(m.class_counts) != len(m.classes) or min(m.class_counts) < 0 or sum(m.class_counts) != m.samples
    ):
        return f"counts {sum(m.class_counts)} samples in {len(m.class_counts)} classes, and declares {m.samples} samples of {len(m.classes)} classes"
    stored = m.stored_features
    if stored is not None and stored.grid != m.grid:
        return f"has features on a grid of {stored.grid} x {stored.grid}, its tokens have {m.grid} x {m.grid}"
    sample = m.views * (m.tokens * np.dtype(DTYPES[m.dtype]).itemsize + (stored.bytes if stored else 0))
    names = set[str]()
    if isinstance(m.shards, ShardTable):  # its names and hashes are checked when a shard is used
        sizes, samples = m.shards.rows["bytes"], m.shards.samples
        bad = (sizes < 0) | (sizes > _MAX_BYTES) | (samples < 0) | (samples > sizes // sample)
        suspects: Sequence[ShardInfo] = [m.shards[int(bad.argmax())]] if bad.any() else []
    else:
        suspects = m.shards
    for s in suspects:
        if not is_shard_name(s.name):
            return f"names a shard {s.name[:200]!r}: it must be the plain name of a .tar beside it"
        if s.name in names:
            return f"names the shard {s.name} twice"
        if not re.fullmatch("[0-9a-f]{64}", s.sha256):
            return f"records the SHA-256 {s.sha256[:80]!r} for {s.name}, not 64 hexadecimal digits"
        if not (0 <= s.bytes <= _MAX_BYTES and 0 <= s.samples * sample <= s.bytes):
            return f"declares {s.samples} samples of {sample} bytes in the {s.bytes} bytes of {s.name}"
        names.add(s.name)
    return ""
