"""A real S3 server (SeaweedFS) on loopback, a relay that cuts connections, and what a client needs. All bounded."""

from __future__ import annotations

import json
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WEED = Path(sys.executable).with_name("weed")
KEYS = {"accessKey": "tester", "secretKey": "tester-secret"}
BUCKETS = ("runs", "codes", "public")  # everybody may read the last


def free_port() -> int:
    """A port of which port + 10000 is free too: the server opens both.

    Both lie below the range from which systems choose the ports of outgoing connections (32768 on Linux). A port of that
    range can be taken by any process while a server that was killed is down, and the server then cannot start again.
    """
    for port in random.SystemRandom().sample(range(11000, 22700), 1000):
        try:
            for one in (port, port + 10000):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", one))
        except OSError:
            continue
        return port
    raise AssertionError("no free port from 11000 to 22699")


def client_of(endpoint: str):
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=KEYS["accessKey"],
        aws_secret_access_key=KEYS["secretKey"], config=Config(retries={"max_attempts": 1}),
    )  # fmt: skip


class Server:
    """SeaweedFS with its data in ``folder``; it can be killed and started again on the same port."""

    def __init__(self, folder: Path):
        self.folder = folder
        identities = [
            {"name": "tester", "credentials": [KEYS], "actions": ["Admin", "Read", "Write", "List"]},
            {"name": "anonymous", "actions": ["Read:public"]},
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        (folder / "data").mkdir()
        names, ports = ("master", "volume", "filer", "s3"), set[int]()
        while len({*ports, *(port + 10000 for port in ports)}) < 2 * len(names):
            ports = {free_port() for _ in names}
        self.ports = dict(zip(names, ports, strict=True))
        self.port = self.ports["s3"]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Return when it accepts connections; a server that ends, or accepts none in 30 s, is started again, twice."""
        for attempt in range(3):
            self._spawn()
            if self._listens(30):
                return
            assert attempt < 2, self.log()
            self.kill()

    def _listens(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process is not None and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return True
            except OSError:
                time.sleep(0.1)
        return False

    def _spawn(self) -> None:
        command = [
            str(WEED), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder / 'data'}", "-filer", "-s3",
            *(f"-{name}.port={port}" for name, port in self.ports.items()), f"-s3.config={self.folder / 's3.json'}",
            "-master.telemetry=false", "-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms",
            "-volume.max=50", "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0", "-s3.port.lance=0",  # else two servers of a machine want the same ports
            *(f"-{name}.localSocket={self.folder / name}.sock" for name in ("filer", "s3")),
        ]  # fmt: skip
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def make_buckets(self) -> None:
        """Those that are missing, once the server answers, for which this waits."""
        client, deadline = client_of(self.endpoint), time.monotonic() + 60
        while True:
            try:
                have = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
                for name in (name for name in BUCKETS if name not in have):
                    client.create_bucket(Bucket=name)
                return
            except Exception:
                assert self.process is not None and self.process.poll() is None, self.log()
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.2)

    def log(self) -> str:
        return (self.folder / "log").read_text()[-2000:]

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def weed_session(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        server.make_buckets()
        yield server
    finally:
        server.kill()


@pytest.fixture
def weed(weed_session) -> Iterator[Server]:
    """The server of the session, to kill and start; it runs again after the test, also when the test failed."""
    yield weed_session
    if weed_session.process is None or weed_session.process.poll() is not None:
        weed_session.start()
    weed_session.make_buckets()


@pytest.fixture(scope="session")
def s3(weed_session) -> str:
    """The endpoint of a server with the empty buckets ``BUCKETS``."""
    return weed_session.endpoint


@pytest.fixture
def use_s3(monkeypatch) -> Callable[..., None]:
    """Point this process and its children at an endpoint; ``keys=False``: without credentials."""

    def use(endpoint: str, keys: bool = True) -> None:
        values = {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "2"}
        values |= {"AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
        values |= {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        for name, value in (("AWS_ACCESS_KEY_ID", "accessKey"), ("AWS_SECRET_ACCESS_KEY", "secretKey")):
            monkeypatch.setenv(name, KEYS[value]) if keys else monkeypatch.delenv(name, raising=False)

    return use


class CuttingRelay:
    """A TCP relay to ``port``. While ``cuts`` last, an answer of more than ``limit`` bytes ends there, every other one
    in a reset.

    ``on_cut`` is called before. ``ranges`` holds (object, first byte, last byte) of every ranged request.
    """

    def __init__(self, port: int):
        self.target, self.cuts, self.limit, self.pause = port, 0, 0, 0.0
        self.on_cut: Callable[[], None] = lambda: None
        self.ranges: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def fetched(self, name: str) -> int:
        """Bytes of ``name`` that were asked for; the looks at one byte are not counted."""
        return sum(last - first + 1 for key, first, last in self.ranges if key.endswith(name) and last)

    def _accept(self) -> None:
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        try:
            with client, socket.create_connection(("127.0.0.1", self.target), timeout=5) as server:
                answered = 0
                while True:
                    for source in select.select([client, server], [], [], 60)[0]:
                        data = source.recv(1 << 14)
                        if not data:
                            return
                        if source is client:
                            self._note(data)
                            answered = 0
                            server.sendall(data)
                            continue
                        answered += len(data)
                        if self._cut(answered):
                            if self.cuts % 2:
                                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            return
                        client.sendall(data)
                        time.sleep(self.pause)
        except OSError:
            return

    def _cut(self, answered: int) -> bool:
        with self.lock:
            if not self.cuts or answered <= self.limit:
                return False
            self.cuts -= 1
            self.on_cut()
            return True

    def _note(self, data: bytes) -> None:
        found = re.search(rb"^GET (\S+) .*^range: bytes=(\d+)-(\d+)", data, re.M | re.S | re.I)
        if found:
            self.ranges.append((found[1].decode().partition("?")[0], int(found[2]), int(found[3])))


@pytest.fixture
def relay(weed_session) -> Iterator[CuttingRelay]:
    relay = CuttingRelay(weed_session.port)
    yield relay
    relay.close()
