"""`megastar report --serve`: its responses, the allowed hosts, and its page in a browser while a run writes rows."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from megastar import cli
from megastar.config.load import config_yaml, load_config
from megastar.report import live, server
from megastar.run_dir.events import append_event
from tests.browser import Browser

ROOT = Path(__file__).resolve().parents[3]


def write_rows(run: Path, first: int, last: int) -> None:
    with (run / "metrics.jsonl").open("a") as f:
        for step in range(first, last + 1):
            f.write(json.dumps({"step": step, "loss": 9 - step / 100, "step_s": 0.2, "images_per_s": 40.0}) + "\n")


@pytest.fixture
def run(tmp_path) -> Path:
    run = tmp_path / "runs" / "star"
    run.mkdir(parents=True)
    cfg = load_config(ROOT / "configs/run/demo.yaml", [f"run={run}", "data.shards=nowhere"])
    (run / "config.yaml").write_text(config_yaml(cfg))
    append_event(run, "started", 0, "begun", steps=300, ranks=2)
    write_rows(run, 1, 20)
    return run


class Served:
    """A `megastar report --serve` in a process of its own."""

    def __init__(self, *words: object):
        environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "megastar", "report", *map(str, words), "--serve", "--port", "0"]
        self.process = subprocess.Popen(
            command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        self.url = line.split()[0] if line else ""
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", self.url), line + self.process.stderr.read()
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def get(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as c:
            c.request(method, path, headers=headers)
            answer = c.getresponse()
            return answer.status, answer.read().decode(), dict(answer.headers)

    def events(self) -> Iterator[tuple[str, str]]:
        """(kind, data) of each event."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as c:
            c.request("GET", "/events")
            answer = c.getresponse()
            assert answer.status == 200 and answer.headers["Content-Type"] == "text/event-stream"
            kind = ""
            for line in answer:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, value

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err


@pytest.fixture
def served(run) -> Iterator[Served]:
    made = Served(run)
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


def test_the_page_and_its_events(run, served):
    status, text, headers = served.get()
    assert status == 200 and "20 of 300" in text and headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "connect-src 'self'" in text and "@megastar" not in text
    assert not (run / "report.html").exists() and not (run / "samples").exists()
    version = re.search(r'name="megastar-version" content="(\w+)"', text)[1]
    events = served.events()
    kind, first = next(events)
    assert kind == "page" and re.fullmatch("[0-9a-f]{16}", first) and len(version) == 16
    write_rows(run, 21, 40)
    began = time.monotonic()
    kind, second = next(events)
    assert kind == "page" and second != first and time.monotonic() - began < 15
    status, text, _ = served.get()
    assert f'content="{second}"' in text and "40 of 300" in text
    moved = run.with_name("moved")
    run.rename(moved)
    while (event := next(events))[0] != "problem":
        pass
    assert event[1] == f"{run} is not a folder: name a run folder, the `run` of its configuration"
    assert served.get()[0] == 200  # the last page
    moved.rename(run)
    assert next(events)[0] == "page"
    events.close()


def test_only_this_server_is_asked_and_no_file(run, served):
    (run / "secret").write_text("secret")
    for path in ("/secret", "/../secret", "/%2e%2e/secret", "//etc/passwd", "/etc/passwd", "/?x", "/events/..", "*", "http://evil/", "/\\..\\secret"):  # fmt: skip
        status, text, _ = served.get(path)
        assert status in (400, 404, 421) and "secret" not in text, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT"):
        assert served.get("/", method)[0] == 501
    status, text, headers = served.get("/", "HEAD")
    assert (status, text) == (200, "") and int(headers["Content-Length"]) > 1000
    assert served.get("/events", "HEAD")[0] == 404
    port = served.port
    names = {
        f"127.0.0.1:{port}": 200, f"localhost:{port}": 200, f"LOCALHOST:{port}": 200, f"[::1]:{port}": 200, "localhost:6061": 200,
        f"{socket.gethostname()}:{port}": 200, f"evil.example:{port}": 421, "evil.example": 421, "10.0.0.1:6061": 421, "": 421,
        f"user@localhost:{port}": 421, f"localhost:{port}/x": 421, "localhost:x": 421, f"localhost.evil.example:{port}": 421,
    }  # fmt: skip
    assert {name: served.get("/", Host=name)[0] for name in names} == names
    assert served.get("/events", Host="evil.example")[0] == 421
    with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as s:
        s.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 421")
    for junk in (
        b"\x00\xff\x16\x03\x01" * 50 + b"\r\n\r\n",
        b"GET " + b"/" * 70_000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500,
    ):
        with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as s:
            s.sendall(junk + b"\r\n\r\n")
            assert re.match(rb"HTTP/1.1 4\d\d|$|<!DOCTYPE", s.recv(100))
    assert served.get()[0] == 200


def test_connections_and_streams_are_bounded(run, monkeypatch):
    monkeypatch.setattr(server, "MOST_STREAMS", 2)
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 5)
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 5.0)
    monkeypatch.setattr(server.ReportHandler, "timeout", 5.0)
    report = live.LiveReport(lambda: [run], lambda: "page " + live.VERSION)
    with server.ReportServer(report, "127.0.0.1", 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        address = made.server_address[:2]

        def ask(text: bytes = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n") -> socket.socket:
            s = socket.create_connection(address, timeout=10)
            s.sendall(text)
            return s

        streams = [ask() for _ in range(2)]
        assert all(b"200 OK" in s.recv(15) for s in streams)
        third = ask()
        answer = b""
        while part := third.recv(1000):  # to its end
            answer += part
        assert b"503" in answer[:12]
        deadline = time.monotonic() + 60

        def wait_for_free(places: int) -> None:
            while made.connections._value != places:
                assert time.monotonic() < deadline
                time.sleep(0.01)

        wait_for_free(3)
        slow = [ask(b"GET / HT") for _ in range(3)]
        wait_for_free(0)
        assert ask().recv(10) == b""  # six connections
        while any(s.recv(100) for s in slow):  # cut off after REQUEST_TIMEOUT
            assert time.monotonic() < deadline
        for s in streams:
            s.close()
        monkeypatch.setattr(server, "BEAT", 0.1)
        while b"200 OK" not in (answer := ask(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").recv(200)):
            assert time.monotonic() < deadline, answer
            time.sleep(0.1)
        made.shutdown()
        thread.join()
    report.close()


def test_a_page_is_built_no_more_often_than_it_changes(run):
    built = []
    report = live.LiveReport(lambda: [run], lambda: built.append(1) or f"{len(built)} {live.VERSION}")
    try:
        assert len(built) == 1
        time.sleep(1.5)
        assert len(built) == 1  # nobody watches
        first = report.current()
        assert [report.current() for _ in range(20)] == [first] * 20 and len(built) == 2
        report.watchers = 1
        write_rows(run, 21, 22)
        page = report.wait(first.version, 10)
        assert page.version != first.version and len(built) == 3 and page.html == f"3 {page.version}".encode()
    finally:
        report.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(run, served, number):
    events = served.events()
    next(events)
    began = time.monotonic()
    status, err = served.stop(number)
    assert status == 128 + number and time.monotonic() - began < 8
    assert err.count("\n") == 1 and err.startswith(f"megastar: stopped by {signal.Signals(number).name}")


def test_bad_input_is_one_sentence(run, capsys):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--serve", "--port", port): f"--port {port} is in use: name another one, or 0 for any free port",
            ("--serve", "--port", "0", "--host", "192.0.2.1"): "--host 192.0.2.1 is not an address of this machine",
            ("--serve", "--host", "no host"): "--host no host is not an address of this machine",
            ("--serve", "--port", "70000"): "'70000' is not an integer from 0 to 65535",
            ("--serve", "--out", str(run / "x.html")): "--serve writes no file: leave out --out, or --serve",
            ("--port", "1"): "--port and --host belong to --serve: give --serve too",
        }
        for words, sentence in cases.items():
            assert cli.main(["report", str(run), *words]) == 2
            assert sentence in capsys.readouterr().err
    assert cli.main(["report", str(run / "none"), "--serve"]) == 2
    assert "is not a folder: name a run folder" in capsys.readouterr().err


# In a browser ------------------------------------------------------------------------------------------------------
def until(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture
def browser(tmp_path, served) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile")
    found.allowed = (*found.allowed, served.url)
    found.view(1280)
    yield found
    found.close()


@pytest.mark.browser
def test_the_page_follows_the_run_and_keeps_what_the_reader_set(run, served, browser):
    browser.open(served.url)
    text = "document.querySelector('.card').innerText"
    until(lambda: "live," in browser.run("document.getElementById('live').textContent"))
    assert "20 of 300" in browser.run(text)
    path = "document.querySelector('#charts .series .line').getAttribute('d')"
    browser.click("#axis [data-x=images]")
    browser.click("#charts .chart .log")
    browser.run("document.querySelector('.card details') && (document.querySelector('.card details').open = true)")
    browser.run("window.mark = 'not loaded again'")
    before = browser.run(path)
    write_rows(run, 21, 60)
    append_event(run, "warning", 60, "a <b>bold</b> warning")
    until(lambda: "60 of 300" in browser.run(text))
    assert browser.run(path) != before and browser.run("window.mark") == "not loaded again"
    assert browser.run("report.runs[0].values.loss.x.at(-1)") == 60
    assert browser.run("document.querySelector('[data-x=images]').getAttribute('aria-pressed')") == "true"
    assert browser.run("document.querySelector('.log').getAttribute('aria-pressed')") == "true"
    events = browser.run("document.getElementById('events').textContent")
    assert "a <b>bold</b> warning" in events and browser.run("document.querySelector('#events b')") is None
    # A new kind of row and a sample grid need the page again: it is loaded, with the same settings.
    (run / "samples").mkdir()
    Image.new("RGB", (60, 40), "red").save(run / "samples" / "step-00000060.png")
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 61, "val_loss_ar": 5.0}) + "\n")
    until(
        lambda: browser.run(
            "document.readyState === 'complete' && document.querySelectorAll('#grids img').length === 1"
        )
    )
    assert browser.run("window.mark ?? 'loaded again'") == "loaded again"
    until(lambda: browser.run("document.querySelector('[data-x=images]').getAttribute('aria-pressed')") == "true")
    assert browser.problems == []


@pytest.mark.browser
def test_the_page_says_when_the_run_or_the_server_is_gone(run, served, browser):
    browser.open(served.url)
    live_text = "document.getElementById('live').textContent"
    until(lambda: "live," in browser.run(live_text))
    shutil.move(run, run.with_name("moved"))
    until(lambda: "is not a folder" in browser.run(live_text))
    shutil.move(run.with_name("moved"), run)
    until(lambda: "live," in browser.run(live_text))
    assert browser.problems == []
    assert served.stop()[0] == 130
    until(lambda: "the server does not answer" in browser.run(live_text))
    assert "20 of 300" in browser.run("document.querySelector('.card').innerText")
