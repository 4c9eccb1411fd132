"""Run by test_store_cache.py, where DISK is a disk of its own that holds two shards: others fill it, or it is read-only."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from megastar.config.schema import DataConfig
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from tests.disks import fill, remount
from tests.integration.storage.test_store import SIZES
from tests.unit.data.shards.test_shards import sample


def read_all(url: str, disk: Path, window: int = 1, read_only: bool = False) -> tuple[str, list[str]]:
    """Some samples of every shard; why reading was degraded, and what is cached then. The disk may turn read-only."""
    reasons = ""
    with closing(ShardSet(url, data=DataConfig(cache=str(disk / "cache"), cache_gib=1.0), max_open=window)) as shards:
        first = 0
        assert shards.store.cache.folder == disk / "cache"
        if read_only:
            remount(disk, "ro")
        for shard, size in enumerate(SIZES):
            for row in (0, size - 1):
                codes, label, found = shards.read(shard, row)
                assert found == first + row and label == sample(found)[1] and (codes == sample(found)[0]).all()
                del codes  # it looks into the shard, which stays where it is for so long
            reasons = reasons or shards.store.degraded
            first += size
    return reasons, sorted(p.name for p in (disk / "cache").glob("*.tar"))


def main(url: str, folder: str, disk: Path) -> None:
    names = [f"{info.sha256}.tar" for info in load_manifest(folder).shards]
    # The bound would allow all, the disk does not: the oldest go.
    degraded, kept = read_all(url, disk)
    assert degraded == "" and names[-1] in kept and len(kept) < len(names), kept
    # Others fill the disk: what is cached serves, and makes room.
    filler = fill(disk)
    degraded, kept = read_all(url, disk)
    assert degraded == "" and names[-1] in kept, (degraded, kept)
    # All that is there is in use: the others are kept in memory.
    degraded, kept = read_all(url, disk, window=4)
    assert "No space left on device" in degraded and "each process buffers its shards in memory" in degraded
    assert 0 < len(kept) < len(names)
    filler.unlink()
    for name in kept:
        (disk / "cache" / name).unlink()
    degraded, kept = read_all(url, disk, read_only=True)
    assert "Read-only file system" in degraded and kept == []
    remount(disk, "rw")
    degraded, kept = read_all(url, disk)
    assert degraded == "" and kept


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
