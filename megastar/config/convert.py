"""Converts a value from YAML, an override or a dict to the type of its field."""

from __future__ import annotations

import os
import re
from typing import Any, get_args, get_origin

from megastar.config.env_text import recorded
from megastar.config.files import LONGEST_PATH
from megastar.config.yaml_text import WrittenFloat, WrittenInt
from megastar.utils.printable import one_line

INTEGER = re.compile(r"[-+]?[0-9]{1,40}")
HUGE = 10**40  # an integer that still converts to a float
WORDS = {"true": True, "on": True, "yes": True, "y": True, "false": False, "off": False, "no": False, "n": False}


def shown(value: Any) -> str:
    """``repr`` on one line, shortened; of an environment variable, the expression."""
    text = one_line(repr(recorded(value)))
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def convert(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``: str, int, float, bool, or a list of these. Raises ``ValueError`` for another type.

    A string with ``${`` is left to OmegaConf. 1e4 is an integer, true is not a number, and 007 is the string "007" for
    a field of type str.
    """
    if isinstance(value, str) and "${" in value:
        return value
    if get_origin(hint) is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError
        return [convert(one, get_args(hint)[0]) for one in value]
    return {str: _string, int: _integer, float: _number, bool: _boolean}[hint](value)


def _string(value: Any) -> str:
    if value is None:
        return ""  # `data.val_shards=`
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (WrittenInt, WrittenFloat)):
        return value.text
    if not isinstance(value, (str, int, float, os.PathLike)) or "\0" in str(value) or len(str(value)) > LONGEST_PATH:
        raise ValueError
    return str(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float) and not value.is_integer():
        raise ValueError
    if isinstance(value, str) and not INTEGER.fullmatch(value):
        raise ValueError
    if not -HUGE < (number := int(value)) < HUGE:
        raise ValueError
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value) + 0.0  # not -0.0


def _boolean(value: Any) -> bool:
    if isinstance(value, bool) or value in (0, 1) and isinstance(value, int):
        return bool(value)
    if not isinstance(value, str) or value.lower() not in WORDS:
        raise ValueError
    return WORDS[value.lower()]


def type_name(hint: Any, value: Any = None) -> str:
    if get_origin(hint) is list:
        return f"a list of {type_name(get_args(hint)[0]).split()[-1]}s"
    if isinstance(value, str) and "${" in value:
        return "a value in which each ${ has a matching }"
    if hint is str and isinstance(value, str):
        return f"a string of at most {LONGEST_PATH} characters without NUL"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names[hint]
