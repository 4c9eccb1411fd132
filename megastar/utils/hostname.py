"""What this host is called, and how long it may look for the names of others."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def host_name(environ: Mapping[str, str] | None = None) -> str:
    """The SLURM node's name where there is one, which is what sbatch --exclude takes; else the machine's own."""
    environ = os.environ if environ is None else environ
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def shorten_dns_timeout() -> None:
    """Ask a name server again after 1 s, thrice, not after 5 s, twice, unless RES_OPTIONS says otherwise.

    torch's TCPStore looks up the name of each address that connects (torch/csrc/distributed/c10d/socket.cpp,
    formatSockAddr), and answers nobody meanwhile: one lost question would hold up all ranks. Threads that began to look
    names up before keep their patience.
    """
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")
