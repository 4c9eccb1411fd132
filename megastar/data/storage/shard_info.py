"""The files of a set of token shards: names, sizes, hashes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a set: what the manifest says about it."""

    name: str
    samples: int
    bytes: int
    sha256: str


MANIFEST = "manifest.json"


MOST_OF_MANIFEST = 256 << 20  # bytes: a million skipped pictures fit


def most_of_index(info: ShardInfo) -> int:
    """Bytes beyond which a file is no index of that shard."""
    return 4096 + 16 * info.samples


def index_name(shard: str) -> str:
    """shard-00000.tar -> shard-00000.idx"""
    return f"{shard.removesuffix('.tar')}.idx"
