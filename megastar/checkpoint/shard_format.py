"""The state files of a checkpoint: pieces of named parameters, readable by any number of ranks.

A rank's file ``state-00003.safetensors`` stores, for each parameter that the rank owns a part of, one contiguous range
of the flattened weight in fp32, four times: the master weight, AdamW's two moments, and the EMA (the teacher); under Muon
three times, with one momentum in place of the moments. Ranges index the *tensor-parallel* weight where parallel/plan.py splits it, otherwise the whole weight. The manifest records
the full shapes and the tensor-parallel degree. Ranges do not depend on DeepSpeed's partitioning, so any run reads any
checkpoint, and converters need no DeepSpeed. Headers are read without torch; tensors by plain reads, because pages of a
memory map count as the process's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.checkpoint.safetensors_stream import TensorWriter, byte_view
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.io import check_fits
from megastar.parallel.alignment import PROJECTORS
from megastar.parallel.head import check_tensor
from megastar.parallel.plan import block_matrix, split_of
from megastar.run_dir.checkpoint_dir import damaged
from megastar.run_dir.layout import MANIFEST
from megastar.run_dir.manifest import optimizer_of, require_weights
from megastar.utils.files import open_regular
from megastar.utils.json_file import WEIGHT_NAME, core, dict_of, integer, parse_json, shown, validator
from megastar.utils.weights.safetensors_header import read_header

if TYPE_CHECKING:
    from torch import Tensor

STATES = ("exp_avg", "exp_avg_sq", "ema")
KINDS = ("fp32", *STATES)  # tensors stored for each parameter that AdamW updates
MUON_KINDS = ("fp32", "momentum_buffer", "ema")
PREFIX = "transformer."  # of the network's own weights; the projectors are used in training only
PIECES = validator(
    dict_of(WEIGHT_NAME, core.list_schema(integer(), min_length=3, max_length=3, strict=True))
)  # name -> tensor rank, start, stop
OPEN_FILES = 64  # open at once; many systems limit a process to 1024


@dataclass(frozen=True)
class Piece:
    """Elements start..stop of ``name`` on tensor rank ``tensor_rank`` (0 for a weight that is not split)."""

    name: str
    tensor_rank: int
    start: int
    stop: int
    kinds: tuple[str, ...] = KINDS  # see ``kinds_of``


def kinds_of(name: str, optimizer: str) -> tuple[str, ...]:
    """The tensors stored for a parameter of a run whose ``optim.name`` is ``optimizer``."""
    return MUON_KINDS if optimizer == "muon" and block_matrix(name) else KINDS


def state_file(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def piece_writer(path: Path, pieces: Sequence[Piece]) -> TensorWriter:
    """A writer of a rank's file; write each piece's kinds in order: ``write(f"{kind}/{name}", flat fp32)``."""
    import torch

    shapes = {f"{k}/{p.name}": (torch.float32, (p.stop - p.start,)) for p in pieces for k in p.kinds}
    table = {p.name: [p.tensor_rank, p.start, p.stop] for p in pieces}
    return TensorWriter(path, shapes, {"pieces": json.dumps(table)})


def write_pieces(path: Path, pieces: Sequence[tuple[Piece, dict[str, Tensor]]]) -> tuple[int, str]:
    """Write each piece's kinds (flat fp32, stop - start each); returns (bytes, SHA-256)."""
    with piece_writer(path, [p for p, _ in pieces]) as out:
        for p, tensors in pieces:
            for kind in p.kinds:
                out.write(f"{kind}/{p.name}", tensors[kind])
    return out.bytes, out.sha256


def check_parameters(folder: Path, manifest: dict[str, Any], model: ModelConfig) -> None:
    """Raise ``UserError`` unless a manifest's parameters fit its configuration and its tensor-parallel degree."""
    shapes = {n: tuple(s) for n, s in manifest["parameters"].items()}
    check_fits(folder, {n.removeprefix(PREFIX): s for n, s in shapes.items() if n.startswith(PREFIX)}, model)
    if other := [n for n in shapes if not n.startswith((PREFIX, *PROJECTORS))]:
        raise damaged(folder, f"{folder / MANIFEST} is damaged: it names a parameter {shown(other[0])}")
    check_tensor(model, manifest["mesh"]["tensor"])


class StateReader:
    """Parameters of a checkpoint folder, for any tensor-parallel degree and any range.

    With ``near`` (a rank and the number of ranks), headers are read when a range needs them, beginning with those of
    the ranks at the same place: if as many ranks as wrote the checkpoint read it, each reads one header instead of
    all. Otherwise all headers are read and checked here. Raises ``UserError`` for a missing or unreadable file, and for
    elements that no file contains.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], near: tuple[int, int] | None = None):
        self.handles: dict[str, BufferedReader] = {}
        self.folder = folder
        require_weights(folder, manifest)
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(s) for n, s in manifest["parameters"].items()}
        self.tensor: int = manifest["mesh"]["tensor"]
        self.optimizer_step: int = manifest["optimizer_step"]
        self.optimizer = optimizer_of(manifest)
        self.locations: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
        self.first_byte: dict[tuple[str, str, str], int] = {}  # file, kind, name
        files = sorted(n for n in manifest["files"] if n.startswith("state-"))
        if near is not None:
            place, count = (near[0] + 0.5) / near[1], len(files)
            files = [files[i] for i in sorted(range(count), key=lambda i: abs((i + 0.5) / count - place))]
        self.unread = files[::-1]
        while near is None and self.unread:
            self._read_table()
        for name in self.shapes if near is None else ():
            for rank in range(self.tensor if self._split(name, self.tensor) else 1):
                self._locate(name, rank, 0, math.prod(self.local_shape(name, self.tensor)))

    def kinds(self, name: str) -> tuple[str, ...]:
        return kinds_of(name, self.optimizer)

    def _split(self, name: str, degree: int) -> Any:
        return split_of(name) if degree > 1 else None

    def _read_table(self) -> None:
        """Read the header of the next file, which gives the positions of its elements."""
        file = self.unread.pop()
        for name, (rank, start, stop) in self._table(file).items():
            self.locations.setdefault((name, rank), []).append((start, stop, file))

    def _table(self, file: str) -> dict[str, list[int]]:
        """The pieces in a file: name -> tensor rank, start, stop; each lies within its parameter."""
        path = self.folder / file
        if not path.exists():
            raise damaged(self.folder, f"{self.folder}: {file} is missing")
        try:
            metadata, entries = read_header(path)
            table: dict[str, list[int]] = parse_json(
                metadata.get("pieces", ""), f"pieces in the header of {path}", PIECES
            )
        except UserError as error:
            raise damaged(self.folder, error) from error
        for name, (rank, start, stop) in table.items():
            if (
                name not in self.shapes
                or rank >= self.tensor
                or not start <= stop <= math.prod(self.local_shape(name, self.tensor))
            ):
                raise self._damaged(file, f"it holds elements {start} to {stop} of {name} of tensor rank {rank}")
            for kind in self.kinds(name):
                entry = entries.get(f"{kind}/{name}")
                if entry is None or entry.dtype != "F32" or entry.stop - entry.start != 4 * (stop - start):
                    raise self._damaged(file, f"{kind}/{name} is {entry}, not {stop - start} elements of F32")
                self.first_byte[file, kind, name] = entry.start
        return table

    def _damaged(self, file: str, reason: object) -> UserError:
        return damaged(self.folder, f"{self.folder / file} is damaged ({reason})")

    def _open(self, file: str) -> BufferedReader:
        if file not in self.handles:
            if len(self.handles) >= OPEN_FILES:
                self.close()
            self.handles[file] = open_regular(self.folder / file)
        return self.handles[file]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self.handles:
            self.handles.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def local_shape(self, name: str, degree: int) -> tuple[int, ...]:
        split = self._split(name, degree)
        return split.local_shape(self.shapes[name], degree) if split else self.shapes[name]

    def _locate(self, name: str, rank: int, start: int, stop: int) -> list[tuple[int, int, str]]:
        """(first, last, file) of the pieces of a parameter; headers are read until they cover start..stop."""
        while True:
            end, pieces = start, self.locations.get((name, rank), [])
            for first, last, _ in sorted(pieces):
                if first <= end:
                    end = max(end, last)
            if end >= stop:
                return pieces
            if not self.unread:
                size = math.prod(self.local_shape(name, self.tensor))
                raise damaged(
                    self.folder,
                    f"{self.folder}: no file holds elements {end} and above of the {size} of {name} (tensor rank {rank}), "
                    "so a rank's file is missing or belongs to another checkpoint",
                )
            self._read_table()

    def _range(self, name: str, kind: str, rank: int, start: int, stop: int) -> Tensor:
        import torch

        out = torch.empty(stop - start)
        for first, last, file in self._locate(name, rank, start, stop):
            low, high = max(first, start), min(last, stop)
            if low < high:
                source = self._open(file)
                source.seek(self.first_byte[file, kind, name] + 4 * (low - first))
                if source.readinto(byte_view(out[low - start : high - start])) != 4 * (high - low):
                    raise self._damaged(file, f"{kind}/{name} is truncated")
        return out

    def whole(self, name: str, kind: str) -> Tensor:
        """The whole weight (or moment, or average) in its full shape, fp32."""
        shape = self.shapes[name]
        return self.range(name, kind, 1, 0, 0, math.prod(shape)).view(shape)

    def range(self, name: str, kind: str, tensor: int, rank: int, start: int, stop: int) -> Tensor:
        """Elements start..stop of the part of a parameter on tensor rank ``rank`` of ``tensor``, flat, fp32.

        Reads only the rows that contain them, for any tensor-parallel degree that wrote the checkpoint.
        """
        import torch

        split = self._split(name, max(tensor, self.tensor))
        if split is None or tensor == self.tensor:
            return self._range(name, kind, rank if split else 0, start, stop)
        width = self.local_shape(name, tensor)[1]
        first, last = start // width, -(-stop // width)  # rows of the requested part
        if split.partition == "row":
            parts, dim = self._columns(name, kind, tensor, rank, first, last), 1
        else:
            parts, dim = self._rows(name, kind, split.fused, tensor, rank, first, last), 0
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _rows(self, name: str, kind: str, fused: int, tensor: int, rank: int, first: int, last: int) -> list[Tensor]:
        """Rows of a column-parallel weight: each row was written by a single rank."""
        width = self.shapes[name][1]
        ours = self.shapes[name][0] // fused // tensor  # rows of each fused part on one rank
        theirs = self.shapes[name][0] // fused // self.tensor
        out, row = [], first
        while row < last:
            part, within = divmod(row, ours)
            source, there = divmod(rank * ours + within, theirs)
            count = min(last - row, ours - within, theirs - there)
            low = (part * theirs + there) * width
            out.append(self._range(name, kind, source, low, low + count * width))
            row += count
        return out

    def _columns(self, name: str, kind: str, tensor: int, rank: int, first: int, last: int) -> list[Tensor]:
        """Rows of a row-parallel weight: their columns were written by several ranks."""
        ours, theirs = self.shapes[name][1] // tensor, self.shapes[name][1] // self.tensor
        out = []
        for source in range(rank * ours // theirs, ((rank + 1) * ours - 1) // theirs + 1):
            low, high = max(rank * ours, source * theirs), min((rank + 1) * ours, (source + 1) * theirs)
            rows = self._range(name, kind, source, first * theirs, last * theirs).view(last - first, theirs)
            out.append(rows[:, low - source * theirs : high - source * theirs])
        return out
