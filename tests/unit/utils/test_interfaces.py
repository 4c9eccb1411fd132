import socket
from types import SimpleNamespace

import pytest

from megastar.utils import interfaces

CARDS = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.5", "fe80::1%eth0"], "ib0": ["192.168.1.5"]}
NAMES = {"localhost": "127.0.0.1", "node1": "10.0.0.5", "debian": "127.0.1.1", "127.0.0.1": "127.0.0.1"}


@pytest.mark.parametrize(
    ("host", "environ", "address"),
    [
        ("127.0.0.1", {}, "127.0.0.1"),
        ("localhost", {}, "127.0.0.1"),
        ("node1", {}, ""),
        ("node1", {"GLOO_SOCKET_IFNAME": "eth0"}, "10.0.0.5"),
        ("node1", {"NCCL_SOCKET_IFNAME": "=eth0"}, "10.0.0.5"),
        ("node1", {"NCCL_SOCKET_IFNAME": "ib,eth"}, "10.0.0.5"),
        ("node1", {"GLOO_SOCKET_IFNAME": "ib0"}, "10.0.0.5"),  # where the others connect to
        ("debian", {"GLOO_SOCKET_IFNAME": "ib0"}, "192.168.1.5"),  # /etc/hosts names the host 127.0.1.1
        ("debian", {}, ""),
        ("debian", {"GLOO_SOCKET_IFNAME": "lo"}, "127.0.1.1"),
        ("node1", {"GLOO_SOCKET_IFNAME": "lo"}, "10.0.0.5"),
        ("node1", {"NCCL_SOCKET_IFNAME": "^docker"}, ""),
        ("unknown", {"GLOO_SOCKET_IFNAME": "eth0"}, "10.0.0.5"),
    ],
)
def test_where_rank_0_listens(monkeypatch, host, environ, address):
    def getaddrinfo(name, *_, **__):
        if name not in NAMES:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (NAMES[name], 0))]

    def family(ip):
        return socket.AF_INET6 if ":" in ip else socket.AF_INET

    cards = {n: [SimpleNamespace(family=family(ip), address=ip) for ip in ips] for n, ips in CARDS.items()}
    monkeypatch.setattr(interfaces.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(interfaces.psutil, "net_if_addrs", lambda: cards)
    assert interfaces.listen_address(host, environ) == address
    assert interfaces.loopback_environment() == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
