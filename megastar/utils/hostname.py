"""This host's name, and the timeout of name lookups."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def host_name(environ: Mapping[str, str] | None = None) -> str:
    """The SLURM node name, which sbatch --exclude accepts, or else the host name."""
    environ = os.environ if environ is None else environ
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def shorten_dns_timeout() -> None:
    """Query a name server 3 times with a timeout of 1 s, not twice with 5 s, unless RES_OPTIONS is set.

    torch's TCPStore looks up the name of each connecting address (torch/csrc/distributed/c10d/socket.cpp,
    formatSockAddr) and answers no requests meanwhile: one lost packet would block all ranks. Threads that looked up a
    name before this call keep the old timeout.
    """
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")
