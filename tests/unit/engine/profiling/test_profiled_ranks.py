"""``train.profile.ranks`` against the ranks of a launch."""

from __future__ import annotations

import logging

import pytest

from megastar import cli
from megastar.config.load import load_config
from megastar.config.schema import ProfileConfig
from megastar.engine.profiling.settings import check_ranks
from megastar.engine.resume_checks import first_checks
from megastar.errors import UserError
from megastar.run_dir.checkpoint_dir import folder_of, name_of
from megastar.run_dir.layout import MANIFEST
from megastar.utils.process_exit import AGENT

PROFILE = ProfileConfig(start=5, steps=2, ranks=[0, 3])
MISSING = r"train.profile.ranks = \[0, 3\]: rank 3 does not exist, this run has "


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megastar"), "propagate", True)
    return caplog


def test_a_rank_that_no_start_has_is_refused_before_and_while_it_would_be_profiled(tmp_path):
    check_ranks(PROFILE, 4, tmp_path)
    check_ranks(ProfileConfig(start=5, steps=0, ranks=[3]), 1, tmp_path)
    for step in (0, 5, 6):
        if step:
            (folder_of(tmp_path) / name_of(step)).mkdir(parents=True)
            (folder_of(tmp_path) / name_of(step) / MANIFEST).touch()
        with pytest.raises(UserError, match=MISSING + "the ranks 0 to 2: name some of these"):
            check_ranks(PROFILE, 3, tmp_path)
    (folder_of(tmp_path) / name_of(7)).mkdir()
    (folder_of(tmp_path) / name_of(7) / MANIFEST).touch()
    check_ranks(PROFILE, 1, tmp_path)  # the profiled steps are done


def test_ranks_of_lost_nodes_are_left_out(tmp_path, said, monkeypatch):
    cfg = load_config(None, ["data.shards=x", f"run={tmp_path}", "train.profile={start: 5, steps: 2, ranks: [0, 3]}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=MISSING + "the ranks 0 to 1"):
        first_checks(cfg)
    monkeypatch.setenv(AGENT, "1")
    assert first_checks(cfg) is cfg
    assert said.text.count("train.profile.ranks: rank 3 is not profiled, this start has the ranks 0 to 1") == 1
    monkeypatch.setenv("RANK", "1")  # rank 0 has reported it
    assert first_checks(cfg) is cfg and said.text.count("is not profiled") == 1


def test_ranks_that_no_number_of_nodes_has_are_refused_at_the_start(tmp_path, capsys):
    words = ["elastic", "--nodes", "1:2", "--hosts", "127.0.0.1", "--index", "0", "--nproc", "2"]
    words += ["configs/run/demo.yaml", f"run={tmp_path}", "train.profile.steps=2"]
    assert cli.main([*words, "train.profile.ranks=[3, 4]"]) == 2
    assert "rank 4 does not exist, this run has the ranks 0 to 3" in capsys.readouterr().err
