"""Rendezvous of the ranks of a launch: rank 0 hosts their key-value store; all ranks connect and wait for each other.

Nothing here or in the store is pickled (docs/security.md). Under torchrun, the agent's store only passes on the address
of rank 0's store: ranks whose agent is killed can still save.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from megastar.errors import MissingRanks, UserError
from megastar.utils.hostname import host_name
from megastar.utils.interfaces import LOOPBACK, listen_address
from megastar.utils.launcher import LISTEN_FD, local_world, place_of
from megastar.utils.signals import Preempted

REPORT_EVERY = 10.0  # seconds between reports of missing ranks
STOP_GRACE = 10.0  # seconds that a rank with a stop signal waits for others, so that all stop together
CONNECT_TIMEOUT = 20.0  # seconds for one connection to rank 0's node
GAVE_UP = "gave up"
PREFIX = "megastar/join/"

logger = logging.getLogger(__name__)


def agent_hosts_store(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether MASTER_ADDR and MASTER_PORT name the store of torchrun's agent."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def on_one_node(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether all ranks are on this node, according to the launcher."""
    return local_world(environ) == place_of(environ).world


def master_address(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port of rank 0's store, or of the store of torchrun's agent. Raises ``UserError``."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            raise UserError(f"{name} is not set: start with --nproc or torchrun, or set it in the batch script")
    port = environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise UserError(f"MASTER_PORT={port!r} is not a port from 1 to 65535")
    if on_one_node(environ) and not agent_hosts_store(environ):
        return LOOPBACK, int(port)
    return environ["MASTER_ADDR"], int(port)


def host_store(host: str, port: int, environ: Mapping[str, str] = os.environ) -> dist.TCPStore:
    """On rank 0: listen on the socket that the launcher opened, or at ``host``. Raises ``UserError``."""
    if LISTEN_FD in environ:
        address, fd = LOOPBACK, int(environ[LISTEN_FD])
    else:
        address = listen_address(host, environ)
        both = not address and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in address else socket.AF_INET
        try:
            fd = socket.create_server((address, port), family=family, dualstack_ipv6=both).detach()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(
                f"rank 0 cannot listen on {address or host}:{port} ({reason}): set MASTER_PORT to a free port"
            ) from error
    return dist.TCPStore(address or LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)


def join(
    timeout: float,
    stopped: Callable[[], int] = lambda: 0,
    environ: Mapping[str, str] = os.environ,
    setting: str = "faults.join_timeout",
) -> dist.TCPStore:
    """Wait until all ranks have joined the store of this launch; returns it. ``setting``: the name of ``timeout``.

    Reports the missing ranks every 10 s. Raises ``MissingRanks`` after ``timeout`` seconds, ``Preempted`` where
    ``stopped`` returns the number of a signal, here or on another rank, and ``UserError``.
    """
    return _Joining(timeout, stopped, environ, setting).run()


class _Connection(NamedTuple):
    store: dist.TCPStore
    liveness: socket.socket  # carries nothing: closes when the store's process ends
    port: int


class _Joining:
    def __init__(self, timeout: float, stopped: Callable[[], int], environ: Mapping[str, str], setting: str):
        self.rank, self.world, _ = place_of(environ)
        self.timeout, self.stopped, self.environ, self.setting = timeout, stopped, environ, setting
        self.host, self.port = master_address(environ)
        self.begin = self.reported = time.monotonic()
        self.stop: tuple[int, float] | None = None  # signal, and the time at which it was noticed
        self.liveness: socket.socket | None = None

    def run(self) -> dist.TCPStore:
        agent = self._connect(self._address) if agent_hosts_store(self.environ) else None
        if agent is not None and on_one_node(self.environ):
            self.host = LOOPBACK
        try:
            store = self._open(agent) if self.rank == 0 else self._connect(lambda: self._address_of_rank_0(agent))
            self._meet(store)
        except (RuntimeError, OSError) as error:  # from the store; UserError is a subclass of neither
            raise self._lost() from error
        finally:
            self._close_liveness()
        return store

    def _open(self, agent: dist.TCPStore | None) -> dist.TCPStore:
        """On rank 0: open the store, and publish its port in the agent's store."""
        self._close_liveness()
        store = host_store(self.host, 0 if agent is not None else self.port, self.environ)
        if agent is not None:
            token = secrets.token_hex(8)
            store.set(PREFIX + token, "")
            agent.set(PREFIX + "store", f"{store.port} {token}")
        return store

    def _address(self) -> tuple[int, str]:
        """Port of the store, and a key that it must hold; no key: any store."""
        return self.port, ""

    def _address_of_rank_0(self, agent: dist.TCPStore | None) -> tuple[int, str]:
        """The same for rank 0's store. Raises ``OSError`` until rank 0 has published it."""
        if agent is None:
            return self._address()
        if not agent.check([PREFIX + "store"]):
            raise OSError("it has not started")
        # The agent's store outlives the ranks: this may be the port of an earlier rank 0, now used by another process.
        port, token = bytes(agent.get(PREFIX + "store")).decode().split()
        return int(port), PREFIX + token

    def _close_liveness(self) -> None:
        if self.liveness is not None:
            self.liveness.close()
            self.liveness = None

    def _connect(self, find: Callable[[], tuple[int, str]]) -> dist.TCPStore:
        results: queue.SimpleQueue[_Connection | Exception] = queue.SimpleQueue()

        def attempt() -> None:
            liveness = None
            try:  # a refused connection of torch's own would print a trace
                self.port, key = find()
                host, port = self.host, self.port
                liveness = socket.create_connection((host, port), CONNECT_TIMEOUT)
                # Longer than this rank waits: torch prints a trace after its own timeout.
                store = open_client(host, port, 2 * self.timeout + 60)
                if key and not store.check([key]):
                    raise OSError("it has not started")
                results.put(_Connection(store, liveness, port))
            except (OSError, RuntimeError, ValueError) as error:
                if liveness is not None:
                    liveness.close()
                results.put(error)

        reason = "no answer"
        while True:
            # In a thread: torch waits forever for the response of a server that is not a store. An attempt that takes too
            # long is not waited for, because the store may be found at another port meanwhile; it may still succeed.
            threading.Thread(target=attempt, daemon=True).start()
            deadline, found = time.monotonic() + CONNECT_TIMEOUT, None
            while found is None and time.monotonic() < deadline:
                self._check(lambda: f"rank 0 at {self.host}:{self.port} ({reason})")  # noqa: B023
                with suppress(queue.Empty):
                    found = results.get(timeout=0.1)
            if isinstance(found, _Connection):
                self._close_liveness()
                self.liveness, self.port = found.liveness, found.port
                return found.store
            if found is None:
                reason = f"no answer within {CONNECT_TIMEOUT:.0f} s"
            elif isinstance(found, OSError):
                reason = found.strerror or str(found)
            else:
                reason = "its answer is not that of a store"
            time.sleep(0.2)

    def _meet(self, store: dist.TCPStore) -> None:
        """Rank 0 checks for the others, and publishes that all have joined or that it gives up."""
        self._compare_worlds(store)
        store.set(f"{PREFIX}{self.rank}", host_name(self.environ))
        all_here, stop = PREFIX + "all", PREFIX + "stop"
        here, pause, stop_sent = 0, 0.01, False  # ranks below ``here`` have joined
        while not store.check([all_here]):
            while self.rank == 0 and here < self.world and store.check([f"{PREFIX}{here}"]):
                here += 1
            if here == self.world:
                store.set(all_here, "")
                return
            if self.liveness is not None and select.select([self.liveness], [], [], 0)[0]:
                raise self._lost()
            if store.check([PREFIX + "differ"]):
                raise UserError(bytes(store.get(PREFIX + "differ")).decode(), reported=True)
            if self.stopped() and not stop_sent:
                store.set(stop, "")
                stop_sent = True
            try:
                self._check(lambda: self._missing(store), bool(store.check([stop])))
            except MissingRanks:
                if self.rank == 0:
                    store.set(all_here, GAVE_UP)
                    time.sleep(2.0)  # the others read it
                raise
            time.sleep(pause)
            pause = min(0.5, 1.2 * pause)
        if bytes(store.get(all_here)) == GAVE_UP.encode():
            raise MissingRanks("")  # rank 0 reports it

    def _compare_worlds(self, store: dist.TCPStore) -> None:
        """Raises ``UserError``, on the ranks that wait too, if this rank was started for another number of ranks."""
        key = PREFIX + "world"
        if self.rank == 0:
            store.set(key, str(self.world))
            return
        while not store.check([key]):  # rank 0 has just opened it
            self._check(lambda: f"rank 0 at {self.host}:{self.port}")
            time.sleep(0.01)
        if (world := bytes(store.get(key)).decode()) != str(self.world):
            text = (
                f"rank {self.rank} was started as one of {self.world} ranks, rank 0 as one of {world}: give all ranks of a "
                "launch the same number (WORLD_SIZE, --nnodes and --nproc-per-node, or srun's --ntasks)"
            )
            store.set(PREFIX + "differ", text)
            raise UserError(text)

    def _missing(self, store: dist.TCPStore) -> str:
        """The ranks that have not joined; empty if a lower rank reports them."""
        if any(store.check([f"{PREFIX}{r}"]) for r in range(self.rank)):
            return ""
        missing = [r for r in range(self.world) if r != self.rank and not store.check([f"{PREFIX}{r}"])]
        names = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        return f"rank{'s' * (len(missing) > 1)} {names} of {self.world}"

    def _check(self, missing: Callable[[], str], others_stop: bool = False) -> None:
        now = time.monotonic()
        if self.stop is None and (self.stopped() or others_stop):
            self.stop = self.stopped() or signal.SIGTERM, now
            if names := missing():
                logger.warning("signal %d while rank %d waits for %s: leaving", self.stop[0], self.rank, names)
        if self.stop is not None and now - self.stop[1] > STOP_GRACE:
            raise Preempted(self.stop[0])
        if now - self.begin > self.timeout:
            names = missing()
            text = (
                f"rank {self.rank} waited {self.timeout:.0f} s ({self.setting}) for {names}: check that these ranks "
                f"are started and their nodes are up, and that they can reach {self.host}:{self.port}"
            )
            raise MissingRanks(text if names else "")
        if now - self.reported > REPORT_EVERY:
            self.reported = now
            if names := missing():
                waited = now - self.begin
                logger.warning(
                    "rank %d has waited %.0f s for %s, of at most %.0f s", self.rank, waited, names, self.timeout
                )

    def _lost(self) -> MissingRanks:
        return MissingRanks(f"rank 0 at {self.host}:{self.port} left while rank {self.rank} waited for other ranks")


def open_client(host: str, port: int, seconds: float) -> dist.TCPStore:
    timeout = timedelta(seconds=seconds)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
