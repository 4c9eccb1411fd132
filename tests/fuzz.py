"""Fuzzing the commands: hostile variants of JSON, bytes and files, and a server that runs each case in a forked child.

``run(words, cwd)`` runs ``megastar WORDS`` (or ``@module:function ARGS``) in a process that has imported torch, with a
time-out and a limit of memory, and classifies what it did: an ``Outcome``. Cases are deterministic: draw from
``random.Random(name)``. ``Tally`` counts the outcomes of a reader.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
TIMEOUT = 300.0  # seconds of a case, on a machine that other tests keep busy; processor seconds are limited too
CPU_SECONDS = 20
EVERY = (
    1 if os.environ.get("MEGASTAR_FUZZ") == "all" else 4
)  # `make test` runs every fourth drawn case, `make test-fuzz` all
KILLS = (signal.SIGXCPU, signal.SIGKILL)
DEEP = "[" * 100_000 + "]" * 100_000
# What takes the place of a value. A ``Raw`` is written into the JSON text as it is.
NAMES = ("../../../out", "/etc/passwd", "a/b", "a\0b", "\x1b[31m[/red]\u202ex", "", ".", "..", "x" * 70_000, "\ud800")
NUMBERS = (-1, 0, 1, 2**31, 10**12, 2**63, 10**30, 1.5, 1e300, float("nan"), float("inf"))
OTHERS = (None, True, False, "1", [], {}, [[]], {"a": 1}, [0, "x", None])


@dataclass(frozen=True)
class Raw:
    """JSON text that ``json.dumps`` would not write."""

    text: str


RAWS = (Raw("9" * 10_000), Raw(DEEP), Raw("1e400"), Raw('{"a": 1, "a": {}}'))
BROKEN = (b"", b"{", b"[1, 2]", b"null", b'"x"', b"{}", b"\xff\xfe", b"\0" * 100, DEEP.encode(), b"NaN", b"9" * 10_000)


# Variants of content ---------------------------------------------------------------------------------------------
def dumps(value: Any) -> bytes:
    """JSON with the texts of ``Raw`` in it."""
    raws: list[str] = []

    def mark(other: Any) -> str:
        raws.append(other.text)
        return f"@raw{len(raws) - 1}@"

    text = json.dumps(value, default=mark)
    for i, raw in enumerate(raws):
        text = text.replace(f'"@raw{i}@"', raw)
    return text.encode(errors="surrogatepass")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside ``value``."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def changed(value: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of ``value`` in which ``change(container, key)`` was applied at a path."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    change(inner, at[-1])
    return copy


def replaced(value: Any, at: tuple[Any, ...], by: Any) -> Any:
    def put(container: Any, key: Any) -> None:
        container[key] = by

    return changed(value, at, put)


def json_variants(value: Any, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """(label, JSON text) with one value swapped, removed or renamed: every key is tried as often as ``count`` allows."""
    found = list(places(value))
    rng.shuffle(found)
    for i in range(count):
        if i % EVERY:
            continue
        at = found[i % len(found)]
        label, kind = ".".join(map(str, at))[:60], rng.randrange(8)
        if kind == 0:
            yield f"{label} removed", dumps(changed(value, at, lambda c, k: c.pop(k)))
        elif kind == 1 and isinstance(at[-1], str):
            name = rng.choice(NAMES)
            yield (
                f"{label} renamed {name[:20]!r}",
                dumps(changed(value, at, lambda c, k, n=name: c.__setitem__(n, c.pop(k)))),
            )
        else:
            by = rng.choice(rng.choice((NAMES, NUMBERS, OTHERS, RAWS)))
            yield f"{label} = {str(by)[:20]!r}", dumps(replaced(value, at, by))


def byte_variants(data: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """(label, bytes) truncated, with flipped bits, or with blocks removed, repeated, zeroed or set to 0xff."""
    for _ in range(-(-count // EVERY)):
        at, length, kind = rng.randrange(len(data)), rng.choice((1, 4, 64, 4096)), rng.randrange(7)
        end = min(len(data), at + length)
        if kind == 0:
            yield f"cut at {at}", data[:at]
        elif kind == 1:
            out = bytearray(data)
            for _ in range(rng.choice((1, 1, 3, 100))):
                out[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            yield f"bits flipped near {at}", bytes(out)
        elif kind == 2:
            yield f"{length} bytes removed at {at}", data[:at] + data[end:]
        elif kind == 3:
            yield f"{length} bytes repeated at {at}", data[:end] + data[at:]
        else:
            fill = {4: b"\0" * (end - at), 5: b"\xff" * (end - at), 6: rng.randbytes(end - at)}[kind]
            yield f"{length} bytes of kind {kind} at {at}", data[:at] + fill + data[end:]


def odd_files() -> dict[str, Callable[[Path], None]]:
    """What may lie where a file is expected; each function makes it at a path that is free."""

    def unix_socket(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # the length of a socket's path is limited
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)

    def sparse(path: Path) -> None:
        path.touch()
        os.truncate(path, 64 * GIB)

    return {
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "zeros": lambda p: p.symlink_to("/dev/zero"),
        "dangling": lambda p: p.symlink_to("missing"),
        "loop": lambda p: p.symlink_to(p.name),
        "socket": unix_socket,
        "sparse": sparse,
    }


# Running ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """``kind``: sentence, tolerated, traceback, hang, memory, or outside (it wrote outside the folder)."""

    kind: str
    status: int | None
    output: str
    seconds: float
    mib: float  # peak memory beyond that of the imports

    @property
    def good(self) -> bool:
        return self.kind in ("sentence", "tolerated")


def run(words: list[str], cwd: Path, timeout: float = TIMEOUT) -> Outcome:
    """``megastar WORDS`` in ``cwd``; nothing beside ``cwd`` may change."""
    server, beside = _server(), sorted(os.listdir(cwd.parent))
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps([list(map(str, words)), str(cwd), timeout]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server ended"
    status, output, seconds, mib = json.loads(answer)
    lines = [line for line in output.splitlines() if line.startswith("megastar: error:")]
    if status is None:
        kind = "hang"
    elif mib > 1024 or "MemoryError" in output or "not enough memory" in output:
        kind = "memory"
    elif "Traceback" in output or status not in (0, 1, 2):
        kind = "traceback"
    elif sorted(os.listdir(cwd.parent)) != beside:
        kind = "outside"
    else:
        kind = "sentence" if status == 2 and lines else "tolerated" if status < 2 else "traceback"
    return Outcome(kind, status, output, seconds, mib)


@dataclass
class Tally:
    """The outcomes of one reader."""

    reader: str
    counts: Counter[str] = field(default_factory=Counter)
    mib: float = 0.0
    seconds: float = 0.0
    bad: list[str] = field(default_factory=list)

    def add(self, label: str, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        self.mib, self.seconds = max(self.mib, outcome.mib), self.seconds + outcome.seconds
        if not outcome.good:
            self.bad.append(f"{label}: {outcome.kind} {outcome.status} {outcome.output[-600:]}")
            print(self.reader, self.bad[-1])

    def __str__(self) -> str:
        names = ("sentence", "tolerated", "traceback", "hang", "memory", "outside")
        counts = ", ".join(f"{self.counts[n]} {n}" for n in names)
        return f"{self.reader}: {sum(self.counts.values())} tried, {counts}; {self.mib:.0f} MiB, {self.seconds:.0f} s"

    def check(self) -> None:
        """Print the counts; fail for outcomes that are not good."""
        print(self)
        assert self.counts and not self.bad, f"{self}\n" + "\n---\n".join(self.bad[:20])


@cache
def _server() -> subprocess.Popen[str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "MEGASTAR_CACHE": "cache",
    }
    command = [sys.executable, "-m", "tests.fuzz"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> None:
    import torch

    import megastar.api
    import megastar.checkpoint.convert
    import megastar.cli
    import megastar.commands.sample
    import megastar.evaluation.runner
    import megastar.report.page
    import megastar.sampling.distributed  # noqa: F401
    from megastar.config.schema import ModelConfig, TokenizerConfig
    from megastar.model.transformer import Transformer
    from megastar.tokenizer.vq import VQModel

    with torch.device("meta"):  # imports much of torch
        VQModel(TokenizerConfig())
        Transformer(ModelConfig(n_layer=1))
    base = 0
    for line in sys.stdin:
        words, cwd, timeout = json.loads(line)
        if not base:  # what a child has from this process
            base = int(1024 * _fork(["@builtins:len", ""], cwd, timeout, 0)[3])
        print(json.dumps(_fork(words, cwd, timeout, base)), flush=True)


def _fork(words: list[str], cwd: str, timeout: float, base: int) -> tuple[int | None, str, float, float]:
    read, write = os.pipe()
    start = time.monotonic()
    if not (pid := os.fork()):
        _child(words, cwd, write)
    os.close(write)
    output, deadline, hung = bytearray(), start + timeout, False
    os.set_blocking(read, False)
    while True:
        try:
            if not (part := os.read(read, 1 << 16)):
                break
            output += part
            del output[:-100_000]
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                hung = True
                break
            time.sleep(0.002)
    os.close(read)
    _, status, usage = os.wait4(pid, 0)
    code = (
        None if hung or os.WIFSIGNALED(status) and os.WTERMSIG(status) in KILLS else os.waitstatus_to_exitcode(status)
    )
    return code, output.decode(errors="replace"), time.monotonic() - start, (usage.ru_maxrss - base) / 1024


def _child(words: list[str], cwd: str, write: int) -> None:
    """Run one case and end the process."""
    status: Any = 70
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.chdir(cwd)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * GIB, used + 3 * GIB))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (GIB, GIB))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if words[0].startswith("@"):
            status = _call(words[0][1:], words[1:])
        else:
            from megastar.cli import main

            status = main(words)
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _call(name: str, arguments: list[str]) -> int:
    """``module:function`` with texts as arguments; 2 and a sentence for a ``UserError``, as the command line."""
    import importlib

    from megastar.errors import UserError

    module, _, function = name.partition(":")
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    except UserError as error:
        print(f"megastar: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    serve()
