"""The ranks' signs of life: each sets its own under a key of a store and reads the others'.

The store is the process group's TCPStore over a connection of its own: one connection must not be used by two threads.
"""

from __future__ import annotations

import json
import os
import select
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

ALIVE, OVERDUE, INVESTIGATING, LEFT, ENDED = ".", "O", "C", "L", "E"
# PUZZLED: its connection to a peer broke, it looks for the reason. LEFT: by itself, done or with an error of its own.
# ENDED: because of another rank.


@dataclass
class Heartbeat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    flag: str = ALIVE
    beat: int = 0  # grows with each
    step: int = 0
    phase: str = ""
    idle_s: float = 0.0  # since it last moved
    collectives: int = 0  # entered
    status: int = 0  # that it leaves with
    text: str = ""  # its error, or why it ended

    def encode(self) -> bytes:
        """The flag comes first: it is read each time, the rest only when something is wrong."""
        return (self.flag + json.dumps(asdict(self))).encode()

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


def decode(raw: bytes) -> Heartbeat:
    return Heartbeat(**json.loads(raw[1:]))


def flag_of(raw: bytes) -> str:
    return chr(raw[0])


CONNECT_TIMEOUT = (
    30.0  # seconds that the first connection may take: all ranks come at once, and the store's process is busy
)
MAX_LIVENESS_SOCKETS = (
    128  # ranks; a second connection of more of them would cost the store's process its file descriptors
)


class HeartbeatStore:
    """This rank's connection to the store. Every method may block as long as the network does."""

    def __init__(self, rank: int, world: int, attempt: int, timeout: float):
        store = dist.distributed_c10d._get_default_store()
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        self.host, self.port = store.host, store.port  # AttributeError: another kind of store
        self.rank, self.world, self.timeout = rank, world, timeout
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.prefix = f"megastar/beats/{restarts}/{attempt}/"
        self.known: set[int] = set()  # ranks whose key exists
        self.tripwire = world <= MAX_LIVENESS_SOCKETS
        self.store: Any = None
        self.wire: socket.socket | None = None
        self.connect(CONNECT_TIMEOUT)

    def connect(self, patience: float = 0.0) -> None:
        """Raises ``OSError`` or torch's ``DistError`` when nobody answers."""
        # A second, silent connection: it ends when the store's process does, and to ask a dead store would print
        # thirty lines of C++ on stderr.
        seconds = max(self.timeout, patience)
        if self.tripwire:
            self.wire = socket.create_connection((self.host, self.port), seconds)
        self.store = dist.TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
        self.store.set_timeout(timedelta(seconds=self.timeout))

    def closed(self) -> bool:
        """Whether the store's process is gone. A host that vanished without a word is not seen here."""
        if self.store is None:
            return True
        wire = self.wire
        return wire is not None and wire.fileno() >= 0 and bool(select.select([wire], [], [], 0)[0])

    def publish(self, raw: bytes) -> None:
        self.store.set(self.prefix + str(self.rank), raw)

    def read(self, ranks: list[int]) -> dict[int, bytes]:
        """The last beats of those that ever had one."""
        for rank in ranks:
            if rank not in self.known and self.store.check([self.prefix + str(rank)]):
                self.known.add(rank)
        there = [rank for rank in ranks if rank in self.known]
        if not there:
            return {}
        values = self.store.multi_get([self.prefix + str(rank) for rank in there])
        return {rank: bytes(value) for rank, value in zip(there, values, strict=True)}

    def close(self) -> None:
        with suppress(OSError):
            if self.wire is not None:
                self.wire.close()
        self.wire = self.store = None
