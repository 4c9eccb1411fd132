"""``manifest.json``: what a set of token shards holds. It comes last, so a set without one is unfinished."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megastar.config.schema import DataConfig
from megastar.data.store import MANIFEST, Store, open_store
from megastar.errors import UserError

FORMAT = 1
LAYOUTS = ("plain",)
MAX_CODEBOOK = 2**16  # codes are stored as uint16


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
    layout: str = "plain"  # how a shard holds its samples: LAYOUTS
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
