"""Checkpoints go to a real S3 server (SeaweedFS) and come back whole; an outage stops nothing."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import boto3
import pytest

from megastar.data.storage.s3_client import split_url
from megastar.engine.checkpointer import s3_upload
from megastar.engine.checkpointer.s3_upload import Uploader
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.status import status_of
from tests.dist.test_checkpoint import write
from tests.integration.conftest import megastar
from tests.integration.helpers.s3 import client_of, free_port


@pytest.mark.dist
def test_a_checkpoint_comes_back_whole(s3, use_s3, tmp_path):
    use_s3(s3)
    write(tmp_path, 2, 2)
    checkpoint = checkpoint_dir.latest(tmp_path)
    uploader = Uploader("s3://runs/a/run")
    uploader.put(checkpoint)
    assert uploader.finish() == "" and uploader.uploaded == [checkpoint.name]
    client, back = client_of(s3), tmp_path / "back" / checkpoint.name
    back.mkdir(parents=True)
    for entry in client.list_objects_v2(Bucket="runs", Prefix=f"a/run/{checkpoint.name}/")["Contents"]:
        client.download_file("runs", entry["Key"], str(back / Path(entry["Key"]).name))
    assert client.get_object(Bucket="runs", Key="a/run/latest")["Body"].read().decode().strip() == checkpoint.name
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in checkpoint.iterdir())
    checkpoint_dir.verify(back)


@pytest.mark.dist
def test_an_outage_is_told_and_the_next_upload_goes_through(s3, use_s3, tmp_path):
    write(tmp_path, 1, 1)
    checkpoint = checkpoint_dir.latest(tmp_path)
    other = checkpoint.with_name(checkpoint_dir.name_of(9))
    shutil.copytree(checkpoint, other)
    uploader = Uploader("s3://runs/b")
    use_s3(f"http://127.0.0.1:{free_port()}")  # nobody listens there
    uploader.put(checkpoint)
    problem = uploader.finish()
    assert (
        f"{checkpoint.name} was not uploaded to s3://runs/b" in problem and f"it is complete in {checkpoint}" in problem
    )
    use_s3(s3)
    uploader.put(other)
    assert uploader.finish() == "" and uploader.uploaded == [other.name]


@pytest.mark.dist
def test_after_a_roll_back_the_older_checkpoint_is_the_newest_there(s3, use_s3, tmp_path):
    use_s3(s3)
    write(tmp_path, 1, 1)
    checkpoint = checkpoint_dir.latest(tmp_path)
    later = checkpoint.with_name(checkpoint_dir.name_of(9))
    shutil.copytree(checkpoint, later)
    uploader = Uploader("s3://runs/back")
    for path in (checkpoint, later, checkpoint):
        uploader.put(path)
        assert uploader.finish() == ""
        assert client_of(s3).get_object(Bucket="runs", Key="back/latest")["Body"].read().decode().strip() == path.name


@pytest.mark.dist
def test_an_outage_is_sat_out(s3, use_s3, tmp_path, monkeypatch):
    """While the run goes on, and at its end."""
    monkeypatch.setattr(s3_upload, "RETRY_FIRST", 0.2)
    write(tmp_path, 1, 1)
    checkpoint = checkpoint_dir.latest(tmp_path)
    for at_the_end in (False, True):
        uploader = Uploader("s3://runs/d", patience=60)
        use_s3(f"http://127.0.0.1:{free_port()}")
        uploader.put(checkpoint)
        until = time.monotonic() + 60
        while not uploader.problem and time.monotonic() < until:
            time.sleep(0.05)
        ((text, more),) = uploader.take_events()
        assert "was not uploaded to s3://runs/d" in text and more == {"situation": "upload"}
        if at_the_end:
            threading.Timer(0.5, lambda: use_s3(s3)).start()
        else:
            use_s3(s3)
            while not uploader.uploaded and time.monotonic() < until:
                time.sleep(0.05)
        assert uploader.finish() == "" and uploader.uploaded == [checkpoint.name]
        ((text, more),) = uploader.take_events()
        assert "was uploaded to s3://runs/d after retries" in text and more["over"]
    # Nothing helps against wrong credentials: no minute is spent on them.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # which keeps those it found first
    uploader, began = Uploader("s3://runs/d", patience=600), time.monotonic()
    uploader.put(checkpoint)
    assert "was not uploaded" in uploader.finish() and time.monotonic() - began < 300


def test_urls():
    assert split_url("s3://bucket/a/b/") == ("bucket", "a/b") and split_url("s3://bucket") == ("bucket", "")
    for wrong in ("bucket/a", "s3:///a", "https://bucket/a"):
        with pytest.raises(UserError, match="must have the form s3://bucket/prefix"):
            split_url(wrong)


@pytest.mark.dist
def test_repeating_the_command_of_a_finished_run_makes_up_for_a_failed_upload(s3, use_s3, world, tmp_path):
    run, client = tmp_path / "run", client_of(s3)
    words = ("train.upload=s3://runs/again", "data.patience=1")
    config = world.write_config(tmp_path / "run.yaml", run, steps=4)
    use_s3(f"http://127.0.0.1:{free_port()}")
    first = megastar("train", config, *words)
    assert "was not uploaded to s3://runs/again" in first.stdout
    assert "run the same command again to upload the rest" in first.stdout and "was not uploaded" in status_of(run).why
    use_s3(s3)
    second = megastar("train", config, *words, ranks=2)
    assert (
        "step-00000004 was uploaded to s3://runs/again: " in second.stdout and "not uploaded" not in status_of(run).why
    )
    assert client.get_object(Bucket="runs", Key="again/latest")["Body"].read() == b"step-00000004\n"
    keys = {e["Key"] for e in client.list_objects_v2(Bucket="runs", Prefix="again/step-00000004/")["Contents"]}
    assert keys == {f"again/step-00000004/{p.name}" for p in (run / "checkpoints/step-00000004").iterdir()}
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and "heartbeats" not in p.parts}
    third = megastar("train", config, *words)
    assert "s3://runs/again has all of step-00000004: nothing to upload" in third.stdout
    after = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and "heartbeats" not in p.parts}
    assert after == before


@pytest.mark.dist
def test_a_run_uploads_its_last_checkpoint_before_it_ends(s3, use_s3, world, tmp_path):
    use_s3(s3)
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=4)
    megastar("train", config, "train.upload=s3://runs/c", ranks=2)
    client = client_of(s3)
    assert client.get_object(Bucket="runs", Key="c/latest")["Body"].read() == b"step-00000004\n"
    keys = {e["Key"] for e in client.list_objects_v2(Bucket="runs", Prefix="c/step-00000004/")["Contents"]}
    local = {f"c/step-00000004/{p.name}" for p in (tmp_path / "run/checkpoints/step-00000004").iterdir()}
    assert keys == local
