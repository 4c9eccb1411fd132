"""A rank notices the end of its launcher. Real processes, without torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RANK = """
import os, signal, sys, time
from pathlib import Path
from megastar.utils.parent import end_with_launcher
def leave(*_):
    Path(sys.argv[1]).with_suffix(".left").touch()
    sys.exit(85)
signal.signal(signal.SIGTERM, leave)
Path(sys.argv[1]).with_suffix(".started").touch()
while Path("/proc", os.environ.get("LATE", "none")).exists():
    time.sleep(0.05)
end_with_launcher()
Path(sys.argv[1]).touch()
for _ in range(600):
    time.sleep(0.1)
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"


def wait(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen]:
    """The process in a session of its own, which is killed at the end of the block."""
    launcher = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        yield launcher
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize("above", [False, True])
def test_a_rank_ends_with_its_launcher(tmp_path, above):
    """``above``: the process above the launcher, as with deepspeed's two."""
    ready = tmp_path / "rank"
    words = [sys.executable, "-c", LAUNCHER, RANK, str(ready)]
    if above:  # the middle process is found by its words
        middle = "import runpy, sys; sys.argv[1:] = sys.argv[2:]; exec(sys.argv.pop(1))"
        words = [
            *(sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[2:]).wait()"),
            *("deepspeed", sys.executable, "-c", middle, "deepspeed.launcher.launch", LAUNCHER, RANK, str(ready)),
        ]
    with started(words) as launcher:
        wait(ready)
        launcher.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        assert not ready.with_suffix(".left").exists()
        launcher.kill()
        launcher.wait()
        wait(ready.with_suffix(".left"))


@pytest.mark.parametrize("name", ["MEGASTAR_LAUNCHER", "TORCHELASTIC_RUN_ID", "CROSS_RANK", "deepspeed"])
def test_a_launcher_that_ended_before_its_rank_looked_is_noticed(tmp_path, name):
    ready, above = tmp_path / "rank", name == "deepspeed"
    late = "import os, subprocess, sys; os.environ |= {'LATE': str(os.getpid()), sys.argv.pop(1): str(os.getpid())}; "
    words = [sys.executable, "-c", late + LAUNCHER.partition("; ")[2], name, RANK, str(ready)]
    if above:  # RANK waits for the end of the process above its launcher
        middle = "import sys, subprocess; subprocess.Popen([sys.executable, '-c', *sys.argv[3:]]).wait()"
        words[2] = late + "subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]).wait()"
        words[4:] = [middle, "deepspeed.launcher.launch", "--enable_each_rank_log=None", RANK, str(ready)]
    with started(words) as launcher:
        wait(ready.with_suffix(".started"))
        launcher.kill()
        launcher.wait()
        wait(ready.with_suffix(".left"))
