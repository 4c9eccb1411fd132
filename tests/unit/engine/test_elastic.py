"""Without processes: which ranks a batch allows, who keeps whose copy, whose folders are stale, which states are read."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import time

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousStateError

from megastar.config.load import as_run_config, resolve_batch
from megastar.engine.elastic import node_memory as memory
from megastar.engine.elastic.batch import fit_batch, usable_ranks
from megastar.engine.elastic.memory_checkpoint import files_of, inventory, peers_of
from megastar.engine.elastic.rendezvous import KEY_FILE, SignedBackend, run_key
from megastar.errors import UserError
from megastar.utils.files import sha256


def config(batch: int, micro: int = 0, tensor: int = 1, guided: bool = False):
    return as_run_config(
        {
            "data": {"shards": "x"},
            "train": {"global_batch": batch, "micro_batch": micro},
            "parallel": {"tensor_parallel": tensor},
            "self_guided": {"enabled": guided},
        }
    )


@pytest.mark.parametrize(
    ("batch", "tensor", "ranks", "usable"),
    [(256, 1, 24, 16), (256, 2, 7, 4), (12, 1, 3, 3), (8, 4, 3, 0), (7, 1, 6, 1)],
)
def test_the_most_ranks_that_divide_the_batch_are_used(batch, tensor, ranks, usable):
    assert usable_ranks(batch, tensor, ranks) == usable


@pytest.mark.parametrize(
    ("micro", "guided", "ranks", "fit"),
    [
        (0, False, 32, (32, 8)),  # 256 images: as planned
        (0, False, 24, (16, 8)),  # no larger than planned: two passes
        (6, False, 24, (16, 4)),  # does not divide 16 images
        (0, True, 24, (16, 0)),  # contrastive: one pass
        (4, True, 24, (16, 4)),
        (0, False, 40, (32, 8)),  # spare ranks
    ],
)
def test_fewer_ranks_accumulate_more(micro, guided, ranks, fit):
    cfg = config(256, micro if micro != 6 else 4, guided=guided)
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
