"""Ranks end with their own status, whatever gloo's threads are doing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.dist.workers.leaving_worker import PAIRS
from tests.integration.conftest import ROOT, environment

ENDINGS = {
    "return 0": (0, "", ""),
    "return 2": (2, "", ""),
    "raise SystemExit": (0, "", ""),
    "raise SystemExit('what is wrong')": (1, "", "what is wrong\n"),
    "print('said', end=''); raise SystemExit(85)": (85, "said", ""),
    "raise ValueError('a defect')": (1, "", "ValueError: a defect\n"),
}


@pytest.mark.dist
def test_ranks_that_leave_right_after_a_collective_keep_their_status():
    """With Python's own shutdown about one in seven aborts here."""
    command = [sys.executable, "tests/dist/workers/leaving_worker.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["85"] * 2 * PAIRS, done.stderr


@pytest.mark.parametrize("rank", [True, False])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_ends_as_python_would(ending, rank):
    status, out, err = ENDINGS[ending]
    code = (
        "import atexit, sys, threading, time\n"
        "from megastar.utils import process_exit\n"
        f"process_exit.is_rank = lambda: {rank}\n"
        "process_exit.PATIENCE = 1000\n"
        "atexit.register(lambda: print('hook', end=''))\n"
        "import concurrent.futures\n"
        "concurrent.futures.ThreadPoolExecutor(1).submit(int)\n"  # its worker waits for more until it is told
        "ended = threading.Event()\n"
        f"def main():\n    try:\n        {ending}\n    finally:\n        ended.set()\n"
        "threading.Thread(target=lambda: (ended.wait(), time.sleep(0.2), print('thread', end=''))).start()\n"
        "process_exit.run_and_leave(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, out + "threadhook") and done.stderr.endswith(err)
    assert ("Traceback" in done.stderr) == ("ValueError" in ending)


def test_a_rank_waits_for_its_threads_no_longer_than_a_launcher_would():
    code = (
        "import threading, time\n"
        "from megastar.utils import process_exit\n"
        "process_exit.is_rank, process_exit.PATIENCE = lambda: True, 0.5\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "process_exit.run_and_leave(lambda: 85)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 85
