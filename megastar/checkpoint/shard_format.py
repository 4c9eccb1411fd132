"""What a checkpoint holds of the network: pieces of named parameters, readable for any number of ranks.

A rank's file ``state-00003.safetensors`` holds, of each parameter that the rank owns a part of, one contiguous range
of the weight laid flat, in fp32, four times: the master weight, AdamW's two moments, and the EMA (the teacher). The
coordinates are those of the *tensor-parallel* weight where parallel/plan.py splits it, else of the whole weight. The
manifest says the full shapes and the tensor-parallel degree. Ranges do not depend on how DeepSpeed lays out its
partitions, so any run reads any checkpoint, and converters need no DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.checkpoint.safetensors_stream import TensorWriter, read_header
from megastar.errors import UserError
from megastar.parallel.plan import split_of

STATES = ("exp_avg", "exp_avg_sq", "ema")
KINDS = ("fp32", *STATES)  # what a checkpoint holds of each parameter
OPEN_FILES = 64  # at once; many systems allow a process 1024


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of ``name`` as tensor rank ``tensor_rank`` has it (0 for a weight that is not split)."""

    name: str
    tensor_rank: int
    start: int
    stop: int


def state_file(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def piece_writer(path: Path, pieces: Sequence[Piece]) -> TensorWriter:
    """A rank's file, for each piece's kinds in the order of ``KINDS``: ``write(f"{kind}/{name}", flat fp32)``."""
    shapes = {f"{k}/{p.name}": (torch.float32, (p.stop - p.start,)) for p in pieces for k in KINDS}
    table = {p.name: [p.tensor_rank, p.start, p.stop] for p in pieces}
    return TensorWriter(path, shapes, {"pieces": json.dumps(table)})


def write_pieces(path: Path, pieces: Sequence[tuple[Piece, dict[str, Tensor]]]) -> tuple[int, str]:
    """Write each piece's kinds (flat fp32, stop - start each); returns (bytes, SHA-256)."""
    with piece_writer(path, [p for p, _ in pieces]) as out:
        for p, tensors in pieces:
            for kind in KINDS:
                out.write(f"{kind}/{p.name}", tensors[kind])
    return out.bytes, out.sha256


class StateReader:
    """Parameters of a checkpoint folder, for any tensor-parallel degree and any range.

    Raises ``UserError`` for a missing or unreadable file, and for a parameter of which a part is nowhere.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.handles: dict[str, BufferedReader] = {}
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in manifest["parameters"].items()}
        self.tensor: int = manifest["mesh"]["tensor"]
        self.optimizer_step: int = manifest["optimizer_step"]
        self.where: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        self.first_byte: dict[tuple[str, str, str], int] = {}  # file, kind, name
        for file in sorted(n for n in manifest["files"] if n.startswith("state-")):
            for name, (rank, start, stop) in self._table(file).items():
                self.where.setdefault((name, rank), []).append((start, stop, file))
        for name in self.shapes:
            for rank in range(self.tensor if self._split(name, self.tensor) else 1):
                self._check_covered(name, rank)

    def _split(self, name: str, degree: int) -> Any:
        return split_of(name) if degree > 1 else None

    def _table(self, file: str) -> dict[str, list[int]]:
        try:
            metadata, entries = read_header(self.folder / file)
            table: dict[str, list[int]] = json.loads(metadata["pieces"])
            for name, (_, start, stop) in table.items():
                for kind in KINDS:
                    entry = entries[f"{kind}/{name}"]
                    if entry.dtype != "F32" or entry.stop - entry.start != 4 * (stop - start):
                        raise ValueError(f"{kind}/{name} is {entry.dtype} {entry.shape}, not {stop - start} of F32")
                    self.first_byte[file, kind, name] = entry.start
            return table
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} lacks {file}: restore it, or resume from an earlier checkpoint") from error
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: str, why: object) -> UserError:
        return UserError(f"{self.folder / file} is damaged ({why}): restore it")

    def _open(self, file: str) -> BufferedReader:
        if file not in self.handles:
            if len(self.handles) >= OPEN_FILES:
                self.close()
            self.handles[file] = (self.folder / file).open("rb")
        return self.handles[file]

    def close(self) -> None:
        """Close the files; they are opened again when read."""
        while self.handles:
            self.handles.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def local_shape(self, name: str, degree: int) -> tuple[int, ...]:
        split = self._split(name, degree)
        return split.local_shape(self.shapes[name], degree) if split else self.shapes[name]

    def _check_covered(self, name: str, rank: int) -> None:
        end = 0
        for start, stop, _ in sorted(self.where.get((name, rank), [])):
            if start > end:
                break
            end = max(end, stop)
        size = torch.Size(self.local_shape(name, self.tensor)).numel()
        if end < size:
            raise UserError(
                f"{self.folder}: elements {end} on of {size} of {name} (tensor rank {rank}) are in none of its files: "
                "a rank's file is missing or of another checkpoint"
            )

    def _range(self, name: str, kind: str, rank: int, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start)
        for first, last, file in self.where[(name, rank)]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                source = self._open(file)
                source.seek(self.first_byte[file, kind, name] + 4 * (low - first))
                if source.readinto(out[low - start : high - start].numpy()) != 4 * (high - low):
                    raise self._damaged(file, f"{kind}/{name} is cut")
        return out

    def whole(self, name: str, kind: str) -> Tensor:
        """The full weight (or moment, or average) in its full shape, fp32."""
        shape = self.shapes[name]
        return self.range(name, kind, 1, 0, 0, torch.Size(shape).numel()).view(shape)

    def range(self, name: str, kind: str, tensor: int, rank: int, start: int, stop: int) -> Tensor:
        """Elements start..stop of what tensor rank ``rank`` of ``tensor`` has of a parameter, flat, fp32.

        Reads no more than the rows that they lie in, whatever tensor-parallel degree wrote the checkpoint.
        """
        split = split_of(name) if max(tensor, self.tensor) > 1 else None
        if split is None:
            return self._range(name, kind, 0, start, stop)
        if tensor == self.tensor:
            return self._range(name, kind, rank, start, stop)
        width = self.local_shape(name, tensor)[1]
        first, last = start // width, -(-stop // width)  # the rows, as the asking rank counts them
        read = self._columns if split.partition == "row" else self._rows
        rows = read(name, kind, split.fused, tensor, rank, first, last)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _rows(self, name: str, kind: str, fused: int, tensor: int, rank: int, first: int, last: int) -> Tensor:
        """Rows of a column-parallel weight: each is whole in one of the ranks that wrote it."""
        width = self.shapes[name][1]
        ours = self.shapes[name][0] // fused // tensor  # rows of each fused part that a rank has
        theirs = self.shapes[name][0] // fused // self.tensor
        out, row = [], first
        while row < last:
            part, within = divmod(row, ours)
            source, there = divmod(rank * ours + within, theirs)
            count = min(last - row, ours - within, theirs - there)
            low = (part * theirs + there) * width
            out.append(self._range(name, kind, source, low, low + count * width))
            row += count
        return torch.cat(out) if len(out) != 1 else out[0]

    def _columns(self, name: str, kind: str, fused: int, tensor: int, rank: int, first: int, last: int) -> Tensor:
        """Rows of a row-parallel weight: their columns lie with several of the ranks that wrote it."""
        ours, theirs = self.shapes[name][1] // tensor, self.shapes[name][1] // self.tensor
        out = []
        for source in range(rank * ours // theirs, ((rank + 1) * ours - 1) // theirs + 1):
            low, high = max(rank * ours, source * theirs), min((rank + 1) * ours, (source + 1) * theirs)
            rows = self._range(name, kind, source, first * theirs, last * theirs).view(last - first, theirs)
            out.append(rows[:, low - source * theirs : high - source * theirs])
        return torch.cat(out, 1) if len(out) != 1 else out[0]
