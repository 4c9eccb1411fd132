"""Trackers behind their threads: order, failures, hangs, bounded waiting; none may stop or slow a run."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megastar.config.load import load_config
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.metrics.trackers import sinks, thread
from megastar.engine.metrics.trackers.packages import MODULES, check_installed
from megastar.engine.metrics.trackers.thread import TrackerThread
from megastar.engine.metrics.trackers.tracker import TrackedRun, Tracker, as_text, numbers, public_config
from megastar.errors import UserError
from megastar.run_dir.events import read_events
from megastar.run_dir.jsonl import read_jsonl


class Recorder(Tracker):
    """Keeps what it is told. ``fails``: the call that raises; ``gate``: calls wait for it."""

    def __init__(self, fails: str = "", error: BaseException | None = None, gate: threading.Event | None = None):
        self.told: list[tuple[Any, ...]] = []
        self.fails, self.error, self.gate = fails, error or ValueError("no\nroute"), gate
        self.called = threading.Event()

    def _call(self, *words: Any) -> None:
        self.called.set()
        if self.gate is not None:
            self.gate.wait(60)
        if words[0] == self.fails:
            raise self.error
        self.told.append(words)

    def start(self, run: TrackedRun) -> None:
        self._call("start", run.start, dict(run.config))

    def row(self, step: int, values: Any) -> None:
        self._call("row", step, dict(values))

    def event(self, step: int, kind: str, text: str) -> None:
        self._call("event", step, kind, text)

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        self._call("image", step, name, path, caption)

    def finish(self, complete: bool) -> None:
        self._call("finish", complete)


def close(sink: TrackerThread, seconds: float = 10.0) -> str:
    sink.begin_close(True)
    return sink.wait_closed(time.monotonic() + seconds)


def test_a_tracker_is_told_everything_in_order(tmp_path):
    made = Recorder()
    sink = TrackerThread("x", made, TrackedRun(tmp_path, 3, {"optim.lr": 0.1}))
    for step in range(4, 8):
        sink.send("row", step, {"loss": step / 3})
    sink.send("event", 7, "saved", "saved here")
    assert close(sink) == ""
    rows = [("row", step, {"loss": step / 3}) for step in range(4, 8)]
    end = [("event", 7, "saved", "saved here"), ("finish", True)]
    assert made.told == [("start", 3, {"optim.lr": 0.1}), *rows, *end]


@pytest.mark.parametrize("fails", ["start", "row", "finish"])
@pytest.mark.parametrize("error", [ValueError("no\nroute"), SystemExit(3), KeyboardInterrupt()])
def test_a_failure_is_reported_once_and_ends_it(tmp_path, fails, error):
    made = Recorder(fails, error)
    sink = TrackerThread("x", made, TrackedRun(tmp_path))
    for step in range(5):
        sink.send("row", step, {})
    problem = close(sink)
    assert problem.startswith("x receives nothing more until the next start (") and "metrics.jsonl" in problem
    assert "\n" not in problem and ("no route" in problem) == isinstance(error, ValueError)
    sink.send("row", 9, {})
    assert sink.take_problem() == "" and fails not in [told[0] for told in made.told]


def test_a_hang_is_reported_once_blocks_nothing_and_drops_what_is_too_much(tmp_path):
    gate = threading.Event()
    made = Recorder(gate=gate)
    sink = TrackerThread("x", made, TrackedRun(tmp_path))
    sink.send("row", 0, {})
    assert made.called.wait(60) and sink.take_problem() == ""
    sink._since -= thread.HANGS + 1
    assert "x has not responded" in sink.take_problem() and sink.take_problem() == ""
    for step in range(1, 3000):
        sink.send("row", step, {})
    problem = close(sink, 0.5)
    assert made.told == []  # neither the rows nor the end have waited for the first call
    assert "x did not finish in time: " in problem and int(problem.split(": ")[1].split()[0]) > 2900
    gate.set()


def test_a_tracker_that_is_slow_for_a_while_loses_nothing(tmp_path):
    gate = threading.Event()
    made = Recorder(gate=gate)
    sink = TrackerThread("x", made, TrackedRun(tmp_path))
    for step in range(500):
        sink.send("row", step, {})
    assert sink.take_problem() == ""
    gate.set()
    assert close(sink) == "" and [told[1] for told in made.told if told[0] == "row"] == list(range(500))


def test_the_run_goes_on_with_its_files(tmp_path, monkeypatch, caplog):
    made = {"wandb": Recorder("row"), "mlflow": Recorder()}
    monkeypatch.setattr(sinks, "make_tracker", made.__getitem__)
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "megastar"):
        metrics = MetricsLogger(run, 0, 4, 1, True, trackers=["tensorboard", "wandb", "mlflow"], config={"a.b": "c"})
        Image.new("RGB", (8, 8), "red").save(run / "grid.png")
        metrics.event("started", "begun with s3://user:secret@bucket/x")
        for step in range(1, 4):
            metrics.step(step, 8, {"loss": 1 / step, "kernel": "sdpa", "bad": float("nan")})
            time.sleep(0.05)
        metrics.image("samples", run / "grid.png", "four")
        metrics.rewind(2, run / "checkpoints/step-2")
        for step in range(3, 5):
            metrics.step(step, 8, {"loss": 1 / step})
        metrics.close()
    assert [r["step"] for r in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]
    warned = [e for e in read_events(run) if e["event"] == "warning"]
    assert len(warned) == 1 and warned[0]["text"].startswith("wandb receives nothing more")
    told = made["mlflow"].told
    assert told[0] == ("start", 0, {"a.b": "c"}) and told[-1] == ("finish", True)
    rows = {t[1]: t[2] for t in told if t[0] == "row"}
    assert {step: values["loss"] for step, values in rows.items()} == {s: 1 / s for s in range(1, 5)}
    assert "kernel" not in rows[1] and rows[1]["bad"] != rows[1]["bad"]
    assert ("image", 3, "samples", run / "grid.png", "four") in told
    assert ("event", 0, "started", "begun with s3://***@bucket/x") in told
    assert len(list((run / "tensorboard").iterdir())) == 2  # one for each rewind


def test_tensorboard_has_events_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsLogger(tmp_path, 0, 1, 1, True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "grid.png")
    metrics.event("started", "begun")
    metrics.step(1, 8, {"loss": 2.5})
    metrics.image("samples", tmp_path / "grid.png", "")
    metrics.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [s.value for s in found.Scalars("loss")] == [2.5]
    assert [i.width for i in found.Images("samples")] == [8]
    assert found.Tensors("events/started/text_summary")[0].tensor_proto.string_val[0] == b"begun"


def test_none_are_needed(tmp_path):
    metrics = MetricsLogger(tmp_path, 0, 1, 1, True, trackers=[])
    metrics.step(1, 8, {"loss": 2.5})
    metrics.event("finished", "done")
    metrics.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_identity_is_kept_in_the_run_folder(tmp_path):
    run = TrackedRun(tmp_path)
    first = run.identity("wandb", lambda: {"id": "a"})
    assert run.identity("mlflow", lambda: {"run_id": "b"}) == {"run_id": "b"}
    assert TrackedRun(tmp_path).identity("wandb", lambda: {"id": "other"}) == first == {"id": "a"}
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": {"id": "a"}, "mlflow": {"run_id": "b"}}
    for content in ("[1]", '{"wandb": {"id": 3}}', '{"wandb": "x"}', "{", '{"wandb": {"id": "' + "x" * 5000 + '"}}'):
        (tmp_path / "trackers.json").write_text(content)
        with pytest.raises(UserError, match="trackers.json is damaged"):
            run.identity("wandb", lambda: {"id": "c"})


def test_a_missing_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder that wandb itself leaves is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_installed(["tensorboard"], "train.trackers")
    for name, modules in MODULES.items():
        with pytest.raises(
            UserError,
            match=rf"train.trackers names {name}, whose package {modules[0]} is not installed: run pip install 'megastar\[{name}\]'",
        ):
            check_installed(["tensorboard", name], "train.trackers")
    (tmp_path / "wandb" / "__init__.py").touch()
    sys.path_importer_cache.clear()
    check_installed(["wandb"], "train.trackers")


def test_what_is_sent_has_no_secrets_and_no_texts_among_numbers(tmp_path):
    cfg = load_config("configs/run/demo.yaml", ["data.shards=s3://key:word@bucket/codes"])
    sent = public_config(cfg)
    assert sent["data.shards"] == "s3://***@bucket/codes" and sent["optim.lr"] == cfg.optim.lr
    assert sent["train.profile.steps"] == 0 and sent["train.trackers"] == ["tensorboard"]
    assert as_text(sent["train.trackers"]) == '["tensorboard"]' and as_text(None) == "null"
    assert numbers({"a": 1, "b": "x", "c": 2.5, "d": True, "e": None}) == {"a": 1, "c": 2.5}


@pytest.mark.parametrize(
    "override, text",
    [
        (
            "train.trackers=[wandb,tensorbord]",
            "train.trackers = ['wandb', 'tensorbord']: must be tensorboard, wandb, trackio or mlflow",
        ),
        ("train.trackers=[mlflow,mlflow]", "mlflow is given twice"),
        ("train.trackers=wandb", "must be a list of strings"),
    ],
)
def test_names_that_are_refused(override, text):
    with pytest.raises(UserError) as error:
        load_config("configs/run/demo.yaml", [override])
    assert text in str(error.value)
