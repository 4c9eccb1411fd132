"""Heartbeats: each rank writes its own under a key of a store and reads those of the others.

The store is the process group's TCPStore over a separate connection: two threads must not share one connection.
"""

from __future__ import annotations

import json
import select
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megastar.parallel.signed_store import SignedStore

ALIVE, OVERDUE, INVESTIGATING, EXITED, ABORTED = ".", "O", "C", "L", "E"
# INVESTIGATING: its connection to a peer broke, and it looks for the cause. EXITED: finished, or failed with an error of
# its own. ABORTED: ended because of another rank.
CONNECT_TIMEOUT = 30.0  # seconds for the first connection: all ranks connect at once while the store's process is busy
MAX_LIVENESS_SOCKETS = 128  # ranks; second connections of more would exhaust the store process's file descriptors


@dataclass
class Heartbeat:
    """The state of a rank. The field names are those of RUN/heartbeats/rank-*.json."""

    rank: int
    host: str
    pid: int
    flag: str = ALIVE
    beat: int = 0  # number of this heartbeat: each has a higher one than the last, so a repeated one is noticed
    step: int = 0
    phase: str = ""
    idle_s: float = 0.0  # since its last progress
    collectives: int = 0  # entered
    status: int = 0  # exit status
    text: str = ""  # its error, or why it aborted

    def encode(self) -> bytes:
        """The flag comes first: it is read each time, the rest only when something is wrong."""
        return (self.flag + json.dumps(asdict(self))).encode()

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


def decode(raw: bytes) -> Heartbeat:
    return Heartbeat(**json.loads(raw[1:]))


def flag_of(raw: bytes) -> str:
    return chr(raw[0])


def beat_of(raw: bytes) -> int:
    """The number of a heartbeat, without decoding it. No text before it contains an unescaped quote."""
    _, _, rest = raw.partition(b'"beat": ')
    digits = rest.partition(b",")[0]
    return int(digits) if digits.isdigit() else -1


class HeartbeatStore:
    """This rank's connection to the store. Every method may block as long as the network does."""

    def __init__(self, rank: int, world: int, attempt: int, timeout: float, secret: bytes):
        store: Any = dist.distributed_c10d._get_default_store()
        while hasattr(store, "underlying_store"):
            store = store.underlying_store
        self.host, self.port = store.host, store.port  # AttributeError: another kind of store
        self.rank, self.world, self.timeout = rank, world, timeout
        self.prefix = f"megastar/beats/{attempt}/"
        self.present: set[int] = set()  # ranks whose key exists
        self.store: SignedStore | None = None
        self.secret = secret
        self.liveness: socket.socket | None = None
        self.connect(CONNECT_TIMEOUT)

    def connect(self, patience: float = 0.0) -> None:
        """Raises ``OSError`` or torch's ``DistError`` when the store does not respond."""
        # The second connection carries nothing: it closes when the store's process ends. A request to a dead store would
        # print thirty lines of C++ on stderr.
        seconds = max(self.timeout, patience)
        if self.world <= MAX_LIVENESS_SOCKETS:
            self.liveness = socket.create_connection((self.host, self.port), seconds)
        store = dist.TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds)
        )
        store.set_timeout(timedelta(seconds=self.timeout))
        self.store = SignedStore(store, self.secret)

    def closed(self) -> bool:
        """Whether the store's process has ended. A host that vanished without closing its connections is not detected."""
        if self.store is None:
            return True
        s = self.liveness
        return s is not None and s.fileno() >= 0 and bool(select.select([s], [], [], 0)[0])

    def publish(self, raw: bytes) -> None:
        self.write(str(self.rank), raw)

    def write(self, key: str, raw: bytes) -> None:
        assert self.store is not None
        self.store.set(self.prefix + key, raw)

    def get(self, key: str) -> bytes:
        """The value of ``key``; empty if it is missing or forged."""
        assert self.store is not None
        key = self.prefix + key
        return self.store.get_all([key]).get(key, b"") if self.store.check([key]) else b""

    def read(self, ranks: list[int]) -> dict[int, bytes]:
        """The last heartbeats of ``ranks``; those not yet published and forged ones are left out."""
        assert self.store is not None
        for rank in ranks:
            if rank not in self.present and self.store.check([self.prefix + str(rank)]):
                self.present.add(rank)
        there = [rank for rank in ranks if rank in self.present]
        if not there:
            return {}
        found = self.store.get_all([self.prefix + str(rank) for rank in there])
        return {int(key.removeprefix(self.prefix)): raw for key, raw in found.items()}

    def forged(self) -> set[int]:
        """The ranks whose heartbeat was found overwritten by another process at the last ``read``."""
        store = self.store
        keys = [key.removeprefix(self.prefix) for key in store.forged] if store else []
        return {int(key) for key in keys if key.isascii() and key.isdigit()}

    def close(self) -> None:
        with suppress(OSError):
            if self.liveness is not None:
                self.liveness.close()
        self.liveness = self.store = None
