"""The ranks of a launcher meet in a key-value store: which ranks joined, what each node reports, which stopped responding.

The store needs no process group: a node that never joins, or hangs in a check, blocks no other and is named.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from megastar.errors import UserError
from megastar.utils.hostname import host_name

POLL = 0.02  # seconds


def slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    """The nodes of this job step, as SLURM expands its list; empty without SLURM."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        return []
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split()


def master_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, by default the first node of the SLURM step. Raises ``UserError``."""
    host = environ.get("MASTER_ADDR") or next(iter(slurm_hosts(environ)), "")
    if not host:
        raise UserError(
            "MASTER_ADDR is not set: start megastar doctor with torchrun or srun, or set it to the name of the first node"
        )
    return host, int(environ.get("MASTER_PORT") or 20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000)


class Rendezvous:
    """The store of this launch. ``patience``: seconds to wait for a rank.

    Raises ``UserError`` on a rank that cannot reach the node of rank 0.
    """

    def __init__(self, rank: int, world: int, patience: float, environ: Mapping[str, str] = os.environ):
        import torch.distributed as dist

        from megastar.parallel.rendezvous import agent_hosts_store, host_store, open_client

        self.rank, self.world, self.patience = rank, world, patience
        self.node = host_name(environ)
        host, port = master_address(environ)
        listens = rank == 0 and not agent_hosts_store(environ)
        try:
            store = host_store(host, port, environ) if listens else open_client(host, port, patience)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.node}: no connection to rank 0 at {host}:{port} within {patience:g} s ({reason}): check that its "
                "node is up, that no firewall blocks the port, and that MASTER_PORT is free"
            ) from error
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", environ.get("SLURM_STEP_ID", "0"))
        self.store = dist.PrefixStore(f"megastar/doctor/{attempt}", store)

    def send(self, key: str, value: Any) -> None:
        """Publish this rank's value for rank 0."""
        self.store.set(f"{key}/{self.rank}", json.dumps(value))

    def collect(self, key: str, ranks: list[int], patience: float | None = None) -> dict[int, Any]:
        """On rank 0: the values sent by ``ranks``, without those that sent none in time."""
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        found: dict[int, Any] = {}
        while len(found) < len(ranks):
            for rank in ranks:
                if rank not in found and self.store.check([f"{key}/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{key}/{rank}"))
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        return {rank: found[rank] for rank in ranks if rank in found}

    def broadcast(self, key: str, value: Any) -> Any:
        """On rank 0: publish a value for all ranks. Returns ``value``."""
        self.store.set(key, json.dumps(value))
        return value

    def receive(self, key: str, patience: float) -> Any:
        """On another rank: what rank 0 broadcasts. Raises ``UserError`` after ``patience`` seconds without it."""
        deadline = time.monotonic() + patience
        try:
            while not self.store.check([key]):
                if time.monotonic() > deadline:
                    raise UserError(f"{self.node}: no message from rank 0 for {patience:g} s: check its node")
                time.sleep(POLL)
            return json.loads(self.store.get(key))
        except RuntimeError as error:  # its process ended
            raise UserError(f"{self.node}: the connection to rank 0 is lost: check its node") from error


def missing_ranks(world: int, nodes: dict[int, str], hosts: list[str]) -> str:
    """The ranks that are not in ``nodes`` (rank -> node), and those of ``hosts`` without a rank: "ranks 4, 5 (n3)"."""
    missing = [r for r in range(world) if r not in nodes]
    absent = sorted(set(hosts) - set(nodes.values()))
    which = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}{' ...' if len(missing) > 8 else ''}"
    return which + (f" ({', '.join(absent)})" if absent else "")
