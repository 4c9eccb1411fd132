"""torch's rendezvous of agents with signed states, and with a store on another node if the store's node is lost."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout, Token

from megastar.errors import UserError
from megastar.utils.files import make_folder, sync_folder, temporary_path
from megastar.utils.hostname import wait_for_name
from megastar.utils.own_files import open_own

# torch finds the caller of each of its (unused) log records with inspect.stack(), which takes up to a second: on a busy
# node heartbeats would be late.
dynamic_rendezvous.get_method_name = lambda depth=2: ""

T = TypeVar("T")
logger = logging.getLogger(__name__)
KEEP_ALIVE, ATTEMPTS = 2, 5  # seconds between an agent's heartbeats, and how many may be missing
REPLY = timedelta(seconds=10)  # timeout for a response of the store
PROBE = timedelta(seconds=3)  # timeout for a response of a node whose store is not in use yet
NAMED = 120.0  # seconds within which this node's own name must have an address
FORGET = 600.0  # seconds after which a failure of a store no longer counts
FIRST_CALL, LAST_CALL = 30, 5  # seconds to wait for more than MIN nodes: at the first start, at a restart
KEY_FILE, KEY_BYTES = "rendezvous.key", 32  # in the run folder, as hexadecimal digits


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job. Each of ``hosts`` can open the store, the k-th on ``port`` + k. This node is the ``index``-th
    (-1: not one of them)."""

    least: int
    most: int
    hosts: tuple[str, ...]
    port: int
    index: int
    address: str  # of this node, as the others reach it
    job: str
    join: float  # seconds within which ``least`` nodes must join


class Timeouts(RendezvousTimeout):
    """``started``: set after the first start; the remaining nodes then wait only briefly for others."""

    started = False

    @property
    def last_call(self) -> timedelta:
        return timedelta(seconds=LAST_CALL if self.started else FIRST_CALL)


class Handler(DynamicRendezvousHandler):
    """Ignores waiting nodes while the largest permitted number of nodes trains: no restart is needed."""

    def num_nodes_waiting(self) -> int:
        waiting: int = super().num_nodes_waiting()
        return waiting if len(self.participants()) < self.settings.max_nodes else 0

    def participants(self) -> set[Any]:
        """The nodes of the current round with a recent heartbeat, as of the last exchange."""
        return set(self._state_holder.state.participants)

    def waiting(self) -> set[Any]:
        return set(self._state_holder.state.wait_list)

    def stop_heartbeats(self) -> None:
        """This node leaves the rendezvous: the others must not take it for running."""
        self._stop_heartbeats()

    @property
    def round(self) -> int:
        """The number of the current round, as of the last exchange."""
        return int(self._state_holder.state.round)

    def is_first_to(self, what: str) -> bool:
        """Whether no other node has asked this for ``what`` before; also if the store does not answer."""
        try:
            count: int = answer_within(REPLY, lambda: self._store.add(f"megastar/{what}", 1))
        except (TimeoutError, RuntimeError, ValueError):
            return True
        return count == 1


class SignedBackend(C10dRendezvousBackend):
    """torch pickles the state of a rendezvous: only a state that was signed by an agent of this run is unpickled."""

    def __init__(self, store: TCPStore, run_id: str, key: bytes):
        self.key = key
        self.lost = False
        super().__init__(store, run_id)

    def _call_store(self, store_op: str, *args: Any, **kwargs: Any) -> Any:
        if self.lost:  # its connection is still in use by the request that was not answered
            raise RendezvousConnectionError("an earlier request was not answered")
        try:
            return answer_within(REPLY, lambda: getattr(self._store, store_op)(*args, **kwargs))
        except TimeoutError as error:
            self.lost = True
            raise RendezvousConnectionError(str(error)) from error
        except (ValueError, RuntimeError) as error:
            raise RendezvousConnectionError(str(error)) from error

    def get_state(self) -> tuple[bytes, Token] | None:
        return self._checked(super().get_state())

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        answer = super().set_state(self._sign(state) + state, token)
        return None if answer is None else (self._verify(answer[0]), *answer[1:])

    def _checked(self, answer: tuple[bytes, Token] | None) -> tuple[bytes, Token] | None:
        return None if answer is None else (self._verify(answer[0]), answer[1])

    def _sign(self, state: bytes) -> bytes:
        return hmac.digest(self.key, state, hashlib.sha256)

    def _verify(self, signed: bytes) -> bytes:
        if not hmac.compare_digest(self._sign(signed[32:]), signed[:32]):
            raise RendezvousStateError("the rendezvous holds a state that no agent of this run has signed")
        return signed[32:]


def answer_within(limit: timedelta, request: Callable[[], T]) -> T:
    """The result of ``request``, in a thread: torch's store waits without a limit for a host that closes no connection,
    because it is down or stopped. Raises ``TimeoutError``."""
    found: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            found.append(request())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="store", daemon=True)
    thread.start()
    thread.join(limit.total_seconds())
    if errors:
        raise errors[0]
    if not found:
        raise TimeoutError(f"no answer within {limit.total_seconds():.0f} s")
    return found[0]


def connect(host: str, port: int, limit: timedelta, **options: Any) -> TCPStore:
    """A connection to the store on another node. Raises ``TimeoutError``, ``RuntimeError`` or ``ValueError``."""
    return answer_within(
        limit, lambda: TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit, **options)
    )


def run_key(run: Path) -> bytes:
    """The secret of the agents of a run, which share its folder; the first of them writes it.

    Raises ``UserError`` for a file that others can read or have written, or that is not complete.
    """
    path = run / KEY_FILE
    make_folder(run)
    try:
        with suppress(FileNotFoundError):
            return _read_key(path)
        _write_key(path)
        return _read_key(path)
    except OSError as error:
        remedy = "make the run folder writable, or choose another run=..."
        raise UserError(f"the agents' key {path} cannot be written ({error.strerror or error}): {remedy}") from error


def _read_key(path: Path) -> bytes:
    """Raises ``FileNotFoundError`` and ``UserError``."""
    remedy = "while no agent of this run is running, remove it: the next start writes a new one"
    try:
        with open_own(path) as f:
            mode, content = os.fstat(f.fileno()).st_mode, f.read(KEY_BYTES * 2 + 2)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"the agents' key {path} cannot be used ({error.strerror}): {remedy}") from error
    if mode & 0o077:
        raise UserError(
            f"the agents' key {path} has mode {mode & 0o777:04o}: other users can read or change it; {remedy}, or, if nobody "
            f"has read it, chmod 600 {path}"
        )
    if not re.fullmatch(rb"[0-9a-f]{%d}\n?" % (2 * KEY_BYTES), content):
        raise UserError(f"the agents' key {path} is not {2 * KEY_BYTES} hexadecimal digits: {remedy}")
    return bytes.fromhex(content.decode())


def _write_key(path: Path) -> None:
    """Write a new key, unless another agent does so at the same time."""
    temporary = temporary_path(path)
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
            f.write(secrets.token_hex(KEY_BYTES))
            f.flush()
            os.fsync(f.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)  # atomic, and only if it does not exist
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


class StoreChoice:
    """Which host's store this node uses: at the start the one in use, and the first if there is none. ``own``: this
    node's store.

    A store that does not answer once may be slow: it is tried again, so that one time-out does not separate this node
    from the others. A second failure within ``FORGET`` seconds gives it up; the next one is a store that others use
    already, otherwise that of the next host, in the same order on all nodes.
    """

    def __init__(self, nodes: Nodes):
        self.nodes = nodes
        self.own: TCPStore | None = None
        self.failed: dict[int, float] = {}  # host -> when it failed last
        self.given_up: dict[int, float] = {}
        self.first = next((k for k in range(len(nodes.hosts)) if self._is_in_use(k)), 0)

    def after(self, k: int) -> int | None:
        """The next host after the store of host ``k`` has failed; None: all have been tried."""
        now, count = time.monotonic(), len(self.nodes.hosts)
        self.given_up = {host: at for host, at in self.given_up.items() if now - at < FORGET}
        before, self.failed[k] = self.failed.get(k), now
        if (before is None or now - before > FORGET) and self._answers(k):
            return k
        self.given_up[k] = now
        others = [n % count for n in range(k + 1, k + count) if n % count not in self.given_up]
        return next((n for n in others if self._is_in_use(n)), others[0] if others else None)

    def _answers(self, k: int) -> bool:
        if k == self.nodes.index:
            return self.own is not None
        with suppress(OSError):
            socket.create_connection((self.nodes.hosts[k], self.nodes.port + k), 1.0).close()
            return True
        return False

    def _is_in_use(self, k: int) -> bool:
        """Whether the store of host ``k`` answers and is one of this job."""
        with suppress(OSError, RuntimeError, ValueError):
            store = self.own
            if k != self.nodes.index:
                host, port = self.nodes.hosts[k], self.nodes.port + k
                socket.create_connection((host, port), 1.0).close()
                store = connect(host, port, PROBE)
            key = f"torch.rendezvous.{self.nodes.job}"
            return store is not None and answer_within(PROBE, lambda: bool(store.check([key])))
        return False


def wait_for_port(host: str, port: int, patience: float) -> None:
    """Raises ``OSError`` if nothing listens within ``patience`` seconds. torch's store would print each attempt."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((host, port), 5.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def open_store(nodes: Nodes) -> TCPStore | None:
    """This host's store, open from the start, for the case that the nodes before it in ``hosts`` are lost."""
    if nodes.index < 0:
        return None
    host, port = nodes.hosts[nodes.index], nodes.port + nodes.index
    problem = "has no address"
    try:
        wait_for_name(host, min(NAMED, nodes.join))
        problem = "is not free"
        listening = socket.create_server((host, port)).detach()  # on this address only
        return TCPStore(host, port, is_master=True, multi_tenant=True, timeout=REPLY, master_listen_fd=listening)
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning("this node cannot host the nodes' store: %s:%d %s (%s)", host, port, problem, error)
        return None


def join(nodes: Nodes, k: int, key: bytes, timeouts: Timeouts, own: TCPStore | None) -> Handler:
    """The rendezvous over the store of host ``k``; ``own``: this host's store. Raises ``RendezvousConnectionError``."""
    host, port = nodes.hosts[k], nodes.port + k
    try:
        if k == nodes.index:
            if own is None:
                raise OSError("its port is in use")
            store = own
        else:
            wait_for_port(host, port, (PROBE if timeouts.started else max(REPLY, timeouts.join)).total_seconds())
            store = connect(host, port, REPLY, multi_tenant=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise RendezvousConnectionError(f"the store on {host}:{port} cannot be reached ({error})") from error
    handler: Handler = Handler.from_backend(
        nodes.job, store, SignedBackend(store, nodes.job, key), nodes.least, nodes.most, nodes.address, timeouts,
        keep_alive_interval=KEEP_ALIVE, keep_alive_max_attempt=ATTEMPTS,
    )  # fmt: skip
    return handler
