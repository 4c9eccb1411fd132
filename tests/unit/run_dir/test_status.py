"""`megastar status` on run folders made by the writers of a run: metrics, events, checkpoints, configuration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from megastar import cli
from megastar.config.load import load_config, save_config
from megastar.engine.metrics.logger import MetricsLogger
from megastar.errors import UserError
from megastar.run_dir import events
from megastar.run_dir.status import status_of
from megastar.utils.clock import duration
from tests.checkpoints import write_checkpoint

STEPS = 20


@pytest.fixture
def cfg(tmp_path):
    model = "model.n_layer=1 model.n_head=2 model.dim=16 model.multiple_of=16 model.vocab_size=8 model.num_classes=5"
    words = f"{model} model.image_tokens=16 self_guided.contrastive_block=1 self_guided.projector_dim=8"
    train = f"train.steps={STEPS} train.log_every=1 train.save_every=4 train.global_batch=4"
    found = load_config(None, [f"run={tmp_path / 'run'}", "data.shards=none", *words.split(), *train.split()])
    save_config(found, tmp_path / "run" / "config.yaml")
    return found


@pytest.fixture
def run(cfg, tmp_path):
    return tmp_path / "run"


def write_rows(run, start, stop, rate=40.0, **more):
    """Steps ``start`` + 1 to ``stop`` as a loop writes them; ``rate`` images a second, of 4 a step."""
    metrics = MetricsLogger(run, start, STEPS, 1, True)
    metrics.event("resumed" if start else "started", f"at {start}", steps=STEPS)
    for step in range(start + 1, stop + 1):
        metrics.done = step
        metrics.write(step, {"loss": 5.0 - step / 10, "images_per_s": rate, "step_s": 4 / rate, **more})
    return metrics


def age(run, seconds):
    """As if nothing had been written for so long."""
    for path in (run / "metrics.jsonl", run / events.NAME):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


def test_a_running_run(run, cfg):
    metrics = write_rows(run, 0, 6, data_wait_s=0.001)
    metrics.write(6, {"val_loss_ar": 4.25})
    metrics.close()
    write_checkpoint(run, cfg, 1, 1, step=4)
    began = events.read_events(run)[0]
    s = status_of(run, now=events.seconds_of(began) + 30)
    os.utime(run / "metrics.jsonl", (events.seconds_of(began) + 20,) * 2)
    s = status_of(run, now=events.seconds_of(began) + 30)
    assert (s.state, s.step, s.steps, s.loss, s.images_per_s, s.data_wait_s) == ("running", 6, 20, 4.4, 40.0, 0.001)
    assert (s.val_loss, s.val_step, s.checkpoint_step, s.checkpoint) == (4.25, 6, 4, "step-00000004")
    assert s.left_s == pytest.approx(14 * 0.1) and s.last_sign_s == pytest.approx(10, abs=1)
    assert s.health == [] and s.restarts == [] and not s.checkpoint_problem and not s.saving


def test_a_start_may_take_longer_than_a_step(run):
    write_rows(run, 0, 0).close()
    s = status_of(run)
    assert (s.state, s.step, s.loss, s.checkpoint) == ("starting", 0, None, "")
    age(run, 300)
    assert status_of(run).state == "starting"
    age(run, 1000)
    assert status_of(run).state == "stopped"


def test_a_silent_run_was_killed_or_hangs(run):
    write_rows(run, 0, 6).close()
    path = run / events.NAME
    began = json.loads(path.read_text()) | {"time": "2020-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(began) + "\n")
    age(run, 100)
    assert status_of(run).state == "running"
    age(run, 125)
    s = status_of(run)
    assert s.state == "stopped" and s.left_s is None
    assert s.why == "no sign for 2 min 5 s, a row is due every 0.1 s: it was killed, or it hangs"


def test_slow_steps_may_take_longer(run):
    write_rows(run, 0, 6, rate=0.04).close()  # 100 s a step
    (run / events.NAME).unlink()
    age(run, 450)
    assert status_of(run).state == "running"
    age(run, 550)
    assert status_of(run).state == "stopped"


def test_restarts_and_their_reasons(run):
    first = write_rows(run, 0, 5)
    first.event("signal", "signal 10: saved step-00000005; the same command resumes")
    first.close()
    s = status_of(run)
    assert (s.state, s.why) == ("stopped", "signal 10: saved step-00000005; the same command resumes")
    write_rows(run, 5, 9).close()  # killed
    third = write_rows(run, 8, 9)
    third.event("error", "UserError: the disk is full", note=False)
    third.close()
    write_rows(run, 8, 10).close()
    s = status_of(run)
    assert [line.partition(": ")[2] for line in s.restarts] == [
        "signal 10: saved step-00000005; the same command resumes",
        "no end was recorded (killed)",
        "UserError: the disk is full",
    ]
    assert " at step 5 on " in s.restarts[0] and s.step == 10
    assert not [h for h in s.health if "starts" in h]
    write_rows(run, 8, 8).close()
    assert status_of(run).health[-1].startswith("the last 3 starts were all at step 8: it fails before it saves")


def test_a_finished_run(run, cfg):
    metrics = write_rows(run, 0, STEPS)
    write_checkpoint(run, cfg, 1, 1, step=STEPS)
    metrics.saved(run / "checkpoints" / "step-00000020")
    metrics.saved(run / "checkpoints" / "step-00000020")
    metrics.event("finished", "20 steps are done", note=False)
    metrics.close()
    age(run, 10**6)
    s = status_of(run)
    assert (s.state, s.step, s.left_s, s.health) == ("finished", 20, None, [])
    assert [e["event"] for e in events.read_events(run)] == ["started", "saved", "finished"]


def test_problems_are_reported(run, cfg):
    metrics = write_rows(run, 0, 8)
    metrics.write(9, {"loss": float("nan"), "grad_norm": 1.0, "images_per_s": 20.0, "step_s": 0.2, "data_wait_s": 0.1})
    metrics.close()
    s = status_of(run)
    assert [h.split(":")[0] for h in s.health] == [
        "loss is nan at step 9",
        "50% of a step is spent on waiting for data",
        "throughput fell to 20 images/s at step 9, its median was 40",
        "9 steps are unsaved, a save is due every 4",
    ]
    folder = write_checkpoint(run, cfg, 1, 1, step=8)
    state = folder / "state-00000.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    s = status_of(run)
    assert "state-00000.safetensors is damaged: it has" in s.checkpoint_problem and "is damaged" in s.health[-1]


def test_a_half_written_checkpoint_does_not_count(run, cfg):
    write_rows(run, 0, 6).close()
    folder = write_checkpoint(run, cfg, 1, 1, step=4)
    shutil.copytree(folder, folder.parent / ".writing" / "token" / "step-00000006")
    s = status_of(run)
    assert (s.checkpoint_step, s.saving) == (4, True)


def test_an_upload_that_failed_is_shown_until_a_later_save(run, cfg):
    cfg.train.upload = "s3://bucket/runs"
    save_config(cfg, run / "config.yaml")
    metrics = write_rows(run, 0, 4)
    metrics.event(
        "warning", "step-00000004 was not uploaded to s3://bucket/runs (no route); it is whole in x", situation="upload"
    )
    assert "was not uploaded" in status_of(run).upload
    metrics.done = 8
    metrics.saved(run / "step-00000008")
    assert status_of(run).upload == "to s3://bucket/runs; no failure recorded"
    metrics.close()


def test_a_situation_is_shown_until_it_is_over(run, cfg):
    metrics = write_rows(run, 0, 3)

    def shown() -> list[str]:
        return [line for line in status_of(run).health if line.startswith("since step 3: ")]

    metrics.event("slow", "b computes slowly", situation="slow b")
    metrics.event("warning", "the disk is full", situation="disk")
    metrics.event("warning", "the disk is fuller", situation="disk")
    assert shown() == ["since step 3: b computes slowly", "since step 3: the disk is fuller"]
    metrics.event("slow", "b is fast", situation="slow b", over=True)
    assert shown() == ["since step 3: the disk is fuller"]
    metrics.event("resumed", "again", steps=20, ranks=2)  # what still lasts is reported again
    assert shown() == []
    metrics.close()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, "is not a folder: name a run folder"),
        (lambda run: (run / "config.yaml").unlink(), "is not a run folder: it contains no config.yaml"),
        (lambda run: (run / "config.yaml").write_text("model: {n_layer: 1"), "cannot be used ("),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), "cannot be used ("),
        (lambda run: (run / "config.yaml").write_text("train: {stepps: 5}"), "cannot be used ("),
    ],
)
def test_a_folder_that_is_not_a_run_folder_is_one_sentence(run, damage, sentence, capsys):
    damage(run)
    with pytest.raises(UserError) as error:
        status_of(run)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert cli.main(["status", str(run)]) == 2
    assert capsys.readouterr().err.count("megastar: error: ") == 1


@pytest.mark.parametrize(
    "junk",
    [
        "",
        '{"step": 3, "lo',
        "\x00" * 100,
        "[1, 2]\n3\nnull\n",
        '{"step": "x"}\n{"loss": 1}\n',
        '{"event": 3, "time": 4}',
    ],
)
def test_junk_in_the_files_is_skipped(run, cfg, junk):
    """A crash or a full disk may leave anything at the end of a file, and in a manifest."""
    write_rows(run, 0, 3).close()
    folder = write_checkpoint(run, cfg, 1, 1, step=3)
    for name in ("metrics.jsonl", events.NAME):
        with (run / name).open("a") as f:
            f.write(junk)
    (folder / "megastar.json").write_text(junk)
    (folder.parent / "latest").write_text(junk.replace("\x00", ""))
    s = status_of(run)
    assert (s.step, s.loss) == (3, 4.7) and s.checkpoint_problem
    events.append_event(run, "warning", 3, "the next event is whole")
    assert events.read_events(run)[-1]["text"] == "the next event is whole"


def test_events_record_time_host_and_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "417")
    before = time.time()
    events.append_event(tmp_path, "started", 0, "a\nb", steps=3)
    (event,) = events.read_events(tmp_path)
    assert before - 1 <= events.seconds_of(event) <= time.time()
    del event["time"], event["host"]
    assert event == {"job": "417", "event": "started", "step": 0, "text": "a\nb", "steps": 3}
    assert len((tmp_path / events.NAME).read_text().splitlines()) == 1
    events.append_event(tmp_path / "gone", "started", 0, "a missing disk does not stop a run")


def test_only_the_main_rank_writes_events(tmp_path):
    metrics = MetricsLogger(tmp_path / "run", 0, 5, 1, False)
    metrics.event("started", "here")
    metrics.saved(tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_command(run, cfg, tmp_path, capsys):
    write_rows(run, 0, 6).close()
    write_checkpoint(run, cfg, 1, 1, step=4)
    capsys.readouterr()
    assert cli.main(["status", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["step"], shown["steps"], shown["checkpoint_step"], shown["health"]) == (6, 20, 4, [])
    assert cli.main(["status", str(run), str(tmp_path / "none")]) == 2  # the others are shown all the same
    out, err = capsys.readouterr()
    assert "6 of 20, 30.0%" in out and "no problems found" in out and "complete" in out
    assert (
        err
        == f"megastar: error: {tmp_path / 'none'} is not a folder: name a run folder, the `run` of its configuration\n"
    )
    assert cli.main(["status", str(run), "--watch", "x"]) == 2
    assert "'x' is not a number from 0.1 to 86400" in capsys.readouterr().err


def test_watching_ends_with_the_run(run, cfg, capsys):
    write_rows(run, 0, STEPS).close()
    write_checkpoint(run, cfg, 1, 1, step=STEPS)
    capsys.readouterr()
    assert cli.main(["status", str(run), "--watch", "0.1"]) == 0
    assert "finished: all 20 steps are done and saved" in capsys.readouterr().out
    assert cli.main(["status", str(run), "--watch", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.05, "0.05 s"), (59.6, "1 min"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (86400 * 3 + 60, "3 d"), (0, "0 s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_excluded_hosts_are_those_of_the_last_requeue_that_nobody_readmitted(run, cfg, capsys):
    write_rows(run, 0, 2).close()
    assert status_of(run).excluded == []
    now, end = "2026-01-31 12:00:00", "ended by a crash (status 137), host n2"
    (run / "bad_hosts.log").write_text(f"{now} n2 job 4 start 1: Killed (task 3)\n" * 2)
    (run / "requeues.log").write_text(f"{now} job 4 start 1 on n[1-2] {end}, checkpoint none\n")
    assert status_of(run).excluded == []
    (run / "requeues.log").write_text(f"{now} job 4 start 2 on n[1-2] {end}, excluding n7 n2, checkpoint none\n")
    assert status_of(run).excluded == ["n2"]
    assert cli.main(["status", str(run)]) == 0 and "n2: see bad_hosts.log" in capsys.readouterr().out
    (run / "bad_hosts.log").unlink()
    assert status_of(run).excluded == []


def test_the_command_imports_neither_torch_nor_numpy(run, cfg):
    write_rows(run, 0, 6).close()
    write_checkpoint(run, cfg, 1, 1, step=4)
    code = (
        "import sys\nfrom megastar import cli\n"
        f"assert cli.main(['status', {str(run)!r}]) == 0\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
