"""The launcher of local ranks, with a shell script in place of the ranks' Python."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megastar import cli
from megastar.commands._shared import launch as _launch
from megastar.errors import UserError

ROOT = Path(__file__).parents[3]
PYTHON = sys.executable


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Makes ranks run a shell script, whose words are -u -m megastar WORDS."""
    script = tmp_path / "rank"

    def install(text):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        monkeypatch.setattr(_launch.sys, "executable", str(script))

    monkeypatch.setattr(_launch, "FAILURE_GRACE", 0.1)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(_launch.tempfile, "tempdir", None)
    yield install
    assert not list((tmp_path / "tmp").iterdir())  # nothing is left


def test_ranks_get_the_words_the_log_level_and_their_place(ranks, tmp_path, monkeypatch):
    ranks(f'echo "$*" > {tmp_path}/words$RANK; env > {tmp_path}/env$RANK')
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    npz = str(tmp_path / "a.npz")
    assert cli.main(["sample", "--npz", npz, "-q", "--nproc=2"]) == 0
    for rank in "01":
        assert (tmp_path / f"words{rank}").read_text() == f"-u -m megastar sample --npz {npz} -q --nproc=2 --quiet\n"
        env = dict(line.split("=", 1) for line in (tmp_path / f"env{rank}").read_text().splitlines() if "=" in line)
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (rank, rank, "2", "2")
        assert env["MASTER_ADDR"] == "127.0.0.1" and env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "lo"
        assert "TORCHELASTIC_USE_AGENT_STORE" not in env
        assert ("MEGASTAR_LISTEN_FD" in env) is (rank == "0")
    monkeypatch.setenv("MEGASTAR_LOG_LEVEL", "debug")
    assert cli.main(["train", "configs/run/demo.yaml", "--nproc", "2", "train.steps=3"]) == 0
    assert (tmp_path / "words1").read_text().endswith("configs/run/demo.yaml --nproc 2 train.steps=3 --verbose\n")


def test_rank_0_alone_inherits_a_socket_on_the_loopback(ranks, tmp_path):
    ranks(f"ls -l /proc/self/fd > {tmp_path}/fds$RANK")
    assert _launch.launch(2, ["train"]) == 0
    assert "socket:" in (tmp_path / "fds0").read_text() and "socket:" not in (tmp_path / "fds1").read_text()


def test_the_failure_of_a_rank_reaches_the_user(ranks, capsys):
    message = "the disk of node 2 is full: free some space"
    error = f"""printf '{{"message": "{message}"}}' > $TORCHELASTIC_ERROR_FILE"""
    others = "trap 'exit 85' TERM; while :; do sleep 0.05; done"
    ranks(f"[ $RANK = 1 ] && {{ {error}; exit 2; }}; {others}")
    with pytest.raises(UserError, match=message):
        _launch.launch(2, ["train"])
    ranks(f"[ $RANK = 1 ] && {{ {error}; exit 86; }}; {others}")
    assert _launch.launch(2, ["train"]) == 86
    ranks("[ $RANK = 0 ] && exit 85; exit 0")
    assert _launch.launch(2, ["train"]) == 85
    assert capsys.readouterr().err == f"megastar: error: {message}\n"
    ranks(f"[ $RANK = 1 ] && kill -9 $$; {others}")
    assert _launch.launch(2, ["train"]) == 137
    assert capsys.readouterr().err == "megastar: error: rank 1 was killed by SIGKILL\n"


def test_ranks_that_fail_one_after_the_other_get_no_signal(ranks, tmp_path, monkeypatch):
    """Each ends with its own message, and the user reads one of them, nothing about SIGTERM."""
    monkeypatch.setattr(_launch, "FAILURE_GRACE", 60.0)
    ranks(f"trap 'echo TERM > {tmp_path}/got' TERM; [ $RANK = 0 ] && sleep 0.5; exit 3")
    begin = time.monotonic()
    assert _launch.launch(2, ["train"]) == 3
    assert time.monotonic() - begin < 30 and not (tmp_path / "got").exists()


def test_ranks_that_do_not_end_after_a_failure_are_killed(ranks, monkeypatch):
    monkeypatch.setattr(_launch, "SHUTDOWN_TIMEOUT", 0.5)
    ranks("[ $RANK = 1 ] && exit 3; trap '' TERM; while :; do sleep 0.05; done")
    assert _launch.launch(2, ["train"]) == 3


LAUNCH = "import sys; from megastar.commands._shared import launch as _launch; sys.executable = sys.argv[1]; sys.exit(_launch.launch(2, ['x']))"


def launcher(tmp_path, *before: str) -> subprocess.Popen:
    words = [*before, PYTHON, "-c", LAUNCH, str(tmp_path / "rank")]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"pid{r}").exists() for r in range(2)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


TRAPS = 'for s in TERM INT HUP QUIT USR1; do trap "echo $s > {0}/got$RANK; exit 85" $s; done'
LOOP = "echo $$ > {0}/new$RANK; mv {0}/new$RANK {0}/pid$RANK; while :; do sleep 0.05; done"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1"])
def test_a_signal_reaches_every_rank(ranks, tmp_path, name):
    ranks(f"{TRAPS}; {LOOP}".format(tmp_path))
    process = launcher(tmp_path)
    number = signal.Signals[f"SIG{name}"]
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert [(tmp_path / f"got{r}").read_text() for r in range(2)] == [f"{name}\n"] * 2


def test_below_nohup_the_hangup_is_ignored(ranks, tmp_path):
    ranks(f"{TRAPS}; {LOOP}".format(tmp_path))
    process = launcher(tmp_path, "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / "got0").read_text() == "TERM\n"


def test_ranks_are_suspended_with_the_launcher(ranks, tmp_path):
    ranks(f"{TRAPS}; {LOOP}".format(tmp_path))
    process = launcher(tmp_path)
    pids = [process.pid, *(int((tmp_path / f"pid{r}").read_text()) for r in range(2))]

    def wait_for_state(wanted):
        deadline = time.monotonic() + 30
        while not all(re.match(wanted, Path(f"/proc/{p}/stat").read_text().rpartition(") ")[2]) for p in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    process.send_signal(signal.SIGTSTP)
    wait_for_state("T")
    process.send_signal(signal.SIGCONT)
    wait_for_state("[SRD]")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
