"""The headers that a rank reads to resume: few of the files, with the values that all files give."""

from __future__ import annotations

import pytest
import torch

from megastar.checkpoint.shard_format import KINDS, Piece, StateReader, state_file, write_pieces
from megastar.errors import UserError

SHAPES = {"a": (6, 8), "b": (16,), "c": (5, 7)}
WORLD = 12


def value(name: str, kind: str) -> torch.Tensor:
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size, dtype=torch.float32) + 100 * KINDS.index(kind) + 1000 * list(SHAPES).index(name)


def bounds(size: int, rank: int, world: int) -> tuple[int, int]:
    return size * rank // world, size * (rank + 1) // world


def ranges_of(stage: int, rank: int, world: int) -> list[tuple[str, int, int]]:
    """ZeRO 3 divides each parameter, stages 1 and 2 the sequence of all of them."""
    sizes = {n: torch.Size(s).numel() for n, s in SHAPES.items()}
    if stage == 3:
        return [(n, *bounds(size, rank, world)) for n, size in sizes.items()]
    low, high = bounds(sum(sizes.values()), rank, world)
    out, first = [], 0
    for name, size in sizes.items():
        start, stop = max(low - first, 0), min(high - first, size)
        out += [(name, start, stop)] if start < stop else []
        first += size
    return out


@pytest.fixture(params=[1, 3])
def checkpoint(request, tmp_path):
    files = {}
    for rank in range(WORLD):
        some = [r for r in ranges_of(request.param, rank, WORLD) if r[1] < r[2]]
        pieces = [(Piece(n, 0, a, b), {k: value(n, k)[a:b].clone() for k in KINDS}) for n, a, b in some]
        write_pieces(tmp_path / state_file(rank), pieces)
        files[state_file(rank)] = {}
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    mesh = {"data": WORLD, "tensor": 1}
    manifest = {"parameters": shapes, "mesh": mesh, "optimizer_step": 1, "config": {}, "files": files}
    return request.param, tmp_path, manifest


@pytest.mark.parametrize(("world", "most"), [(WORLD, 1), (WORLD // 2, 3), (3 * WORLD, 2), (5, 5), (1, WORLD)])
def test_a_rank_reads_the_headers_of_its_neighbours(checkpoint, world, most):
    stage, folder, manifest = checkpoint
    for rank in range(world):
        reader = StateReader(folder, manifest, (rank, world))
        assert len(reader.unread) == WORLD
        for name, start, stop in ranges_of(stage, rank, world):
            for kind in KINDS:
                found = reader.range(name, kind, 1, 0, start, stop)
                assert torch.equal(found, value(name, kind)[start:stop])
        assert WORLD - len(reader.unread) <= most


def test_any_range_is_found(checkpoint):
    _, folder, manifest = checkpoint
    reader = StateReader(folder, manifest, (WORLD - 1, WORLD))
    assert all(torch.equal(reader.whole(n, "ema").reshape(-1), value(n, "ema")) for n in SHAPES)


def test_elements_that_no_file_holds_are_named(checkpoint):
    _, folder, manifest = checkpoint
    (folder / state_file(0)).unlink()
    with pytest.raises(UserError, match="state-00000.safetensors is missing: restore it"):
        StateReader(folder, manifest, (0, WORLD)).range("a", "fp32", 1, 0, 0, 2)
    less = manifest | {"files": {n: {} for n in list(manifest["files"])[1:]}}
    for near in (None, (0, WORLD)):
        with pytest.raises(UserError, match=r"no file holds elements 0 and above of the 48 of a \(tensor rank 0\)"):
            StateReader(folder, less, near).whole("a", "fp32")
