"""What spoils steps of a run, and what the run makes of it: skipped, gone back, stopped with a diagnosis; and killed
in the middle of that."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megastar.data.order import sample_ids
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import read_events
from megastar.run_dir.jsonl import read_jsonl
from tests import forker
from tests.checkpoints import full_weights
from tests.integration.conftest import environment
from tests.integration.test_train import rows

pytestmark = [pytest.mark.dist, pytest.mark.long]
FAULTS = [f"faults.{k}={v}" for k, v in (("spike_window", 8), ("max_skips", 2), ("max_rollbacks", 1))]
# A skip, a spike, then three bad batches that send it back to step 20: it goes on at batch 23. It is asked to stop while it
# goes back, and started again.
MENDED = {"nan": {"5": 1, "20": -1, "21": -1, "22": -1}, "spike": [11]}
# Back once, from step 12 to step 8; killed at batch 15, and once more bad batches behind the next checkpoint.
LOST = {"nan": {"10": 1, "11": 1, "12": 1, "19": 1, "20": 1, "22": 1}}


def inject(*runs: tuple[dict, list], check: bool = True) -> subprocess.CompletedProcess:
    """Train on two ranks, each run with faults of its own; one after the other in the same processes."""
    words: list = []
    for faults, arguments in runs:
        words += [*(["--"] if words else []), json.dumps(faults), "train", *map(str, arguments)]
    done = forker.run(["tests/integration/helpers/inject.py", *words], environment(), 2)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> tuple[Path, Path, str]:
    """The folders of the two runs above, neither of them killed, and what the second said at its end."""
    folder = tmp_path_factory.mktemp("faults")
    mended = world.write_config(folder / "mended.yaml", folder / "mended", steps=28)
    lost = world.write_config(folder / "lost.yaml", folder / "lost", steps=28)
    corrupt = world.write_config(folder / "corrupt.yaml", folder / "corrupt", steps=12)
    done = inject(
        (MENDED | {"signal": 22}, [mended, *FAULTS, "faults.checksum_every=3"]),
        (MENDED, [mended, *FAULTS, "faults.checksum_every=3"]),
        ({"corrupt": 8}, [corrupt, "faults.checksum_every=3"]),
        (LOST, [lost, *FAULTS]),
        check=False,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    return folder / "mended", folder / "lost", done.stderr


def test_bad_batches_are_skipped_and_named(runs, world):
    run, *_ = runs
    found = rows(run)
    assert sorted(found) == list(range(1, 29))
    marked = {step for step, row in found.items() if row.get("skipped")}
    assert marked == {6, 12}  # those of the way that was left are cut
    assert all("loss" not in found[s] for s in marked) and all("loss" in found[s] for s in found if s not in marked)
    skips = read_jsonl(run / "skipped.jsonl")
    assert [s["step"] for s in skips] == [s["position"] for s in skips] == [5, 11, 20, 21, 22]
    assert [s["why"].split()[-1] for s in skips[:1] + skips[2:]] == ["finite"] * 4
    assert skips[0]["suspects"][0]["rank"] == 1 and skips[2]["suspects"] == []
    spike = skips[1]
    assert " sigma above " in spike["why"] and spike["loss"] > 5 * spike["mean"] and spike["sigma"] > 0
    from megastar.data.order import OrderSpec
    from megastar.data.shards.manifest import load_manifest

    manifest = load_manifest(world.codes("train"))
    order = OrderSpec(0, manifest.shard_sizes, 2)
    for skip in skips:
        assert sorted(skip["ids"]) == sorted(sample_ids(order, skip["position"] * 8, 8)[0].tolist())
        assert set(skip["shards"]) <= {s.name for s in manifest.shards}


def test_it_goes_back_to_a_good_checkpoint_and_passes_over_the_data(runs):
    run, *_ = runs
    kinds = [e["event"] for e in read_events(run) if e["event"] != "saved"]
    assert kinds == ["started", *["skipped"] * 5, "rolled_back", "signal", "resumed", "finished"]
    (stop,) = (e for e in read_events(run) if e["event"] == "signal")
    assert stop["step"] in (20, 21) and "saved" in stop["text"]  # at once where its next batch is not there yet
    (back,) = read_jsonl(run / "rollbacks.jsonl")
    assert (back["step"], back["to"], back["position"], back["skipped"]) == (22, "step-00000020", 23, [20, 21, 22])


def test_a_flipped_bit_ends_the_run_and_is_named(runs):
    run = runs[0].parent / "corrupt"
    assert sorted(rows(run)) == list(range(1, 9))  # it was found at once: step 8 was due
    end = read_events(run)[-1]
    assert end["event"] == "error" and end["text"].startswith("CorruptReplica: step 8: transformer.norm.weight must be")
    assert "rank 0 (" in end["text"] and "rank 1 (" in end["text"] and "no majority" in end["text"]
    assert checkpoint_dir.latest(run / "checkpoints").name == "step-00000008" and not (run / "lost.jsonl").exists()


def test_when_nothing_helps_it_stops_and_says_why(runs):
    _, run, said = runs
    assert sorted(rows(run)) == list(range(1, 18))
    skips = read_jsonl(run / "skipped.jsonl")
    (back,) = read_jsonl(run / "rollbacks.jsonl")
    assert (back["step"], back["to"], back["position"]) == (12, "step-00000008", 13)
    assert [s["position"] for s in skips] == [10, 11, 12, 19, 20, 22]
    assert [s["step"] for s in skips] == [10, 11, 12, 14, 15, 17]
    (sentence,) = {line for line in said.splitlines() if line.startswith("megastar: error: ")}  # the same on each rank
    for part in (
        "step 17: 3 steps were skipped within 8", "after 1 rollbacks (faults.max_rollbacks 1)", "step 14: the loss is not",
        "before, the loss was ", "came from rank 1 (", "megastar doctor", str(run / "skipped.jsonl"),
        "step-00000012 is the last good checkpoint",
    ):  # fmt: skip
        assert part in sentence, (part, sentence)
    end = read_events(run)[-1]
    assert end["event"] == "error" and end["text"].startswith("NonFiniteLoss: step 17: ")


def test_killed_behind_a_roll_back_it_comes_to_the_same_end(runs, world, tmp_path):
    _, straight, said = runs
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=28)
    killed = inject((LOST | {"kill": 15}, [config, *FAULTS]), check=False)
    assert killed.returncode != 0
    newest = checkpoint_dir.latest(tmp_path / "run/checkpoints")
    assert newest.name == "step-00000008" and len(read_jsonl(tmp_path / "run/rollbacks.jsonl")) == 1
    again = inject((LOST, [config, *FAULTS]), check=False)
    assert "resumed" in again.stdout and "at step 8" in again.stdout
    assert rows(tmp_path / "run") == rows(straight)
    sentences = [[x for x in text.splitlines() if "megastar: error: " in x][0] for text in (said, again.stderr)]
    assert sentences[0].split("; ")[:2] == sentences[1].split("; ")[:2]
    for kind in ("student", "ema"):
        a, b = (full_weights(r / "checkpoints/step-00000012", kind) for r in (straight, tmp_path / "run"))
        assert all(torch.equal(a[k], b[k]) for k in a)
