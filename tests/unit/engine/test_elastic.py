"""Without processes: which ranks a batch allows, who keeps whose copy, whose folders are stale, which states are read."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError

from megastar.config.load import as_run_config, resolve_batch
from megastar.engine.elastic import node_memory as memory
from megastar.engine.elastic import rendezvous
from megastar.engine.elastic.batch import fit_batch, usable_ranks
from megastar.engine.elastic.memory_checkpoint import files_of, inventory, peers_of
from megastar.engine.elastic.rendezvous import KEY_FILE, Nodes, SignedBackend, StoreChoice, run_key
from megastar.errors import UserError
from megastar.utils.files import sha256


def config(batch: int, micro: int = 0, tensor: int = 1, guided: bool = False, negatives: str = "auto"):
    return as_run_config(
        {
            "data": {"shards": "x"},
            "train": {"global_batch": batch, "micro_batch": micro},
            "parallel": {"tensor_parallel": tensor},
            "self_guided": {"enabled": guided, "negatives": negatives},
        }
    )


@pytest.mark.parametrize(
    ("batch", "tensor", "ranks", "usable"),
    [(256, 1, 24, 16), (256, 2, 7, 4), (12, 1, 3, 3), (8, 4, 3, 0), (7, 1, 6, 1)],
)
def test_the_most_ranks_that_divide_the_batch_are_used(batch, tensor, ranks, usable):
    assert usable_ranks(batch, tensor, ranks) == usable


@pytest.mark.parametrize(
    ("micro", "negatives", "ranks", "fit"),
    [
        (0, "", 32, (32, 8)),  # 256 images: as planned
        (0, "", 24, (16, 8)),  # no larger than planned: two passes
        (6, "", 24, (16, 4)),  # does not divide 16 images
        (0, "auto", 24, (16, 8)),  # contrastive: the objective does not depend on the passes
        (0, "micro_batch", 24, (16, 0)),  # it does: one pass
        (4, "micro_batch", 24, (16, 4)),
        (0, "", 40, (32, 8)),  # spare ranks
    ],
)
def test_fewer_ranks_accumulate_more(micro, negatives, ranks, fit):
    cfg = config(256, micro if micro != 6 else 4, guided=bool(negatives), negatives=negatives or "auto")
    assert fit_batch(cfg, ranks, 32) == fit
    cfg.train.micro_batch = fit[1]
    size, passes = resolve_batch(cfg.train, 1, fit[0])
    assert size * passes * fit[0] == 256


def test_too_few_ranks_for_the_tensor_group_are_an_error():
    with pytest.raises(UserError, match=r"3 rank\(s\) cannot hold parallel.tensor_parallel = 4: start more"):
        fit_batch(config(8, tensor=4), 3, 8)


def test_copies_are_kept_on_the_next_nodes():
    assert peers_of([0, 0, 1, 1, 2, 2]) == [[2], [3], [4], [5], [0], [1]]
    assert peers_of([0, 0, 1, 1, 2, 2], 2) == [[2, 4], [3, 5], [4, 0], [5, 1], [0, 2], [1, 3]]
    assert peers_of([0, 0, 1], 3) == [[2], [2], [0]]  # a node that starts fewer ranks, and fewer nodes than copies
    assert peers_of([4, 4]) == [[], []]
    assert files_of(3, 1) == ["state-00003.safetensors", "random-00003.pt", "rank-00003.json"]
    assert files_of(3, 2) == ["state-00003.safetensors", "rank-00003.json"]  # the second of its tensor group


def test_a_damaged_file_does_not_count(tmp_path):
    folder = tmp_path / "step-00000004-abcd0123"
    folder.mkdir()
    (folder / "state-00000.safetensors").write_bytes(b"state")
    digest = "0" * 64
    (folder / "rank-00000.json").write_text(json.dumps({"files": {"state-00000.safetensors": {"sha256": digest}}}))
    (folder / "rank-00001.json").write_text("[")
    assert inventory(tmp_path, 0, 1) == {}
    real = sha256(folder / "state-00000.safetensors")
    (folder / "rank-00000.json").write_text((folder / "rank-00000.json").read_text().replace(digest, real))
    assert inventory(tmp_path, 0, 1) == {folder.name: [0]} and inventory(tmp_path, 1, 2) == {}


def test_only_folders_without_an_agent_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY", tmp_path)
    mine = f"megastar-{os.getuid()}-0123456789ab-"
    names = [mine + "dead", mine + "live", mine + "new", f"megastar-{os.getuid() + 1}-0123456789ab-x", "other"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / (mine + "link")).symlink_to(tmp_path / "other")
    for name in (mine + "dead", mine + "live"):
        (tmp_path / name / memory.LOCK).touch()
    with (tmp_path / (mine + "live") / memory.LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with memory.node_memory(tmp_path / "run") as folder:
            left = {p.name for p in tmp_path.iterdir()}
            assert left == {*names, mine + "link", folder.name} - {mine + "dead"}
            assert folder.stat().st_mode & 0o777 == 0o700
        assert not folder.exists()
    os.utime(tmp_path / (mine + "new"), (0, time.time() - 2 * memory.STARTUP))
    memory.remove_stale()
    assert {p.name for p in tmp_path.iterdir()} == {names[3], "other", mine + "link"}


def test_a_state_that_no_agent_signed_is_not_unpickled(tmp_path):
    key = run_key(tmp_path)
    assert run_key(tmp_path) == key and (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    store = HashStore()
    backend, other = SignedBackend(store, "job", key), SignedBackend(store, "job", key)
    state, token, written = backend.set_state(pickle.dumps("one"))
    assert written and pickle.loads(state) == "one"
    assert other.set_state(pickle.dumps("two"), None)[::2] == (state, False)  # another was first: it is returned
    assert pickle.loads(other.set_state(pickle.dumps("three"), token)[0]) == "three"
    SignedBackend(store, "job", b"x" * 32).set_state(pickle.dumps("forged"), other.get_state()[1])
    with pytest.raises(RendezvousStateError, match="no agent of this run has signed"):
        backend.get_state()


KEY = "0123456789abcdef" * 4


def make_key(path: Path, content: bytes = KEY.encode(), mode: int = 0o600) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def link_to_a_key(path: Path) -> None:
    make_key(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda p: make_key(p, b""), "is not 64 hexadecimal digits"),
        (lambda p: make_key(p, KEY[:62].encode()), "is not 64 hexadecimal digits"),
        (lambda p: make_key(p, KEY.encode() + b"00"), "is not 64 hexadecimal digits"),
        (lambda p: make_key(p, b"0" * (8 << 20)), "is not 64 hexadecimal digits"),
        (lambda p: make_key(p, b"g" * 64), "is not 64 hexadecimal digits"),
        (lambda p: make_key(p, b"0 " * 32), "is not 64 hexadecimal digits"),
        (lambda p: make_key(p, b"\xff" * 64), "is not 64 hexadecimal digits"),
        (lambda p: make_key(p, mode=0o640), "has mode 0640: other users can read or change it"),
        (lambda p: make_key(p, mode=0o604), "has mode 0604: other users can read or change it"),
        (lambda p: make_key(p, mode=0o620), "has mode 0620: other users can read or change it"),
        (link_to_a_key, "is a symbolic link"),
        (lambda p: p.symlink_to(p.with_name("nothing")), "is a symbolic link"),
        (Path.mkdir, "is not a file of this user alone"),
        (os.mkfifo, "is not a file of this user alone"),
    ],
)  # fmt: skip
def test_a_key_that_others_may_know_or_that_is_damaged_is_refused(tmp_path, make, problem):
    make(tmp_path / KEY_FILE)
    with pytest.raises(UserError, match=problem) as error:
        run_key(tmp_path)
    assert str(tmp_path / KEY_FILE) in str(error.value) and "remove it: the next start writes a new one" in str(
        error.value
    )
    assert KEY not in str(error.value)


def test_another_users_key_is_refused(tmp_path, monkeypatch):
    make_key(tmp_path / KEY_FILE)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="is not a file of this user alone"):
        run_key(tmp_path)


def test_a_key_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("link", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(UserError, match="key .*rendezvous.key cannot be written .No space left on device"):
                run_key(tmp_path)
        assert not list(tmp_path.iterdir())
    make_key(tmp_path / KEY_FILE, KEY.encode() + b"\n")
    assert run_key(tmp_path) == bytes.fromhex(KEY) and [p.name for p in tmp_path.iterdir()] == [KEY_FILE]


# Which store the agents use -----------------------------------------------------------------------------------------
@pytest.fixture
def stores():
    """Two stores on neighbouring ports, as hosts 0 and 1 open them, and the nodes of host 2."""
    for _ in range(50):
        servers = [socket.create_server(("127.0.0.1", 0))]
        port = servers[0].getsockname()[1]
        try:
            servers.append(socket.create_server(("127.0.0.1", port + 1)))
            break
        except OSError:
            servers[0].close()
    timeout = timedelta(seconds=5)
    opened = [
        TCPStore(
            "127.0.0.1", port + k, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=s.detach()
        )
        for k, s in enumerate(servers)
    ]
    return opened, Nodes(1, 3, ("127.0.0.1",) * 3, port, 2, "127.0.0.1", "job", 5.0)


def test_a_store_that_fails_once_is_tried_again(stores):
    opened, nodes = stores
    opened[0].set("torch.rendezvous.job", "")
    choice = StoreChoice(nodes)
    assert choice.first == 0
    assert choice.after(0) == 0  # it answers: one time-out does not separate this node from the others
    assert choice.after(0) == 1
    choice.failed[0] = choice.given_up[0] = time.monotonic() - 601  # long ago
    assert choice.after(1) == 1 and choice.after(0) == 0


def test_after_a_loss_a_store_that_others_use_comes_first(stores):
    opened, nodes = stores
    choice = StoreChoice(nodes)
    assert choice.first == 0  # none is in use
    choice.own = HashStore()
    choice.own.set("torch.rendezvous.job", "")
    choice.failed[0] = time.monotonic()
    assert choice.after(0) == 2  # the others have left host 0 for that of this node: host 1 is down for them
    opened[1].set("torch.rendezvous.job", "")
    assert choice.after(2) == 2 and choice.after(2) == 1
    assert choice.after(1) == 1 and choice.after(1) is None  # none is left


def test_a_store_that_accepts_connections_and_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(rendezvous, "PROBE", timedelta(seconds=0.5))
    monkeypatch.setattr(rendezvous, "REPLY", timedelta(seconds=0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel of a stopped process accepts
        nodes = Nodes(1, 2, ("127.0.0.1",) * 2, silent.getsockname()[1], 1, "127.0.0.1", "job", 5.0)
        start = time.monotonic()
        assert StoreChoice(nodes).first == 0 and time.monotonic() - start < 5
        timeouts = rendezvous.Timeouts(join=timedelta(seconds=1))
        with pytest.raises(RendezvousConnectionError, match="no answer within"):
            rendezvous.join(nodes, 0, b"k" * 32, timeouts, None)
    assert time.monotonic() - start < 20


def test_a_store_whose_port_is_closed_is_not_tried_again(stores):
    opened, nodes = stores
    del opened[0]
    assert StoreChoice(nodes).after(0) == 1
