"""What this host is called."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def host_name(environ: Mapping[str, str] | None = None) -> str:
    """The SLURM node's name where there is one, which is what sbatch --exclude takes; else the machine's own."""
    environ = os.environ if environ is None else environ
    return environ.get("SLURMD_NODENAME") or socket.gethostname()
