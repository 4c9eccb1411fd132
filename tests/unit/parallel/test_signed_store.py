from typing import Any

import pytest

from megastar.parallel.signed_store import SignedStore


class Plain(dict[str, Any]):
    """A key-value store as torch's."""

    set = dict.__setitem__

    def check(self, keys):
        return all(k in self for k in keys)

    def multi_get(self, keys):
        return [self[k] for k in keys]


def test_only_values_of_this_launch_are_read(caplog):
    plain = Plain()
    mine, peer, stranger = SignedStore(plain, b"s"), SignedStore(plain, b"s"), SignedStore(plain, b"other")
    peer.set("a", "text")
    peer.set("b", b"")
    assert mine.check(["a", "b"]) and not mine.check(["c"])
    assert mine.get_all(["a", "b"]) == {"a": b"text", "b": b""} and not mine.forged and not caplog.records
    plain["b"] = plain["a"]  # a genuine value of another key
    stranger.set("a", "text")
    assert mine.get_all(["a", "b"]) == {} and mine.forged == {"a", "b"}
    peer.set("a", "again")
    assert mine.get_all(["a"]) == {"a": b"again"} and mine.forged == {"b"}
    assert [r.getMessage().split(" of ")[0] for r in caplog.records] == ["ignoring a value"]


@pytest.mark.parametrize("value", [b"", b"x", bytes(32), bytes(100), b"cos\nsystem\n(S'id'\ntR."])
def test_foreign_bytes_are_ignored(value):
    plain = Plain(a=value)
    assert SignedStore(plain, b"s").get_all(["a"]) == {}
