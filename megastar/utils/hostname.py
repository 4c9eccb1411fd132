"""Names of hosts: this host's, lists of them, and the lookup of their addresses."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Mapping

from megastar.errors import UserError

MOST_HOSTS = 10_000
UNKNOWN_YET = (socket.EAI_NONAME, socket.EAI_AGAIN, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
logger = logging.getLogger(__name__)


def host_name(environ: Mapping[str, str] | None = None) -> str:
    """The SLURM node name, which sbatch --exclude accepts, or else the host name."""
    environ = os.environ if environ is None else environ
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def expand_hosts(text: str) -> tuple[str, ...]:
    """The names of a list ``n1,n2,rack2-[01-16].cluster``; a range keeps its leading zeros. Raises ``UserError``."""
    hosts: list[str] = []
    for entry in filter(None, text.split(",")):
        found = re.fullmatch(r"([^][]*)(?:\[([0-9]{1,9})-([0-9]{1,9})\]([^][]*))?", entry)
        if not found:
            raise UserError(
                f"{entry!r} in a list of hosts: a name may have one range of numbers, such as node-[0-3].cluster"
            )
        before, first, last, after = found.groups()
        if first is None:
            hosts.append(entry)
        elif int(first) > int(last) or int(last) - int(first) >= MOST_HOSTS:
            raise UserError(
                f"{entry!r} in a list of hosts: the range must ascend and have at most {MOST_HOSTS:,} numbers"
            )
        else:
            hosts += [f"{before}{n:0{len(first)}d}{after}" for n in range(int(first), int(last) + 1)]
    return tuple(hosts)


def wait_for_name(host: str, patience: float) -> None:
    """Wait until the name ``host`` has an address. The cluster of a new pod publishes its name some seconds after its
    processes have started. Raises ``OSError`` if it has none within ``patience`` seconds."""
    begin = time.monotonic()
    reported = False
    while True:
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return
        except socket.gaierror as error:
            if error.errno not in UNKNOWN_YET or time.monotonic() - begin > patience:
                raise
        if not reported:
            logger.info("the name %s of this node has no address yet: waiting for up to %.0f s", host, patience)
            reported = True
        time.sleep(0.5)


def shorten_dns_timeout() -> None:
    """Query a name server 3 times with a timeout of 1 s, not twice with 5 s, unless RES_OPTIONS is set.

    torch's TCPStore looks up the name of each connecting address (torch/csrc/distributed/c10d/socket.cpp,
    formatSockAddr) and answers no requests meanwhile: one lost packet would block all ranks. Threads that looked up a
    name before this call keep the old timeout.
    """
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")
