"""Whether two sets give their numbers to the same classes."""

from __future__ import annotations

import logging

import pytest

from megastar.data.shards.class_names import check_same_classes, first_difference
from megastar.errors import UserError

NUMBERS = ["0", "1", "2"]


@pytest.mark.parametrize(
    ("names", "others"),
    [(["a", "b"], ["a", "b"]), (["a", "b"], ["a", "b", "c"]), (NUMBERS, [*NUMBERS, "3"]), (["a"], [])],
)
def test_the_same_numbers(names, others):
    check_same_classes("x", names, "y", others)
    check_same_classes("y", others, "x", names)
    assert first_difference(names, others) is None


@pytest.mark.parametrize(
    ("names", "others", "number"),
    [(["a", "b"], ["b", "a"], 0), (["a", "b", "c"], ["a", "c"], 1), (["1", "10", "2"], ["1", "2", "10"], 1)],
)
def test_other_numbers_are_refused(names, others, number):
    sentence = f"x and y number their classes differently: class {number} is '{names[number]}' in the former and "
    sentence += f"'{others[number]}' in the latter; pretokenize one of them again with --classes"
    with pytest.raises(UserError, match=sentence):
        check_same_classes("x", names, "y", others)


def test_numbers_instead_of_names_are_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megastar"), "propagate", True)
    for pair in (("x", NUMBERS, "y", list("abc")), ("y", list("abc"), "x", NUMBERS)):
        caplog.clear()
        check_same_classes(*pair)
        assert "x has numbers instead of class names: they are taken as the numbers of the classes of y" in caplog.text
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    caplog.clear()
    check_same_classes("x", NUMBERS, "y", list("abc"))
    assert not caplog.text  # rank 0 has reported it
