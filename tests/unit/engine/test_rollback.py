"""Which checkpoint a run goes back to, and what a crash in the middle of it leaves."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.fault_tolerance import rollback
from megastar.engine.fault_tolerance.skip_policy import suspects
from megastar.engine.metrics.logger import MetricsLogger
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.layout import ROLLBACKS
from megastar.utils.files import append_line
from tests.unit.engine.test_engine import make_checkpoint

CTX = Context(0, 1, torch.device("cpu"), torch.float32)


def test_the_newest_good_checkpoint_from_before_the_first_skip(tmp_path):
    assert rollback.choose_checkpoint(tmp_path, 25) == (None, "")
    for step, skips in ((40, [38]), (30, [26]), (20, [17]), (10, [])):
        make_checkpoint(tmp_path, step, guard={"skips": skips})
    names = {first: rollback.choose_checkpoint(tmp_path, first) for first in (9, 10, 25, 50)}
    assert names[25] == (tmp_path / checkpoint_dir.name_of(10), "")  # step 20 has a skipped step behind it
    assert names[10] == names[25]  # made just before the first skipped step
    assert names[50] == (tmp_path / checkpoint_dir.name_of(10), "")
    assert names[9] == (tmp_path / checkpoint_dir.name_of(40), "which was saved after the first of them")
    checkpoint_dir.remove(tmp_path / checkpoint_dir.name_of(10))
    assert rollback.choose_checkpoint(tmp_path, 25) == (
        tmp_path / checkpoint_dir.name_of(20),
        "which has skipped steps itself",
    )


@pytest.mark.parametrize("cut", ["before the pointer", "before the removal", "after it"])
def test_a_roll_back_that_was_cut_off_is_finished(tmp_path, cut):
    cfg = RunConfig(run=str(tmp_path))
    folder = checkpoint_dir.folder_of(cfg.run)
    for step in (10, 20, 30):
        make_checkpoint(folder, step, guard={"rollbacks": 1})
    (folder / "latest").write_text(checkpoint_dir.name_of(30) + "\n")
    assert rollback.finish_rollback(tmp_path, CTX) == [] and checkpoint_dir.latest(
        folder
    ).name == checkpoint_dir.name_of(30)
    first = {"step": 5, "to": checkpoint_dir.name_of(1), "position": 6}
    append_line(tmp_path / ROLLBACKS, json.dumps(first))
    assert rollback.finish_rollback(tmp_path, CTX) == [first] and checkpoint_dir.latest(
        folder
    ).name == checkpoint_dir.name_of(30)  # known to it
    second = {"step": 32, "to": checkpoint_dir.name_of(20), "position": 33}
    append_line(tmp_path / ROLLBACKS, json.dumps(second))
    if cut == "before the removal":
        (folder / "latest").write_text(checkpoint_dir.name_of(20) + "\n")
    elif cut == "after it":
        rollback.discard_after(folder / checkpoint_dir.name_of(20))
    for _ in range(2):
        assert rollback.finish_rollback(tmp_path, CTX) == [first, second]
        assert checkpoint_dir.latest(folder).name == checkpoint_dir.name_of(20)
        assert len(checkpoint_dir.complete(folder)) == 2


def test_metrics_go_back_too(tmp_path):
    metrics = MetricsLogger(tmp_path, 0, 6, 1, True)
    for step in (1, 2, 3, 4):
        metrics.step(step, 4, {"loss": float(step)})
    metrics.rewind(2, tmp_path / "step-00000002")
    metrics.step(3, 4, {"loss": 30.0})
    metrics.saved(tmp_path / "step-00000002")  # it was on record before
    metrics.close()
    assert [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 30)]
    assert not (tmp_path / "events.jsonl").exists()


def test_rows_that_cannot_be_cut_are_a_warning(tmp_path, monkeypatch, caplog):
    metrics = MetricsLogger(tmp_path, 0, 6, 1, True)
    metrics.step(1, 4, {"loss": 1.0})

    def refuse(step):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(metrics.rows, "cut_after", refuse)
    with caplog.at_level("WARNING"):
        metrics.rewind(0, tmp_path / "step-00000000")
    metrics.close()
    assert "metrics.jsonl keeps rows of steps after 0: [Errno 30] Read-only file system" in caplog.text


def test_whose_loss_it_was():
    def rank(n: int, *broken: str) -> dict:
        return {"rank": n, "host": f"n{n}", "broken": list(broken)}

    # The contrastive loss sees every rank's features: all are spoilt by one.
    every = [rank(0, "loss_step", "loss"), rank(1, "loss_ar", "loss_step", "loss"), rank(2, "loss_step", "loss")]
    assert suspects(every) == [{"rank": 1, "host": "n1"}]
    assert suspects([rank(0, "loss_ar"), rank(1, "loss_ar")]) == []
    assert suspects([rank(0, "loss"), rank(1)]) == [{"rank": 0, "host": "n0"}]
    assert suspects([rank(0), rank(1)]) == []


def test_the_advice_fits_what_the_skipped_steps_have_in_common():
    def row(why: str, *ranks: int, hosts: int = 4) -> dict:
        return {"why": why, "suspects": [{"rank": r, "host": f"n{r // 2}"} for r in ranks], "hosts": hosts}

    def advice(*rows: dict) -> str:
        return rollback.advice(RunConfig().faults, 1e-4, list(rows))

    nan = "the loss is not finite"
    assert "from rank 2 (n1), rank 3 (n1): exclude this host" in advice(row(nan, 2), row(nan, 3))
    assert "rank 2 (n1): the GPU or its memory may be faulty" in advice(row(nan, 2, hosts=1))
    assert "from no single host: resume with a lower optim.lr (now 0.0001)" in advice(row(nan, 0), row(nan, 3))
    assert "from no single host" in advice(row(nan, 2), row(nan))
    assert "faults.spike_sigma (now 6)" in advice(row("loss 9 is 8 sigma above 7"))
