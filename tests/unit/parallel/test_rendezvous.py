"""Ranks that wait for each other, as threads of one process."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megastar.errors import MissingRanks, UserError
from megastar.parallel import rendezvous
from megastar.parallel.rendezvous import host_store, join, master_address
from megastar.utils.launcher import LISTEN_FD
from megastar.utils.signals import Preempted


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(rendezvous, "REPORT_EVERY", 0.3)
    monkeypatch.setattr(rendezvous, "STOP_GRACE", 1.0)


@contextmanager
def closed_port() -> Iterator[str]:
    """A port that nobody listens on, and that no other process can take meanwhile."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield str(s.getsockname()[1])


def ranks(ranks_here, world, timeout=30.0, stopped=None, port="", worlds=None, **more):
    """What ``join`` returned or raised, by rank. ``worlds``: of ranks that were told another number of ranks.

    Without ``port``, rank 0 gets a socket that listens already, as from our launcher: no rank is refused at first.
    """
    stopped, results, of_rank_0 = stopped or {}, {}, {}
    if not port:
        listening = socket.create_server(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
        of_rank_0 = {LISTEN_FD: str(listening.detach())}

    def start(rank):
        size = (worlds or {}).get(rank, world)
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
        place |= of_rank_0 if rank == 0 else {}
        try:
            results[rank] = join(timeout, lambda: stopped.get(rank, 0), place)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=start, args=(r,)) for r in ranks_here]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_all_ranks_meet():
    stores = ranks([2, 1, 0], 3)
    stores[1].set("key", "value")
    assert stores[0].get("key") == b"value" == stores[2].get("key")


def test_ranks_of_different_worlds_are_refused_at_once():
    begin = time.monotonic()
    found = ranks([0, 1, 2], 3, worlds={2: 4})
    assert time.monotonic() - begin < 20 and all(isinstance(e, UserError) for e in found.values())
    assert str(found[2]).startswith("rank 2 was started as one of 4 ranks, rank 0 as one of 3: give all ranks")
    assert [e.reported for _, e in sorted(found.items())] == [True, True, False]


@pytest.mark.parametrize("former", [False, True])
def test_the_ranks_of_torchrun_have_a_store_of_their_own(former):
    """One that does not end with the agent. ``former``: the agent's names the store of an earlier start."""
    agent, other = (host_store("127.0.0.1", 0, {}) for _ in range(2))
    if former:
        agent.set("megastar/join/store", f"{other.port} of-an-earlier-start")
    stores = ranks([1, 0, 2], 3, port=str(agent.port), TORCHELASTIC_USE_AGENT_STORE="True")
    assert {stores[r].port for r in range(3)} == {stores[0].port} and stores[0].port not in (agent.port, other.port)
    del agent
    stores[1].set("key", "value")
    assert stores[0].get("key") == b"value" == stores[2].get("key")


def test_a_port_that_another_program_uses_now_does_not_hold_an_attempt(monkeypatch):
    """The agent's store still names the port of an earlier rank 0; a program that does not answer listens there."""
    monkeypatch.setattr(rendezvous, "CONNECT_TIMEOUT", 1.0)
    agent, results = host_store("127.0.0.1", 0, {}), {}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        agent.set("megastar/join/store", f"{silent.getsockname()[1]} of-an-earlier-start")
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port)}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}

        def start(rank: int) -> None:
            results[rank] = join(30.0, environ={"RANK": str(rank), **place})

        threads = [threading.Thread(target=start, args=(rank,), daemon=True) for rank in (1, 0)]
        begin = time.monotonic()
        threads[0].start()
        silent.accept()  # rank 1 is connected to it before rank 0 starts
        time.sleep(0.3)
        threads[1].start()
        for thread in threads:
            thread.join(20)
        assert set(results) == {0, 1} and time.monotonic() - begin < 15
        assert results[1].port == results[0].port != silent.getsockname()[1]


def test_missing_ranks_are_reported_and_named(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "REPORT_EVERY", 0.05)
    found = ranks([0, 1], 4, timeout=2.0)
    assert type(found[0]) is type(found[1]) is MissingRanks
    assert "rank 0 waited 2 s (faults.join_timeout) for ranks 2, 3 of 4: check that" in str(found[0])
    assert str(found[1]) == ""  # reported once
    said = [r.getMessage() for r in caplog.records]
    missing = [s for s in said if "for ranks 2, 3 of 4" in s]
    assert len(missing) > 2 and all("rank 0 has waited" in s for s in missing)
    # Before they have met, rank 0 may report rank 1 too, and rank 1 rank 0.
    assert all(s in missing or "for ranks 1, 2, 3 of 4" in s or "rank 1 has waited" in s for s in said)


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_missing_rank_0_is_named(monkeypatch, caplog, host):
    monkeypatch.setattr(rendezvous, "REPORT_EVERY", 0.0)  # the first report does not wait for an answer
    with closed_port() as port:
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": port}
        with pytest.raises(MissingRanks, match=f"rank 1 waited 1 s .* for rank 0 at {host}:.*: check that"):
            join(1.0, environ=place)
    assert any(f"has waited 0 s for rank 0 at {host}" in r.getMessage() for r in caplog.records)


def test_a_server_that_is_not_a_store_is_no_hang():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = ranks([1], 2, timeout=1.5, port=str(silent.getsockname()[1]))
    assert "for rank 0 at 127.0.0.1" in str(found[1])


def test_a_missing_rank_0_of_torchrun_is_named():
    agent = host_store("127.0.0.1", 0, {})
    found = ranks([1], 2, timeout=1.5, port=str(agent.port), TORCHELASTIC_USE_AGENT_STORE="True")
    assert "for rank 0 at 127.0.0.1" in str(found[1]) and isinstance(found[1], MissingRanks)


def test_a_signal_ends_the_wait_on_all_ranks(monkeypatch, caplog):
    monkeypatch.setattr(rendezvous, "STOP_GRACE", 3.0)  # rank 1 counts it from before it is connected
    begin = time.monotonic()
    found = ranks([0, 1], 3, stopped={1: signal.SIGINT})
    assert [type(found[r]) for r in (0, 1)] == [Preempted] * 2 and time.monotonic() - begin < 20
    assert found[1].signal == signal.SIGINT and found[0].code == 85
    assert "while rank 0 waits for rank 2 of 3: leaving" in caplog.text
    monkeypatch.setattr(rendezvous, "STOP_GRACE", 0.5)
    with closed_port() as port:
        found = ranks([1], 2, stopped={1: signal.SIGTERM}, port=port)
    assert isinstance(found[1], Preempted)


def test_ranks_with_a_signal_that_all_meet_leave_later_together(monkeypatch):
    monkeypatch.setattr(rendezvous, "STOP_GRACE", 30.0)
    assert not any(isinstance(f, BaseException) for f in ranks([0, 1], 2, stopped={1: signal.SIGTERM}).values())


def test_a_port_in_use_is_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = ranks([0], 2, port=str(port))
    assert isinstance(found[0], UserError)
    assert str(found[0]) == (
        f"rank 0 cannot listen on 127.0.0.1:{port} (Address already in use): set MASTER_PORT to a free port"
    )


def test_the_store_uses_the_socket_of_the_launcher():
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = host_store("127.0.0.1", port, {LISTEN_FD: str(listening.detach())})
    store.set("a", "b")
    assert (store.host, store.port, store.get("a")) == ("127.0.0.1", port, b"b")


def test_the_address_of_rank_0():
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert master_address(place) == ("node1", 29500)
    assert master_address(place | {"LOCAL_WORLD_SIZE": "2"}) == ("127.0.0.1", 29500)  # all ranks are on this node
    assert master_address(place | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"})[0] == "node1"
    for change, message in (
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set: start with"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a port"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999' is not a port"),
    ):
        with pytest.raises(UserError, match=message):
            master_address(place | change)
