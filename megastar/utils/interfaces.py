"""Network interfaces: on which one a process listens. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import psutil

LOOPBACK = "127.0.0.1"
LOOPBACKS = ("127.", "::1")  # how such addresses begin


def loopback_interface() -> str:
    return next((name for name, addresses in psutil.net_if_addrs().items() if LOOPBACK in _ip(addresses)), "lo")


def loopback_environment() -> dict[str, str]:
    """Variables with which gloo and NCCL listen on the loopback interface only."""
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback_interface())


def listen_address(host: str, environ: Mapping[str, str] = os.environ) -> str:
    """The address on which rank 0 listens: where ``host`` is only local, or a network card is configured
    (GLOO_SOCKET_IFNAME, else NCCL_SOCKET_IFNAME), not all of them. Empty: all."""
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        found = []
    if host == "localhost" or (host in found and host.startswith(LOOPBACKS)):
        return str(found[0]) if found else LOOPBACK
    cards = {name: _ip(addresses) for name, addresses in psutil.net_if_addrs().items()}
    wanted = environ.get("GLOO_SOCKET_IFNAME") or environ.get("NCCL_SOCKET_IFNAME") or ""
    prefixes = [] if wanted.startswith("^") else wanted.lstrip("=").split(",")
    chosen = [ip for name, ips in cards.items() for ip in ips if any(p and name.startswith(p) for p in prefixes)]
    if not chosen:
        return ""
    # The other ranks connect to the address of ``host``, which may be that of another card.
    local = [ip for ips in cards.values() for ip in ips if ip in found and not ip.startswith("127.")]
    if not local and all(ip.startswith(LOOPBACKS) for ip in chosen):
        # The loopback card answers at every address of 127.0.0.0/8: nodes in namespaces of one machine may have others.
        local = [str(ip) for ip in found if str(ip).startswith(LOOPBACKS)]
    return str(next((ip for ip in chosen if ip in local), (local or chosen)[0]))


def _ip(addresses: list[Any]) -> list[str]:
    usual = [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
    return [ip for ip in usual if not ip.startswith("fe80")]  # link-local
