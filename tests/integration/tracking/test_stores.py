"""Runs with real trackers and their local stores: `make test-trackers` installs wandb, trackio and mlflow."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megastar.run_dir.events import read_events
from tests.integration.conftest import ROOT, environment

pytestmark = pytest.mark.trackers
OURS = ("WANDB_", "TRACKIO_", "MLFLOW_")


def train(config: Path, *overrides: str, **env: str) -> subprocess.CompletedProcess:
    """In a process of its own: each library reads its variables once in a process."""
    clean = {k: v for k, v in environment().items() if not k.startswith(OURS)}
    return subprocess.run(
        [sys.executable, "-m", "megastar", "train", str(config), *overrides], cwd=ROOT, env=clean | env,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """Eight steps, a resume from step 4 that repeats four, and four more."""
    folder = tmp_path_factory.mktemp("tracked")
    run = folder / "run"
    config = world.write_config(folder / "run.yaml", run, val_every=4, trackers="[tensorboard, wandb, trackio, mlflow]")
    done = train(config, "train.steps=8")
    assert done.returncode == 0, done.stderr
    ids = (run / "trackers.json").read_bytes()
    shutil.rmtree(run / "checkpoints/step-00000008")
    (run / "checkpoints/latest").write_text("step-00000004\n")
    done = train(config, "train.steps=12")
    assert done.returncode == 0, done.stderr
    assert (run / "trackers.json").read_bytes() == ids
    assert [e["event"] for e in read_events(run) if e["event"] in ("started", "resumed", "warning")] == [
        "started",
        "resumed",
    ]
    return run


def recorded(run: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value of metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return {(r["step"], k): v for r in rows for k, v in r.items() if k != "step" and isinstance(v, (int, float))}


def same(found: dict[tuple[int, str], float], run: Path) -> None:
    wanted = recorded(run)
    assert found.keys() == wanted.keys() and {step for step, _ in wanted} == set(range(1, 13))
    assert all(found[key] == value for key, value in wanted.items())


def test_mlflow_has_the_rows_of_one_run(run):
    db = sqlite3.connect(run / "mlflow/mlflow.db")
    assert db.execute("select status, name from runs").fetchall() == [("FINISHED", "run")]
    rows = db.execute("select step, key, value from metrics order by timestamp").fetchall()
    same({(step, key): value for step, key, value in rows}, run)
    assert len({(s, k) for s, k, _ in rows if k == "loss"}) == 12 and len([1 for _, k, _ in rows if k == "loss"]) == 16
    params = dict(db.execute("select key, value from params").fetchall())
    assert params["optim.lr"] == "0.003" and params["train.steps"] == "8"
    tags = dict(db.execute("select key, value from tags").fetchall())
    assert tags["resumed_with.train.steps"] == "12" and tags["event.finished"] == "step 12: 12 steps are done"
    artifact = next((run / "mlflow/artifacts").rglob("events.jsonl"))
    assert artifact.read_bytes() in (run / "events.jsonl").read_bytes() and b'"finished"' in artifact.read_bytes()


def test_trackio_has_the_rows_of_one_run(run):
    db = sqlite3.connect(run / "trackio/megastar.db")
    found, runs = {}, set()
    for step, name, metrics in db.execute("select step, run_name, metrics from metrics order by id"):
        runs.add(name)
        found |= {(step, k): v for k, v in json.loads(metrics).items()}
    same(found, run)
    assert runs == {json.loads((run / "trackers.json").read_text())["trackio"]["name"]}
    assert len(db.execute("select distinct run_id from metrics").fetchall()) == 1
    alerts = db.execute("select title, text from alerts order by id").fetchall()
    assert [kind for kind, _ in alerts if kind != "saved"] == ["started", "finished", "resumed", "finished"]
    config = json.loads(db.execute("select config from configs").fetchall()[-1][0])
    assert config["optim.lr"] == 0.003


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    at, whole = 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or its last part
            yield whole
            whole = b""


def test_wandb_has_the_rows_of_one_run(run):
    from wandb.proto import wandb_internal_pb2

    found: dict[tuple[int, str], float] = {}
    ids, texts = set(), []
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    for folder in folders:
        for data in wandb_records(next(folder.glob("*.wandb")).read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                step = items.pop("step")
                texts += [v for k, v in items.items() if k.startswith("events/")]
                found |= {(step, k): v for k, v in items.items() if not k.startswith(("_", "events/"))}
    same(found, run)
    assert ids == {json.loads((run / "trackers.json").read_text())["wandb"]["id"]}
    assert "12 steps are done" in texts


def test_a_tokenizer_sends_its_reconstructions(world, tmp_path):
    config = tmp_path / "tokenizer.yaml"
    config.write_text(f"""
pictures: {world.pictures}
out: {tmp_path}/vq
trackers: [mlflow, trackio]
subset: train
tokenizer: {{image_size: 16, channels: 8, channel_multipliers: [1, 2], res_blocks: 1, z_channels: 8, codebook_size: 16, codebook_embed_dim: 4, norm_groups: 4}}
batch: 4
steps: 4
continuous_steps: 1
revive_every: 0
perceptual: 0
dtype: fp32
eval_every: 2
save_every: 2
log_every: 1
""")
    clean = {k: v for k, v in environment().items() if not k.startswith(OURS)}
    done = subprocess.run(
        [sys.executable, "-m", "megastar", "train-tokenizer", str(config)], cwd=ROOT, env=clean, capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grids = sorted(p.name for p in (tmp_path / "vq/samples").iterdir())
    sent = {p.name: p.read_bytes() for p in (tmp_path / "vq/mlflow/artifacts").rglob("*.png")}
    assert sorted(sent) == grids and len(grids) == 2
    assert all(data == (tmp_path / "vq/samples" / name).read_bytes() for name, data in sent.items())
    assert len(list((tmp_path / "vq/trackio/media").rglob("*.png"))) == 2


def test_a_run_sends_the_samples_of_its_evaluations(world, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=4, trackers="[mlflow, trackio, wandb]")
    done = train(config, "eval.every=2", "eval.samples=8", "eval.batch=4")
    assert done.returncode == 0, done.stderr
    grids = {p.name: p.read_bytes() for p in (tmp_path / "run/samples").iterdir()}
    assert sorted(grids) == ["eval-00000002.png", "eval-00000004.png"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "run/mlflow/artifacts").rglob("*.png")} == grids
    assert len(list((tmp_path / "run/trackio/media").rglob("*.png"))) == 2
    assert len(list((tmp_path / "run/wandb").rglob("*.png"))) == 2


def losses(run: Path) -> list[float]:
    return [value for (_, name), value in sorted(recorded(run).items()) if name == "loss"]


def test_a_server_that_hangs_neither_stops_nor_slows_a_run(run, world, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", trackers="[mlflow]")
        start = time.monotonic()
        done = train(config, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server.getsockname()[1]}")
        assert done.returncode == 0 and time.monotonic() - start < 200, done.stderr
    assert losses(tmp_path / "run") == losses(run)
    warned = [e["text"] for e in read_events(tmp_path / "run") if e["event"] == "warning"]
    assert len(warned) == 1 and "mlflow did not finish in time" in warned[0], warned


def test_a_store_that_cannot_be_written_is_one_warning(run, world, tmp_path):
    (tmp_path / "file").touch()
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=3, trackers="[mlflow]", log_every=1)
    done = train(config, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/file/none.db")
    assert done.returncode == 0, done.stderr
    warned = [e["text"] for e in read_events(tmp_path / "run") if e["event"] == "warning"]
    assert len(warned) == 1 and warned[0].startswith("mlflow receives nothing more until the next start ("), warned
    assert losses(tmp_path / "run") == losses(run)[:3] and not math.isnan(losses(tmp_path / "run")[0])
    assert not os.path.exists(ROOT / "mlruns") and not os.path.exists(ROOT / "mlflow.db")
