"""Checkpoints of as many files as ranks write: operations on files and processor seconds."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from simulation.measure import spent

OPERATIONS: Counter[str] = Counter()


def count_operations(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
        OPERATIONS[event] += event == "os.remove" or "step-" in str(arguments[0])  # rmtree names no folder


def operations(work: Any) -> tuple[int, float, Any]:
    OPERATIONS.clear()
    took, result = spent(work)
    return sum(OPERATIONS.values()), took, result


def checkpoint_row(ranks: int, folder: Path) -> dict[str, Any]:
    import torch

    from megastar.checkpoint.shard_format import KINDS, Piece, StateReader
    from megastar.engine.checkpointer.snapshot import Snapshot
    from megastar.parallel.mesh import Mesh
    from megastar.run_dir import checkpoint_dir
    from megastar.run_dir.layout import FORMAT

    shapes = {f"layers.{i}.norm": [4 * ranks] for i in range(8)}
    random, files = {"torch": torch.get_rng_state()}, {}
    write, written = [0, 0.0], folder / checkpoint_dir.WRITING / "x" / checkpoint_dir.name_of(1)
    for rank in range(ranks):
        ctx: Any = SimpleNamespace(mesh=Mesh(ranks, 1, rank))
        pieces = [(Piece(n, 0, 4 * rank, 4 * rank + 4), {k: torch.full((4,), 1.0) for k in KINDS}) for n in shapes]
        snapshot = Snapshot(pieces, random, {})
        count, took, mine = operations(lambda snapshot=snapshot, ctx=ctx: snapshot.write(written, ctx))
        write = [write[0] + count, write[1] + took]
        files |= mine
    head = {"format": FORMAT, "step": 1, "mesh": {"data": ranks, "tensor": 1, "zero_stage": 3}, "optimizer_step": 1}
    manifest = head | {"config": {}, "parameters": shapes, "files": dict(sorted(files.items()))}
    _, publish, done = operations(lambda: checkpoint_dir.publish(folder, checkpoint_dir.name_of(1), manifest, written))

    def load(rank: int, near: bool) -> None:
        """What ``load_checkpoint`` reads on one rank."""
        found = checkpoint_dir.parse_manifest(done)
        checkpoint_dir.verify(done, list(found["files"])[rank::ranks])
        reader = StateReader(done, found, (rank, ranks) if near else None)
        for name in shapes:
            reader.range(name, "fp32", 1, 0, 4 * rank, 4 * rank + 4)

    opened, seconds, _ = operations(lambda: load(ranks // 2, True))
    every, slow, _ = operations(lambda: load(ranks // 2, False))
    size = (done / "megastar.json").stat().st_size
    removed, remove, _ = operations(lambda: checkpoint_dir.remove(done))
    return {
        "ranks": ranks,
        "files": len(files) + 1,
        "operations of a save": write[0],
        "megastar.json MB": size / 1e6,
        "publish s": publish,
        "files opened to resume, all ranks": opened * ranks,
        "s a rank": seconds,
        "opened if every header is read": every * ranks,
        "s a rank then": slow,
        "remove: operations": removed,
        "remove s": remove,
    }


def measure_checkpoint(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sys.addaudithook(count_operations)
    for ranks in (n for n in a.ranks if n <= a.most_files):
        folder = Path(tempfile.mkdtemp(prefix="megastar-scale-"))
        try:
            yield checkpoint_row(ranks, folder)
        finally:
            shutil.rmtree(folder)
