"""torch's rendezvous of agents: a store on one of the nodes, another one if its node is lost, states that carry a signature."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout, Token

# torch names the caller of each of its (unused) log records by inspect.stack(), which costs up to a second: signs of life would
# be late on a busy node.
dynamic_rendezvous.get_method_name = lambda depth=2: ""

logger = logging.getLogger(__name__)
KEEP_ALIVE, ATTEMPTS = 2, 5  # seconds between an agent's signs of life, and how many may be missing
REPLY = timedelta(seconds=10)  # for an answer of the store
PROBE = timedelta(seconds=3)  # for an answer of a node whose store is not in use yet
FIRST_CALL, LAST_CALL = 30, 5  # seconds to wait for more nodes than MIN: at the first start, at a restart
KEY_FILE = "rendezvous.key"  # in the run folder


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job. ``hosts`` may each open the store, the k-th on ``port`` + k; this node is the ``index``-th (-1: none)."""

    least: int
    most: int
    hosts: tuple[str, ...]
    port: int
    index: int
    address: str  # of this node, for the others
    job: str
    join: float  # seconds within which ``least`` nodes have to be there


class Timeouts(RendezvousTimeout):
    """``started``: from then on the nodes that are left do not wait long for more."""

    started = False

    @property
    def last_call(self) -> timedelta:
        return timedelta(seconds=LAST_CALL if self.started else FIRST_CALL)


class Handler(DynamicRendezvousHandler):
    """A node that waits while as many as may train do so is no reason to restart them."""

    def num_nodes_waiting(self) -> int:
        waiting: int = super().num_nodes_waiting()
        return waiting if len(self.participants()) < self.settings.max_nodes else 0

    def participants(self) -> set[Any]:
        """The nodes of the present round that have given a sign of life lately, as of the last exchange."""
        return set(self._state_holder.state.participants)

    def waiting(self) -> set[Any]:
        return set(self._state_holder.state.wait_list)

    def is_first(self) -> bool:
        """Whether this node is the first of its round."""
        return bool(min(self.participants(), default=None) == self._this_node)


class SignedBackend(C10dRendezvousBackend):
    """torch pickles the state of a rendezvous: only one that an agent of this run has signed is read."""

    def __init__(self, store: TCPStore, run_id: str, key: bytes):
        self.key = key
        super().__init__(store, run_id)

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


def run_key(run: Path) -> bytes:
    """The secret of the agents of a run, which share its folder; the first of them writes it."""
    path = run / KEY_FILE
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / f".{KEY_FILE}.{secrets.token_hex(8)}"
    with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
        f.write(secrets.token_hex(32))
    with suppress(FileExistsError):
        os.link(temporary, path)  # whole or not at all, and only the first time
    temporary.unlink()
    return bytes.fromhex(path.read_text())


def find_store(nodes: Nodes) -> int:
    """Which host has the store, as a node sees it that comes later than others; at the start it will be the first."""
    for k, host in enumerate(nodes.hosts):
        with suppress(OSError, RuntimeError, ValueError):
            if k != nodes.index:
                socket.create_connection((host, nodes.port + k), 1.0).close()
                store = TCPStore(host, nodes.port + k, is_master=False, wait_for_workers=False, timeout=PROBE)
                if store.check([f"torch.rendezvous.{nodes.job}"]):  # it is a store, and of this job
                    return k
    return 0


def wait_for_port(host: str, port: int, patience: float) -> None:
    """Raises ``OSError`` where nothing listens within ``patience`` seconds; torch's store would print its own attempts."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((host, port), 5.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def open_store(nodes: Nodes) -> TCPStore | None:
    """This host's store, from the start: if the nodes before it in ``hosts`` are lost, the others find it there at once."""
    if nodes.index < 0:
        return None
    host, port = nodes.hosts[nodes.index], nodes.port + nodes.index
    try:
        listening = socket.create_server((host, port)).detach()  # on this address only
        return TCPStore(host, port, is_master=True, multi_tenant=True, timeout=REPLY, master_listen_fd=listening)
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning("this node cannot keep the nodes' store, %s:%d is not free (%s)", host, port, error)
        return None


def join(nodes: Nodes, k: int, key: bytes, timeouts: Timeouts, own: TCPStore | None) -> Handler:
    """The rendezvous over the store of host ``k``; ``own`` is this host's. Raises ``RendezvousConnectionError``."""
    host, port = nodes.hosts[k], nodes.port + k
    try:
        if k == nodes.index:
            if own is None:
                raise OSError("its port is in use")
            store = own
        else:
            wait_for_port(host, port, (PROBE if timeouts.started else max(REPLY, timeouts.join)).total_seconds())
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, multi_tenant=True, timeout=REPLY)
    except (OSError, RuntimeError, ValueError) as error:
        raise RendezvousConnectionError(f"the store on {host}:{port} cannot be reached ({error})") from error
    handler: Handler = Handler.from_backend(
        nodes.job, store, SignedBackend(store, nodes.job, key), nodes.least, nodes.most, nodes.address, timeouts,
        keep_alive_interval=KEEP_ALIVE, keep_alive_max_attempt=ATTEMPTS,
    )  # fmt: skip
    return handler
