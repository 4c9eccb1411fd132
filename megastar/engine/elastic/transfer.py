"""Files from rank to rank over gloo: their sizes, then raw bytes. The receiver chooses the name of each file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 16 << 20  # bytes


def exchange(group: Any, send: dict[int, list[Path]], receive: dict[int, list[Path]]) -> None:
    """Send files to ranks and write those that they send, at the same time. Both sides of a pair name as many files.

    Raises torch's errors if a rank is lost, and ``OSError`` if a file cannot be written.
    """
    sizes = {rank: torch.tensor([p.stat().st_size for p in files]) for rank, files in send.items()}
    theirs = {rank: torch.zeros(len(files), dtype=torch.int64) for rank, files in receive.items()}
    works = [dist.isend(size, rank, group) for rank, size in sizes.items()]
    works += [dist.irecv(size, rank, group) for rank, size in theirs.items()]
    _wait(works)
    with ExitStack() as opened:
        streams = [_outgoing(group, rank, files, opened) for rank, files in send.items()]
        streams += [_incoming(group, rank, receive[rank], theirs[rank].tolist(), opened) for rank in receive]
        for at_once in zip_longest(*streams):
            _wait(at_once)


def _wait(works: Any) -> None:
    for work in works:
        if work is not None:
            work.wait()


def _outgoing(group: Any, rank: int, files: list[Path], opened: ExitStack) -> Iterator[Any]:
    for path in files:
        f = opened.enter_context(path.open("rb"))
        while data := f.read(CHUNK):
            yield dist.isend(torch.frombuffer(bytearray(data), dtype=torch.uint8), rank, group)


def _incoming(group: Any, rank: int, files: list[Path], sizes: list[int], opened: ExitStack) -> Iterator[Any]:
    for path, size in zip(files, sizes, strict=True):
        f = opened.enter_context(path.open("wb"))
        for start in range(0, size, CHUNK):
            chunk: Tensor = torch.empty(min(CHUNK, size - start), dtype=torch.uint8)
            yield dist.irecv(chunk, rank, group)
            f.write(chunk.numpy().data)  # complete: the caller has waited
        f.flush()
