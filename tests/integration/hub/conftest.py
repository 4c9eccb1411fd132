from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, environment, megastar
from tests.integration.hub.server import HubServer, serve


@pytest.fixture(scope="session")
def folder(whole, world, tmp_path_factory) -> Path:
    """The run's weights as a folder in the Hub's layout."""
    out = tmp_path_factory.mktemp("hub") / "tiny-star"
    megastar("convert", whole, "--to", "hf", "--out", out, "--license", "apache-2.0")
    return out


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serve() as server:
        yield server


class Client:
    """``megastar`` with a cache of its own and the server as its Hub."""

    def __init__(self, server: HubServer, cache: Path):
        self.env = environment() | {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        self.env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def __call__(self, *words: object, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "megastar", *map(str, words)]
        return subprocess.run(
            command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )


@pytest.fixture
def client(hub, tmp_path) -> Client:
    return Client(hub, tmp_path / "cache")


def files_of(folder: Path) -> dict[str, bytes]:
    return {os.path.relpath(p, folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
