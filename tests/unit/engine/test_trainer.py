"""What the trainer does before and after its loop, without a process group."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch

from megastar.config.schema import DataConfig, RunConfig, TrainConfig
from megastar.engine import trainer as module
from megastar.engine.context import Context
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.resume_checks import start_event
from megastar.engine.train_result import TrainResult
from megastar.engine.trainer import Trainer
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.utils.signals import StopFlag

CTX = Context(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def restored():
    """Signal handlers as before the test."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def trainer(tmp_path, **train) -> Trainer:
    """Of shards that do not exist."""
    data = DataConfig(shards=str(tmp_path / "codes"), tokenizer="")
    return Trainer(RunConfig(run=str(tmp_path / "run"), data=data, train=TrainConfig(steps=4, **train)))


def test_a_missing_init_is_reported_before_shards_are_opened(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "open_data", opened.append)
    for start in (lambda t: t.fit(), lambda t: t.dry_run()):
        with pytest.raises(UserError, match="gone.safetensors"):
            start(trainer(tmp_path, init=str(tmp_path / "gone.safetensors")))
    assert not opened


def test_a_dry_run_of_a_started_run_does_not_need_its_init(tmp_path, monkeypatch):
    described = []
    monkeypatch.setattr(module, "start", lambda cfg: CTX)
    monkeypatch.setattr(module, "build", lambda cfg, ctx: None)
    monkeypatch.setattr(module, "describe", lambda *arguments: described.append(arguments))
    monkeypatch.setattr(module, "check_start", lambda *arguments: None)
    checkpoint = tmp_path / "run" / "checkpoints" / checkpoint_dir.name_of(2)
    checkpoint.mkdir(parents=True)
    (checkpoint / checkpoint_dir.MANIFEST).write_text(json.dumps({"format": checkpoint_dir.FORMAT, "files": {}}))
    trainer(tmp_path, init=str(tmp_path / "gone.safetensors")).dry_run()
    assert len(described) == 1


def test_a_dry_run_closes_its_shards(tmp_path, monkeypatch):
    closed = []
    data = SimpleNamespace(close=lambda: closed.append(True), train=SimpleNamespace(manifest=None))
    (tmp_path / "codes").mkdir()
    for name in ("start", "build", "check_start", "describe"):
        monkeypatch.setattr(module, name, lambda *arguments: CTX)
    monkeypatch.setattr(module, "open_data", lambda cfg: data)
    trainer(tmp_path).dry_run()
    assert closed == [True]


def test_a_dry_run_ends_at_a_signal(tmp_path, monkeypatch, restored):
    handlers = []
    monkeypatch.setattr(Trainer, "dry_run", lambda self: handlers.append(signal.getsignal(signal.SIGTERM)))
    module.train(RunConfig(run=str(tmp_path), data=DataConfig(shards="codes")), dry_run=True, stop=StopFlag())
    assert handlers == [restored[signal.SIGTERM]]


def test_a_further_signal_does_not_replace_the_exit_status(tmp_path, monkeypatch, restored):
    monkeypatch.setattr(Trainer, "fit", lambda self: TrainResult(3, None, signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        module.train(RunConfig(run=str(tmp_path), data=DataConfig(shards="codes")))
    assert left.value.code == 85
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


def test_a_start_that_fails_closes_the_progress_bar(tmp_path, monkeypatch):
    closed, close = [], MetricsLogger.close
    monkeypatch.setattr(MetricsLogger, "close", lambda self: (closed.append(self), close(self)))

    starting = trainer(tmp_path)
    starting.ctx, starting.data = CTX, SimpleNamespace(train=None)
    with pytest.raises(RuntimeError, match="no device"), ExitStack() as opened:
        starting._open_metrics(opened)
        raise RuntimeError("no device")
    assert len(closed) == 1


def test_shards_without_a_tokenizer_hash_are_a_warning(tmp_path, caplog):
    cfg = trainer(tmp_path).cfg
    with caplog.at_level("WARNING"):
        kind, text = start_event(cfg, CTX, SimpleNamespace(tokenizer_sha256=""), None, 0, 8)
    assert (kind, text) == ("started", f"{cfg.run}: 8 steps on 1 rank(s)")
    assert f"{tmp_path / 'codes'} records no tokenizer hash" in caplog.text


def test_a_batch_that_never_came_is_a_warning(tmp_path, caplog):
    error = RuntimeError("the store is gone")
    starting = trainer(tmp_path)
    starting.step = starting.first = 3
    starting.fetcher = SimpleNamespace(error_of_any_rank=lambda: error, restore_rng=lambda: None)
    starting.saver = SimpleNamespace(finish=lambda: None, take_events=list)
    starting.metrics = MetricsLogger(tmp_path / "run", 3, 4, 1, True)
    with pytest.raises(RuntimeError, match="the store is gone"), caplog.at_level("WARNING"):
        starting._stop_without_data(0)
    starting.metrics.close()
    assert "no batch for step 4: no step was done since the start" in caplog.text
