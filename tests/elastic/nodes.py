"""Nodes of an elastic run on one machine: each is an agent with its ranks, and a memory of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megastar.run_dir.events import read_events
from tests.integration.conftest import ROOT, World, environment
from tests.slurm.cluster import free_ports

EXACT = ["model.{class,token,resid,ffn}_dropout"]  # see ``write_config``


def write_config(world: World, path: Path, run: Path, **train: object) -> Path:
    """A run whose losses do not depend on the number of ranks: no dropout, whose numbers each data rank draws."""
    text = world.write_config(path, run, val_every=0, **train).read_text()
    no_dropout = ", ".join(f"{name}_dropout_p: 0" for name in ("token", "resid", "ffn"))
    path.write_text(text.replace("model: {", f"model: {{{no_dropout}, "))
    return path


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    whole = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")] if path.is_file() else []
    return {row["step"]: row["loss"] for row in map(json.loads, whole) if "loss" in row}


class Job:
    """``hosts`` nodes of which at most ``nodes`` = "MIN:MAX" train, ``ranks`` each; ``start`` each of them."""

    def __init__(self, config: Path, run: Path, nodes: str, hosts: int, ranks: int, *words: str):
        self.port = free_ports(hosts)
        self.run, self.hosts, self.log = run, hosts, config.with_suffix(".log")
        names = ",".join(["127.0.0.1"] * hosts)
        options = ["--nodes", nodes, "--hosts", names, "--port", str(self.port), "--nproc", str(ranks)]
        self.command = [sys.executable, "-m", "megastar", "elastic", *options, str(config), *words]
        self.agents: dict[int, subprocess.Popen] = {}

    def start(self, *indices: int) -> None:
        for k in indices:
            with self.log.open("ab") as out:
                self.agents[k] = subprocess.Popen(
                    [*self.command, "--index", str(k)], cwd=ROOT, env=environment(), stdout=out, stderr=out,
                    start_new_session=True,
                )  # fmt: skip

    def pids(self, k: int) -> list[int]:
        """The ranks of a node, by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError, KeyError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == self.agents[k].pid:
                    env = dict(x.split("=", 1) for x in (entry / "environ").read_text().split("\0") if "=" in x)
                    found[int(env["RANK"])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def lose(self, k: int) -> float:
        """The node's agent and its ranks are killed, and its memory is gone; the time."""
        victims = [self.agents[k].pid, *self.pids(k)]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agents.pop(k).wait()
        return time.monotonic()

    def step(self) -> int:
        return max(losses(self.run), default=0)

    def events(self, *kinds: str) -> list[dict]:
        return [e for e in read_events(self.run) if e["event"] in kinds]

    def starts(self) -> int:
        return len(self.events("started", "resumed"))

    def wait_for(self, what: Callable[[], object], seconds: float = 180) -> float:
        """Poll; the time."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.text()[-6000:]
            assert any(a.poll() is None for a in self.agents.values()), self.text()[-6000:]
            time.sleep(0.02)
        return time.monotonic()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def seconds_to_imports(self) -> list[float]:
        return [float(x) for x in re.findall(r"imports ([\d.]+) s", self.text())]

    def end(self, seconds: float = 180) -> dict[int, int]:
        """Wait for the agents that are left; their exit statuses."""
        try:
            return {k: agent.wait(seconds) for k, agent in self.agents.items()}
        except subprocess.TimeoutExpired:
            raise AssertionError(self.text()[-6000:]) from None
        finally:
            self.close()

    def close(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.kill()
                agent.wait()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
