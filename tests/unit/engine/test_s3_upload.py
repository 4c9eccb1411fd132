"""Uploads to servers that refuse, and what the end of a run says about them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from megastar.config.load import load_config, save_config
from megastar.engine.checkpointer.s3_upload import Uploader
from megastar.run_dir.events import append_event
from megastar.run_dir.layout import MANIFEST
from megastar.run_dir.status import status_of


class Strict(BaseHTTPRequestHandler):
    """Accepts objects without the checksums that boto3 adds by default; refuses what the test says."""

    objects: dict[str, bytes] = {}
    refuse: dict[str, tuple[int, str]] = {}  # access key -> status, code
    refuse_reads: dict[str, tuple[int, str]] = {}  # the same, of GET and HEAD

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, code: str = "") -> None:
        body = f"<Error><Code>{code}</Code><Message>reason</Message></Error>".encode() if code else b""
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        if any("checksum" in name.lower() or "trailer" in name.lower() for name in self.headers):
            return self.answer(501, "NotImplemented")
        for key, (status, code) in self.refuse.items():
            if f"Credential={key}/" in self.headers.get("authorization", ""):
                return self.answer(status, code)
        self.objects[self.path] = data
        return self.answer(200)

    def is_refused(self) -> bool:
        for key, (status, code) in self.refuse_reads.items():
            if f"Credential={key}/" in self.headers.get("authorization", ""):
                self.answer(status, code if self.command == "GET" else "")  # a response to HEAD has no body
                return True
        return False

    def do_HEAD(self) -> None:
        if self.is_refused():
            return
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(self.objects[self.path])))
        self.end_headers()

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, dict(parse_qsl(urlsplit(self.path).query))
        if self.is_refused():
            return None
        if "list-type" in query:
            start = f"{path}/{query['prefix']}"
            found = [(k.removeprefix(f"{path}/"), v) for k, v in self.objects.items() if k.startswith(start)]
            rows = "".join(f"<Contents><Key>{k}</Key><Size>{len(v)}</Size></Contents>" for k, v in found)
            body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
        elif path not in self.objects:
            return self.answer(404, "NoSuchKey")
        else:
            body = self.objects[path]
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None


@pytest.fixture
def strict(tmp_path, monkeypatch) -> Iterator[type[Strict]]:
    Strict.objects, Strict.refuse, Strict.refuse_reads = {}, {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Strict)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
    values |= {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "keys"), "AWS_CONFIG_FILE": "/dev/null"}
    values |= {"AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    write_key(tmp_path, "OLD")
    yield Strict
    server.shutdown()
    server.server_close()


def write_key(folder: Path, key: str) -> None:
    (folder / "keys").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    (folder / "state-00000.safetensors").write_bytes(b"state")
    (folder / MANIFEST).write_text("{}")
    return folder


def test_a_server_without_checksums(strict, checkpoint):
    uploader = Uploader("S3://runs/a")
    uploader.put(checkpoint)
    assert uploader.finish() == ""
    assert strict.objects["/runs/a/step-00000004/state-00000.safetensors"] == b"state"
    assert strict.objects["/runs/a/latest"] == b"step-00000004\n"


def test_expired_credentials_are_replaced(strict, checkpoint, tmp_path):
    strict.refuse = {"OLD": (400, "ExpiredToken")}
    uploader = Uploader("s3://runs/a", patience=120)
    uploader.put(checkpoint)
    threading.Timer(1.0, write_key, (tmp_path, "NEW")).start()
    assert uploader.finish() == "" and uploader.uploaded == [checkpoint.name]


def test_credentials_that_expire_before_the_size_is_asked_for_are_replaced(strict, checkpoint, tmp_path):
    strict.refuse_reads = {"OLD": (400, "ExpiredToken")}
    uploader = Uploader("s3://runs/a", patience=120)
    uploader.put(checkpoint)
    threading.Timer(1.0, write_key, (tmp_path, "NEW")).start()
    assert uploader.finish() == "" and uploader.uploaded == [checkpoint.name]


@pytest.mark.parametrize(
    ("code", "advice"),
    [("RequestTimeTooSkewed", "the clock of this machine is wrong"), ("AccessDenied", "use credentials that may")],
)
def test_a_refused_question_for_the_size_says_why(strict, checkpoint, code, advice):
    strict.refuse_reads = {"OLD": (403, code)}
    uploader = Uploader("s3://runs/a", patience=600)
    uploader.put(checkpoint)
    assert advice in uploader.finish() and f"({code}" in uploader.problem


def test_only_what_is_missing_is_uploaded(strict, checkpoint):
    def send() -> int:
        uploader = Uploader("s3://runs/a", only_missing=True)
        uploader.put(checkpoint)
        assert uploader.finish() == ""
        assert strict.objects["/runs/a/step-00000004/state-00000.safetensors"] == b"state"
        assert strict.objects["/runs/a/latest"] == b"step-00000004\n"
        return uploader.sent

    folder = "/runs/a/step-00000004/"
    assert send() == 3 and send() == 0
    del strict.objects["/runs/a/latest"]
    assert send() == 1
    del strict.objects[folder + "state-00000.safetensors"]
    assert send() == 1
    strict.objects[folder + "state-00000.safetensors"] = b"st"  # truncated
    assert send() == 1
    strict.objects["/runs/a/latest"] = b"step-00000002\n"
    assert send() == 1
    strict.objects |= {
        folder + "state-00000.safetensors": b"other",
        folder + MANIFEST: b"[]",
    }  # of another run, as large
    assert send() == 2


def test_a_failed_upload_says_why_and_so_does_the_end_of_the_run(strict, checkpoint, tmp_path):
    strict.refuse = {"OLD": (501, "NotImplemented")}
    uploader = Uploader("s3://runs/a", patience=600)
    uploader.put(checkpoint)
    problem = uploader.finish()
    assert (
        "was not uploaded to s3://runs/a (http://127.0.0.1:" in problem and "does not implement the request" in problem
    )
    run = tmp_path / "run"
    cfg = load_config(None, [f"run={run}", "data.shards=x", "train.steps=4", "train.upload=s3://runs/a"])
    save_config(cfg, run / "config.yaml")
    (run / "checkpoints" / checkpoint.name).mkdir(parents=True)
    manifest = {"format": 1, "step": 4, "steps": 4, "files": {}, "config": {}}
    (run / "checkpoints" / checkpoint.name / MANIFEST).write_text(json.dumps(manifest))
    append_event(run, "started", 0, "", steps=4)
    append_event(run, "saved", 4, "saved")
    append_event(run, "warning", 4, problem, situation="upload")
    append_event(run, "finished", 4, f"4 steps are done; {problem}")
    status = status_of(run)
    assert (status.state, status.why) == ("finished", f"all 4 steps are done and saved, but {problem}")


def test_checkpoints_that_are_still_read_are_named(strict, checkpoint, monkeypatch):
    going, gate = threading.Event(), threading.Event()
    send = Uploader._send

    def slow(self, *arguments):
        going.set()
        assert gate.wait(20)
        return send(self, *arguments)

    monkeypatch.setattr(Uploader, "_send", slow)
    uploader = Uploader("s3://bucket/run")
    assert uploader.pending() == set()
    uploader.put(checkpoint)
    assert going.wait(20)
    newer = checkpoint.with_name("step-00000008")
    shutil.copytree(checkpoint, newer)
    uploader.put(newer)
    assert uploader.pending() == {checkpoint, newer}
    gate.set()
    assert uploader.finish() == "" and uploader.pending() == set()
    assert uploader.uploaded == [checkpoint.name, newer.name]
