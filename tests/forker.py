"""Ranks without their imports: a process that has imported what commands need, and forks the ranks of each launch.

Importing torch and deepspeed takes longer than most runs of the tests. ``run`` asks a server that is started when it is
first needed and ends with its parent; it takes requests on stdin and answers on stdout, a JSON object a line.
``python -m tests.forker RANKS WORDS...`` launches once, in the terminal's own files.
The ranks find each other as under SLURM: rank 0 keeps the store. Where the launcher, signals to it, or the first moments
of a process matter, a test starts real processes instead.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from megastar.utils.process_exit import leave

ROOT = Path(__file__).parents[1]
LAST_WORDS = 0.5  # seconds from a rank's failure to TERM: the others may end by themselves
GRACE = 30.0  # and from there to KILL
NUMBERS = itertools.count()  # of the requests


def run(words: list[str], environment: dict[str, str], ranks: int = 0, timeout: float = 300) -> Any:
    """`python WORDS` as ``ranks`` ranks (0: without a launcher), a ``subprocess.CompletedProcess``. Its status is that of
    the rank that failed first; their outputs are one after the other as they came."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("out", "err")]
        request = request_of(words, ranks, environment, files, timeout) | {"number": next(NUMBERS)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        number = -1
        while number != request["number"]:  # the answer to a test that was interrupted may come first
            answer = server.stdout.readline()
            assert answer, "the forker ended"
            number, status = json.loads(answer)
        out, err = (Path(file).read_text(errors="replace") for file in files)
    if status is None:
        raise subprocess.TimeoutExpired(words, timeout, out[-4000:], err[-4000:])
    return subprocess.CompletedProcess(words, status, out, err)


def request_of(
    words: list[str], ranks: int, environment: dict[str, str], files: list[str], timeout: float
) -> dict[str, Any]:
    place: dict[str, str] = {}
    if ranks:
        with socket.create_server(("127.0.0.1", 0)) as s:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        place |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return {"words": words, "ranks": ranks, "environment": environment | place, "files": files, "timeout": timeout}


@cache
def _server() -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.forker"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# The server --------------------------------------------------------------------------------------------------------
def load() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # as ranks set it: read at the import
    import torch._dynamo  # 2 s of imports that the first optimizer of every rank would repeat
    import torch.utils.tensorboard  # noqa: F401

    import megastar.api
    import megastar.checkpoint.convert
    import megastar.cli
    import megastar.commands.convert
    import megastar.commands.data
    import megastar.commands.evaluate
    import megastar.commands.pretokenize
    import megastar.commands.probe
    import megastar.commands.sample
    import megastar.commands.train
    import megastar.engine.trainer  # noqa: F401

    gc.collect()
    gc.freeze()  # else a collection in a rank visits all modules, and copies their pages
    assert len(os.listdir("/proc/self/task")) == 1, "a thread of the imports would be missing in the ranks"


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps([request["number"], launch(request)]), flush=True)


def launch(request: dict[str, Any]) -> int | None:
    """The first status that is not 0, or 0; None after the time-out."""
    left = {fork(request, rank) for rank in range(max(1, request["ranks"]))}
    deadline, first, failed_at = time.monotonic() + request["timeout"], 0, 0.0
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            left.discard(pid)
            if status and not first:
                first, failed_at = os.waitstatus_to_exitcode(status), time.monotonic()
                time.sleep(LAST_WORDS)
                tell(left, signal.SIGTERM)
            continue
        now = time.monotonic()
        if now > deadline or (failed_at and now > failed_at + GRACE):
            tell(left, signal.SIGKILL)
        time.sleep(0.005)
    return None if time.monotonic() > deadline else first


def tell(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:  # none was waited for yet: each is theirs still
        os.kill(pid, number)


def fork(request: dict[str, Any], rank: int) -> int:
    if pid := os.fork():
        return pid
    status: Any = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, file in enumerate(request["files"], 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), fd)
        os.environ.clear()
        os.environ.update(request["environment"])
        if request["ranks"]:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        status = main(request["words"])
    finally:
        leave(status)


def main(words: list[str]) -> Any:
    """`python WORDS`; its exit status."""
    if words[0] == "-m":
        sys.argv = words[1:]
        words = words[2:]
    else:
        sys.argv = words
    try:
        if sys.argv[0].endswith(".py"):
            sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        return leaving.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


if __name__ == "__main__":
    load()
    if len(sys.argv) > 1:
        status = launch(request_of(sys.argv[2:], int(sys.argv[1]), dict(os.environ), [], timeout=900))
        sys.exit(124 if status is None else status)
    serve()
