"""Lists of hosts with ranges, and names that have no address yet."""

from __future__ import annotations

import logging
import socket

import pytest

from megastar import cli
from megastar.errors import UserError
from megastar.utils import hostname
from megastar.utils.hostname import expand_hosts, wait_for_name


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1,n2", ["n1", "n2"]),
        ("megastar-workers-0-[0-2].megastar", [f"megastar-workers-0-{i}.megastar" for i in range(3)]),
        ("a[09-11],b", ["a09", "a10", "a11", "b"]),
        ("n[3-3],", ["n3"]),
        ("", []),
    ],
)
def test_ranges_of_hosts(text, names):
    assert expand_hosts(text) == tuple(names)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("n[1-2]x[3-4]", "one range of numbers"),
        ("n[1,2]", "one range of numbers"),
        ("n[1-2", "one range of numbers"),
        ("n[a-b]", "one range of numbers"),
        ("n[4-2]", "must ascend"),
        ("n[0-999999999]", "at most 10,000 numbers"),
    ],
)
def test_a_range_that_cannot_be_read_is_an_error(text, problem, capsys):
    with pytest.raises(UserError, match=problem):
        expand_hosts(text)
    words = ["elastic", "--nodes", "1:1", "--hosts", text, "configs/run/demo.yaml"]
    assert cli.main(words) == 2 and problem in capsys.readouterr().err


def test_a_name_is_waited_for_until_it_has_an_address(monkeypatch, caplog):
    """Names of the reserved domain invalid (RFC 2606) have none; here one appears at the third lookup."""
    lookup, asked = socket.getaddrinfo, []

    def published(host, *rest, **options):
        asked.append(host)
        return lookup("127.0.0.1" if len(asked) > 2 else host, *rest, **options)

    monkeypatch.setattr(hostname.socket, "getaddrinfo", published)
    monkeypatch.setattr(hostname.time, "sleep", lambda seconds: None)
    with caplog.at_level(logging.INFO):
        wait_for_name("pod-0.invalid", 60)
    assert asked == ["pod-0.invalid"] * 3
    assert [record.message for record in caplog.records] == [
        "the name pod-0.invalid of this node has no address yet: waiting for up to 60 s"
    ]


def test_a_name_without_an_address_is_an_error_after_the_patience():
    with pytest.raises(socket.gaierror):
        wait_for_name("pod-0.invalid", 0)
