"""Stop signals and commands: one sentence, the usual status, ``finally`` blocks run."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from megastar import cli
from megastar.utils.signals import StopSignal, raise_stopped

ROOT = Path(__file__).resolve().parents[3]
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
STUBBORN = """
import os, signal, time
from megastar.utils.signals import raise_stopped
with raise_stopped():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)  # timeout(1) sends it twice
        time.sleep({pause})
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleaned up", flush=True)
"""


def command(monkeypatch, main) -> None:
    module = types.ModuleType("megastar.commands.stub")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megastar.commands.stub", module)
    monkeypatch.setitem(cli.COMMANDS, "stub", ("stub", ""))
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("resumes", [True, False])
def test_a_signal_ends_a_command_with_a_sentence(number, resumes, monkeypatch, capsys, tmp_path):
    handlers = {n: signal.getsignal(n) for n in NUMBERS}

    def main(words: list[str]) -> int:
        try:
            (tmp_path / "x.tmp").touch()
            signal.raise_signal(number)
        finally:
            (tmp_path / "x.tmp").unlink()
        return 0

    command(monkeypatch, main)
    if resumes:
        monkeypatch.setattr(cli, "RESUMED", ("stub",))
    assert cli.main(["stub"]) == 128 + number
    kept = "completed work is kept, the same command resumes" if resumes else "incomplete files are removed"
    out, err = capsys.readouterr()
    assert out == "" and err == f"megastar: stopped by {signal.Signals(number).name}: {kept}\n"
    assert not list(tmp_path.iterdir()) and {n: signal.getsignal(n) for n in NUMBERS} == handlers


def test_a_library_that_catches_errors_does_not_swallow_it():
    with raise_stopped(), pytest.raises(StopSignal):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("caught")


def test_what_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_stopped():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize(("pause", "status"), [(0.0, 0), (2.5, 143)])
def test_a_second_request_ends_a_cleanup_that_hangs_but_an_echo_does_not(pause, status):
    done = subprocess.run(
        [sys.executable, "-c", STUBBORN.format(pause=pause)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status and ("cleaned up" in done.stdout) == (not status) and not done.stderr


def test_other_ranks_say_nothing(monkeypatch, capsys):
    command(monkeypatch, lambda words: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["stub"]) == 143 and capsys.readouterr().err == ""


def test_a_signal_within_an_import_is_raised_after_it(tmp_path, monkeypatch):
    text = "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.2)\ndone = True\n"
    (tmp_path / "slow_to_import.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with raise_stopped(), pytest.raises(StopSignal):
        importlib.import_module("slow_to_import")
        time.sleep(30)
    assert sys.modules.pop("slow_to_import").done
