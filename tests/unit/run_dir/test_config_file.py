"""Which fields may change on resume, and how a change is described; a folder that is gone."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from megastar.config.load import flatten, load_config
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir import folder_guard
from megastar.run_dir.config_file import changes_since, check_same_init, may_change
from megastar.run_dir.folder_guard import FolderGuard
from megastar.utils.files import sha256

ROOT = Path(__file__).parents[3]


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["data.shards=x", "train.steps=5", *overrides])


def test_the_table_of_the_documentation_is_that_of_the_code():
    table = (ROOT / "docs/run_folder.md").read_text().partition("| may change on resume")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    patterns = [name.replace("*", "") for row in rows for name in re.findall(r"`([^`]*)`", row)]
    for name in flatten(asdict(RunConfig())):
        listed = any(name == p or (p[-1] in "._" and name.startswith(p)) for p in patterns)
        assert listed == may_change(name), name


def test_changes_are_described_one_per_field(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").symlink_to(tmp_path)
    old = asdict(config("run=a", "optim.lr=1.5e-3"))
    del old["faults"]["save_patience"]  # of an older version
    new = config(f"run={tmp_path}/there/a/", "optim.lr=1e-3", "data.val_shards=y", "faults.save_patience=5")
    assert changes_since(old, new) == ['data.val_shards "" -> y', "optim.lr 0.0015 -> 0.001"]
    assert changes_since(old, config("run=b", "optim.lr=1.5e-3")) == ["run a -> b"]
    assert changes_since(None, new) == []


def test_initial_weights_are_identified_by_their_hash(tmp_path):
    old, moved, other = tmp_path / "old", tmp_path / "moved", tmp_path / "other"
    moved.write_bytes(b"weights")
    other.write_bytes(b"others")
    recorded = {"sha256": sha256(moved)}
    for init, before in ((str(moved), str(old)), ("", ""), (str(old), str(old))):
        check_same_init(init, recorded, before, tmp_path)
    for init, before, record in (
        (str(other), str(old), recorded),
        ("", str(old), recorded),
        (str(moved), str(old), None),
    ):
        with pytest.raises(UserError, match=f"train.init = '{init}': .* started from '{old}', which cannot change"):
            check_same_init(init, record, before, tmp_path)


def test_a_folder_that_is_gone_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_guard, "CHECK_EVERY", 0.0)
    run = tmp_path / "run"
    run.mkdir()
    guard = FolderGuard(run)
    monkeypatch.chdir(run)  # another working directory changes nothing
    assert guard.gone() == ""
    guard.check()
    run.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{run} was removed or moved while the run writes into it"):
        guard.check()
    guard.close()
    run.mkdir()
    guard = FolderGuard(run)
    os.rmdir(run)
    run.mkdir()  # may get the inode of the former folder where nothing holds that one
    assert guard.gone() == "was replaced"
    guard.close()
