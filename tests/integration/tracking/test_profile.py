"""train.profile on real runs: equal losses, the files of the ranks named, and what the command prints of them."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from megastar import cli
from megastar.run_dir.events import read_events
from tests.integration.conftest import megastar
from tests.integration.test_train import rows

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def profiled(world, tmp_path_factory) -> Path:
    """As ``whole``, with the steps 4 and 5 profiled on rank 1 and on rank 0."""
    folder = tmp_path_factory.mktemp("profiled")
    config = world.write_config(folder / "run.yaml", folder / "run", profile="{start: 3, steps: 2, ranks: [1, 0]}")
    megastar("train", config, ranks=2)
    return folder / "run"


def test_the_losses_are_bit_equal(profiled, whole):
    assert rows(profiled) == rows(whole)


def test_each_rank_writes_a_trace_and_its_tables(profiled):
    names = sorted(p.name for p in (profiled / "profile").iterdir())
    assert names == [f"rank{r}-steps4-5.{end}" for r in (0, 1) for end in ("json", "trace.json.gz", "txt")]
    for rank in (0, 1):
        with gzip.open(profiled / f"profile/rank{rank}-steps4-5.trace.json.gz") as f:
            events = json.load(f)["traceEvents"]
        steps = [e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep#") and e.get("ph") == "X"]
        assert len(steps) == 2
        found = json.loads((profiled / f"profile/rank{rank}-steps4-5.json").read_text())
        phases = {p["name"]: p for p in found["phases"]}
        assert {"forward", "backward", "optimizer", "teacher"} <= set(phases)
        assert phases["backward"]["calls"] == 2 and found["first"] == 4 and found["steps"] == 2
        spent = sum(p["seconds"] for p in found["phases"])
        assert 0.5 * found["seconds"] < spent <= 1.05 * found["seconds"]
        assert any(o["name"] in ("aten::mm", "aten::addmm") for o in found["operators"]) and found["kernels"] == []
        assert found["host_syncs"] and all(s["calls"] > 0 for s in found["host_syncs"])


def test_the_command_prints_them(profiled, capsys):
    assert cli.main(["profile", str(profiled), "--rank", "1", "--top", "3"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rank 1 of 2, CPU: steps 4 to 5" in out and "rank 0 of 2" not in out
    assert "phases of a step" in out and "backward" in out and "host synchronizations" in out
    assert f"{profiled}/profile/rank1-steps4-5.trace.json.gz (open it at https://ui.perfetto.dev" in out
    table = (profiled / "profile/rank1-steps4-5.txt").read_text()
    assert table.startswith("rank 1 of 2, CPU: steps 4 to 5") and "backward" in table


def refusal(*words: object, capsys) -> str:
    capsys.readouterr()
    assert cli.main([str(w) for w in words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_is_refused(profiled, whole, world, tmp_path, capsys):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", profile="{start: 1, steps: 2, ranks: [0, 3]}")
    assert "train.profile.ranks = [0, 3]: rank 3 does not exist, this run has only rank 0" in refusal(
        "train", config, capsys=capsys
    )
    late = refusal("train", config, "train.profile={start: 11, steps: 2}", capsys=capsys)
    assert "train.profile.start = 11: the 2 profiled steps after it end beyond train.steps 12" in late
    assert not (tmp_path / "run").exists()
    assert "has no profile: run megastar train with train.profile.steps=3" in refusal("profile", whole, capsys=capsys)
    assert "is not a folder" in refusal("profile", tmp_path / "none", capsys=capsys)
    assert "has profiles of rank 0, 1: name one of these" in refusal("profile", profiled, "--rank", "7", capsys=capsys)


def test_damaged_summaries_are_refused(profiled, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(profiled / "profile", run / "profile")
    path = run / "profile/rank0-steps4-5.json"
    good = json.loads(path.read_text())
    for change in (
        {"trace": "../../etc/passwd"}, {"steps": 0}, {"seconds": -1}, {"phases": {}}, {"operators": [{"name": 3}]}, {"rank": "0"},
        {"seconds": 1e300},
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        assert "rank0-steps4-5.json is damaged" in refusal("profile", run, capsys=capsys), change
    hostile = good | {"operators": [{"name": "\x1b[31m[/red]\n x" * 50, "calls": 1, "seconds": 0.1}]}
    path.write_text(json.dumps(hostile))
    assert cli.main(["profile", str(run), "--rank", "0"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_profile_that_cannot_be_written_is_a_warning(world, whole, tmp_path):
    run = tmp_path / "run"
    config = world.write_config(tmp_path / "run.yaml", run, profile="{start: 1, steps: 1}", steps=2)
    run.mkdir()
    (run / "profile").write_text("a file in the way")
    megastar("train", config)
    warned = [e["text"] for e in read_events(run) if e["event"] == "warning"]
    assert len(warned) == 1 and "the profile of rank 0 could not be written" in warned[0], warned
    assert sorted(rows(run)) == [1, 2]
