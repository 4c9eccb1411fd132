"""JSON of others: size, depth, types, and the sentence about what is wrong."""

import json

import pytest

from megastar.errors import UserError
from megastar.utils import json_file
from megastar.utils.json_file import (
    FILE_NAME,
    WEIGHT_NAME,
    check,
    integer,
    list_of,
    optional,
    parse_json,
    read_json,
    record,
    text,
    validator,
)

SCHEMA = validator(record({"a": integer(0, 10), "b": list_of(text(5))}, {"c": optional(integer())}))
GOOD = {"a": 3, "b": ["x"]}


def test_unknown_fields_of_newer_versions_are_kept():
    assert check(GOOD | {"later": {"x": 1}}, "f", SCHEMA) == GOOD | {"later": {"x": 1}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"a": "3"}, r"f is damaged: a is 3 \(it should be a valid integer\): restore it"),
        ({"a": True}, r"a is True \(it should be a valid integer\)"),
        ({"a": 3.0}, r"a is 3.0 \(it should be a valid integer\)"),
        ({"a": 11}, r"a is 11 \(it should be less than or equal to 10\)"),
        ({"a": 10**40}, r"a is an integer of 133 bits"),
        ({"b": ["x", 5]}, r"b.1 is 5 \(it should be a valid string\)"),
        ({"b": {}}, r"b is an object of 0"),
        ({"b": ["a\x1b[31m"]}, r"b.0 is 'a\\x1b\[31m'"),
        ({"c": "x"}, r"c is x"),
    ],
)
def test_the_first_wrong_field_is_named(change, sentence):
    with pytest.raises(UserError, match=sentence):
        check(GOOD | change, "f", SCHEMA, "restore it")


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="f is damaged: b is missing"):
        check({"a": 1}, "f", SCHEMA)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 10_000, b"9" * 10_000, b'{"a": "\\ud800"}', b"[1] 2"])
def test_what_is_not_json(data):
    with pytest.raises(UserError, match="f is damaged: it is not JSON"):
        parse_json(data, "f")


def test_sizes_are_limited(monkeypatch, tmp_path):
    monkeypatch.setattr(json_file, "MAX_CONTAINERS", 3)
    with pytest.raises(UserError, match="f is too large for JSON"):
        parse_json(b"[[], [], []]", "f")
    (tmp_path / "f").write_text(json.dumps(GOOD))
    assert read_json(tmp_path / "f", SCHEMA) == GOOD
    with pytest.raises(UserError, match="has 20 bytes, more than the limit of 10"):
        read_json(tmp_path / "f", SCHEMA, most=10)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\0", "\x1b", "a\nb", "ü", "x" * 300, ".x"])
def test_names_are_plain(name):
    for schema in (FILE_NAME, WEIGHT_NAME):
        with pytest.raises(UserError):
            check(name, "f", validator(schema))


def test_usual_names_pass():
    check("state-00001.safetensors", "f", validator(FILE_NAME))
    check("transformer.layers.0.attention.wqkv.weight", "f", validator(WEIGHT_NAME))
