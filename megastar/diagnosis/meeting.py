"""The ranks of a launcher meet in a key-value store: who is there, what each node says, who has fallen silent.

The store needs no process group, so a node that never comes, or hangs in a check, stops nobody and is named.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from megastar.errors import UserError
from megastar.utils.hostname import host_name

POLL = 0.02  # seconds


def slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    """The nodes of this job step, as SLURM expands its list; none without SLURM."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        return []
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def address_of(environ: Mapping[str, str]) -> tuple[str, int]:
    """Where rank 0 listens: MASTER_ADDR and MASTER_PORT, else the first node of the SLURM step. Raises ``UserError``."""
    host = environ.get("MASTER_ADDR") or next(iter(slurm_hosts(environ)), "")
    if not host:
        raise UserError(
            "MASTER_ADDR is not set: start megastar doctor with torchrun or srun, or set it to the first node's name"
        )
    return host, int(environ.get("MASTER_PORT") or 20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000)


class Meeting:
    """Rank 0 asks, every rank answers. ``patience``: seconds that a rank may be silent.

    Raises ``UserError`` on a rank that does not reach rank 0's node.
    """

    def __init__(self, rank: int, world: int, patience: float, environ: Mapping[str, str] = os.environ):
        import torch.distributed as dist

        self.rank, self.world, self.patience = rank, world, patience
        self.node = host_name(environ)
        host, port = address_of(environ)
        theirs = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process listens
        try:
            store = dist.TCPStore(
                host, port, is_master=rank == 0 and not theirs, timeout=timedelta(seconds=patience), wait_for_workers=False
            )  # fmt: skip
        except RuntimeError as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.node}: rank 0 does not answer at {host}:{port} within {patience:g} s ({first}): see that its node is up, "
                "that no firewall is between, and that MASTER_PORT is free"
            ) from error
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", environ.get("SLURM_STEP_ID", "0"))
        self.store = dist.PrefixStore(f"megastar/doctor/{attempt}", store)

    def say(self, what: str, value: Any) -> None:
        self.store.set(f"{what}/{self.rank}", json.dumps(value))

    def collect(self, what: str, ranks: list[int], patience: float | None = None) -> dict[int, Any]:
        """Rank 0: what each of ``ranks`` said, those left out that said nothing in time."""
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        found: dict[int, Any] = {}
        while len(found) < len(ranks):
            for rank in ranks:
                if rank not in found and self.store.check([f"{what}/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{what}/{rank}"))
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        return {rank: found[rank] for rank in ranks if rank in found}

    def announce(self, what: str, value: Any) -> Any:
        """Rank 0: tell all ranks. Returns ``value``."""
        self.store.set(what, json.dumps(value))
        return value

    def hear(self, what: str, patience: float) -> Any:
        """Another rank: what rank 0 announces. Raises ``UserError`` when it says nothing for ``patience`` seconds."""
        deadline = time.monotonic() + patience
        try:
            while not self.store.check([what]):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.node}: rank 0 said nothing for {patience:g} s: see what happened to its node"
                    )
                time.sleep(POLL)
            return json.loads(self.store.get(what))
        except RuntimeError as error:  # its process is gone
            raise UserError(f"{self.node}: rank 0 is gone: see what happened to its node") from error


def absent(world: int, there: dict[int, str], hosts: Callable[[], list[str]], when: str) -> str:
    """A sentence about the ranks that did not answer, and their nodes as far as known. ``there``: rank -> node."""
    missing = [r for r in range(world) if r not in there]
    nodes = sorted(set(hosts()) - set(there.values()))
    which = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}{' ...' if len(missing) > 8 else ''}"
    where = f" ({', '.join(nodes)})" if nodes else ""
    return f"{which}{where} {when}"
