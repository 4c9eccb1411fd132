"""The files of a set of token shards: names, sizes, hashes."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.utils.files import is_plain_name

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20  # enough for a million skipped images


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry of one tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


def max_index_bytes(info: ShardInfo) -> int:
    """Upper bound of the size of a shard's index file: at most three offsets or numbers of 8 bytes for each sample."""
    return 4096 + 24 * info.samples


def index_name(shard: str) -> str:
    """shard-00000.tar -> shard-00000.idx"""
    return f"{shard.removesuffix('.tar')}.idx"


def is_shard_name(name: str) -> bool:
    """Whether ``name`` is a visible .tar in the folder itself."""
    return is_plain_name(name) and name.endswith(".tar")
