"""Checkpoints go to a real S3 server (SeaweedFS) and come back whole; an outage stops nothing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megastar.engine import folders
from megastar.engine.upload import Uploader, split_url
from megastar.errors import UserError
from tests.dist.test_checkpoint import write
from tests.integration.conftest import megastar

WEED = Path(sys.executable).with_name("weed")
KEYS = {"accessKey": "tester", "secretKey": "tester-secret"}


def free_port() -> int:
    """A port of which port + 10000 is a port too: the server opens both."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if port < 50000:
            return port


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("s3")
    identity = {"name": "tester", "credentials": [KEYS], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    command = [
        str(WEED), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}", "-filer", "-s3",
        f"-master.port={ports['master']}", f"-volume.port={ports['volume']}", f"-filer.port={ports['filer']}",
        f"-s3.port={ports['s3']}", f"-s3.config={folder / 's3.json'}", "-master.telemetry=false",
        "-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms", "-volume.max=50",
        "-master.volumeSizeLimitMB=64",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        endpoint = f"http://127.0.0.1:{ports['s3']}"
        client = client_of(endpoint)
        deadline = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket="runs")
                break
            except Exception:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield endpoint
    finally:
        server.kill()
        server.wait()


def client_of(endpoint: str):
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEYS["accessKey"],
        aws_secret_access_key=KEYS["secretKey"], config=Config(retries={"max_attempts": 1}),
    )  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    def use(endpoint: str) -> None:
        for name, value in {
            "AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": KEYS["accessKey"], "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_SECRET_ACCESS_KEY": KEYS["secretKey"], "AWS_MAX_ATTEMPTS": "2",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.dist
def test_a_checkpoint_comes_back_whole(s3, environment, tmp_path):
    environment(s3)
    write(tmp_path, 2, 2)
    checkpoint = folders.latest(tmp_path)
    uploader = Uploader("s3://runs/a/run")
    uploader.put(checkpoint)
    assert uploader.finish() == "" and uploader.uploaded == [checkpoint.name]
    client, back = client_of(s3), tmp_path / "back" / checkpoint.name
    back.mkdir(parents=True)
    for entry in client.list_objects_v2(Bucket="runs", Prefix=f"a/run/{checkpoint.name}/")["Contents"]:
        client.download_file("runs", entry["Key"], str(back / Path(entry["Key"]).name))
    assert client.get_object(Bucket="runs", Key="a/run/latest")["Body"].read().decode().strip() == checkpoint.name
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in checkpoint.iterdir())
    folders.verify(back)


@pytest.mark.dist
def test_an_outage_is_told_and_the_next_upload_goes_through(s3, environment, tmp_path):
    write(tmp_path, 1, 1)
    checkpoint = folders.latest(tmp_path)
    other = checkpoint.with_name(folders.name_of(9))
    shutil.copytree(checkpoint, other)
    uploader = Uploader("s3://runs/b")
    environment(f"http://127.0.0.1:{free_port()}")  # nobody listens there
    uploader.put(checkpoint)
    problem = uploader.finish()
    assert f"{checkpoint.name} was not uploaded to s3://runs/b" in problem and f"it is whole in {checkpoint}" in problem
    environment(s3)
    uploader.put(other)
    assert uploader.finish() == "" and uploader.uploaded == [other.name]


def test_urls():
    assert split_url("s3://bucket/a/b/") == ("bucket", "a/b") and split_url("s3://bucket") == ("bucket", "")
    for wrong in ("bucket/a", "s3:///a", "https://bucket/a"):
        with pytest.raises(UserError, match="must read s3://bucket/prefix"):
            split_url(wrong)


@pytest.mark.dist
def test_a_run_uploads_its_last_checkpoint_before_it_ends(s3, environment, world, tmp_path):
    environment(s3)
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", steps=4)
    megastar("train", config, "train.upload=s3://runs/c", ranks=2)
    client = client_of(s3)
    assert client.get_object(Bucket="runs", Key="c/latest")["Body"].read() == b"step-00000004\n"
    keys = {e["Key"] for e in client.list_objects_v2(Bucket="runs", Prefix="c/step-00000004/")["Contents"]}
    local = {f"c/step-00000004/{p.name}" for p in (tmp_path / "run/checkpoints/step-00000004").iterdir()}
    assert keys == local
