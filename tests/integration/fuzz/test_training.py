"""Training does not resume from a damaged checkpoint, and says how to resume from the older one."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import forker
from tests.integration.conftest import World, environment

pytestmark = pytest.mark.dist


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "megastar", "train", str(config), *overrides]
    return forker.run(words, environment(), 1)


def test_the_older_checkpoint_is_offered(world: World, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    config = world.write_config(tmp_path / "run.yaml", run, steps=4, save_every=2, val_every=0)
    assert train(config).returncode == 0
    newest = run / "checkpoints" / "step-00000004"
    state = newest / "state-00000.safetensors"
    whole = state.read_bytes()
    for damage in (whole[:-10], whole[:-10] + b"x" * 10, b""):
        state.write_bytes(damage)
        done = train(config, "train.steps=6")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert f"{state} is damaged" in done.stderr and "step-00000002, whose files are whole" in done.stderr
    command = re.search(r"run `(mv .*)` and train again", done.stderr)
    assert command
    subprocess.run(shlex.split(command.group(1)), check=True)
    done = train(config, "train.steps=6")
    assert done.returncode == 0, done.stderr
    assert "step-00000002" in done.stdout and (run / "checkpoints" / "step-00000006" / "megastar.json").is_file()
