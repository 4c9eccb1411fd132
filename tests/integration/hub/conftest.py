from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megastar import cli
from megastar.checkpoint.hub.download import fetch_folder
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

    capsys: pytest.CaptureFixture

    def __init__(self, server: HubServer, cache: Path):
        self.env = environment() | {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
        self.env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def __call__(self, *words: object, answer: str = "", **env: str) -> subprocess.CompletedProcess:
        """``answer``: what is typed in a terminal; empty: without a terminal."""
        command = [sys.executable, "-m", "megastar", *map(str, words)]
        if words[0] != "train" and set(env) <= {"HF_TOKEN"}:  # what huggingface_hub does not read at its import only
            return self._here(command, env, answer)
        return subprocess.run(
            command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
        )

    def _here(self, command: list[str], env: dict[str, str], answer: str) -> subprocess.CompletedProcess:
        """In this process, which has imported torch."""
        from huggingface_hub import constants

        fetch_folder.cache_clear()
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", terminal := io.StringIO(answer + "\n" if answer else ""))
            patch.setattr(terminal, "isatty", lambda: bool(answer))
            patch.setattr(constants, "ENDPOINT", self.env["HF_ENDPOINT"])
            template = self.env["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_CACHE", f"{self.env['HF_HOME']}/hub")
            patch.setattr(constants, "HF_TOKEN_PATH", f"{self.env['HF_HOME']}/token")
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            status = cli.main(command[3:])
        return subprocess.CompletedProcess(command, status, *self.capsys.readouterr())


@pytest.fixture
def client(hub, tmp_path, capsys) -> Client:
    made = Client(hub, tmp_path / "cache")
    made.capsys = capsys
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {os.path.relpath(p, folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
