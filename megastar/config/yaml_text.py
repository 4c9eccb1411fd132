"""YAML text -> strings, numbers, booleans, lists and mappings, within limits of size and depth. No other tags."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megastar.utils.printable import one_line

MOST_BYTES = 1 << 20  # of a file
MOST_DEPTH = 32  # levels of lists and mappings
MOST_VALUES = 10_000  # in a file, after aliases and interpolations are expanded
LONGEST_NUMBER = 400  # characters
PLAIN = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "value")
}
_HIDDEN = "\ue000" * 3  # of no meaning in Unicode
REFERENCE = re.compile(r"\$\{(?:[\w.]+:)?([^${}]*)\}")


class _Loader(yaml.SafeLoader):
    """As in OmegaConf, 1e-3 is a number and 2020-01-01 is a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":float"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?((\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$", re.ASCII),
    list("-+.0123456789"),
)


class YamlError(Exception):
    """Text that is refused: the message is the end of a sentence. ``line``: where, counted from 1; 0: unknown.
    ``syntax``: it is not YAML at all."""

    def __init__(self, message: str, line: int = 0, syntax: bool = False):
        super().__init__(message)
        self.line, self.syntax = line, syntax


class WrittenInt(int):
    """An integer that remembers how it is written, for fields that are strings: 007, 2024_01_01."""

    text: str

    def __repr__(self) -> str:
        return self.text


class WrittenFloat(float):
    """A number that remembers how it is written: 3.10, 1e400."""

    text: str

    def __repr__(self) -> str:
        return self.text


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; ``on`` and ``yes`` are strings. Raises ``YamlError``."""
    node = _compose(text)
    if node is None:
        return None
    _check_size(node, {}, 0)
    return _value(node)


def parse_value(text: str) -> Any:
    """The value of an override: as in a file, except that an unquoted one has no comments. Raises ``YamlError``."""
    if re.search("[\ud800-\udfff]", text):  # bytes that are not UTF-8: the path of a file
        return text.strip()
    if text.lstrip().startswith("&"):
        raise YamlError("an anchor is not allowed here: quote a value that begins with &")
    node = _compose(text)
    if isinstance(node, yaml.ScalarNode) and node.style is None and not node.tag.startswith("!"):
        more = "\n" in text.strip() or text[node.end_mark.index :].strip()
        return text.strip() if more else parse_yaml(text)
    return parse_yaml(text)


def parse_text(text: str) -> str:
    """The value of an override of a field that is text: as it is typed, without the spaces around it. Only quotes around
    the whole value are removed, as in a file. Raises ``YamlError`` for a control character."""
    typed = text.strip()
    if found := yaml.reader.Reader.NON_PRINTABLE.search(re.sub("[\ud800-\udfff]", "", typed)):
        raise YamlError(f"the character {found[0]!r} is not allowed", syntax=True)
    if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"":
        with suppress(YamlError):
            node = _compose(typed)
            if isinstance(node, yaml.ScalarNode):
                return str(node.value)
    return typed


def parse_texts(text: str) -> Any:
    """The value of an override of a field that is a list of texts: its items are as they are typed. Raises ``YamlError``."""
    parse_value(text)  # raises
    node = _compose(text)
    if not isinstance(node, yaml.SequenceNode):
        return parse_value(text)
    return [one.value if isinstance(one, yaml.ScalarNode) and one.tag in PLAIN else _value(one) for one in node.value]


def _compose(text: str) -> yaml.Node | None:
    """The nodes of a text that is within the limits of depth and number of values."""
    depth = count = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            count += 1
            if depth > MOST_DEPTH or count > 2 * MOST_VALUES:
                _refuse_size(event, deep=depth > MOST_DEPTH)
        return yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"the character {chr(int(error.character))!r} is not allowed", line, True) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, reason = mark.line + 1 if mark else 0, error.problem or error.context or "a syntax error"
        raise YamlError(one_line(reason), line, True) from error


def _refuse_size(place: Any, *, deep: bool) -> None:
    most = f"{MOST_DEPTH} levels" if deep else f"{MOST_VALUES} values, with each alias counted as often as it is used"
    raise YamlError(f"it has more than {most}", place.start_mark.line + 1)


def _check_size(node: yaml.Node, sizes: dict[int, tuple[int, int]], above: int) -> tuple[int, int]:
    """(values, levels) of ``node`` with its aliases expanded; an alias within itself is endless."""
    if above > MOST_DEPTH:
        _refuse_size(node, deep=True)
    if id(node) not in sizes:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [n for pair in inner for n in pair] if isinstance(node, yaml.MappingNode) else inner
        found = [_check_size(part, sizes, above + 1) for part in parts]
        sizes[id(node)] = 1 + sum(n for n, _ in found), 1 + max((d for _, d in found), default=0)
    values, levels = sizes[id(node)]
    if values > MOST_VALUES or above + levels > MOST_DEPTH + 1:
        _refuse_size(node, deep=values <= MOST_VALUES)
    return values, levels


def _value(node: yaml.Node) -> Any:
    if node.tag not in PLAIN:
        tag = one_line(node.tag.replace("tag:yaml.org,2002:", "!!"))
        raise YamlError(f"the tag {tag} is not allowed: write a plain value", node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_value(inner) for inner in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node)
    return _scalar(node.value, node.tag.rpartition(":")[2])


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, inner in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError("a list or a mapping is used as a key", line)
        if key.tag.endswith(":merge"):
            value = _value(inner)
            for under in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(under, dict):
                    raise YamlError("<< needs a mapping", line)
                merged |= under
            continue
        if key.value in own:
            raise YamlError(f"the key {one_line(key.value)[:80]} occurs twice", line, True)
        own[key.value] = _value(inner)
    return merged | own


def _scalar(text: str, kind: str) -> Any:
    """Words of YAML 1.1 for booleans, and numbers of base 60, are strings."""
    plain = text.replace("_", "")
    if kind == "null":
        return None
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind not in ("int", "float") or ":" in text or len(text) > LONGEST_NUMBER:
        return text
    number: WrittenInt | WrittenFloat
    try:
        if kind == "int":
            number = WrittenInt(plain, 0 if re.match("[-+]?0[xb]", plain) else 10)
        else:
            number = WrittenFloat(re.sub(r"\.(?=inf|nan)", "", plain.lower()))
    except ValueError:  # an explicit tag: !!int x
        return text
    number.text = text
    return number


def resolve(tree: Any) -> Any:
    """``tree`` with its ``${...}`` replaced by values of OmegaConf. Raises ``YamlError``."""
    texts = {path: value if isinstance(value, str) else "" for path, value in leaves(tree)}
    if not any("${" in text for text in texts.values()):
        return tree
    costs: dict[str, float] = {}
    if sum(_cost(path, texts, costs) for path in texts) > MOST_VALUES:
        raise YamlError("its ${...} refer to themselves or to too many values")
    try:
        made = OmegaConf.create(map_values(_plain, tree))
        return _keep_numbers(tree, map_values(seen, OmegaConf.to_container(made, resolve=True)))
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        raise YamlError(one_line((str(error).splitlines() or [type(error).__name__])[0])) from error


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each single value."""
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _cost(path: str, texts: dict[str, str], costs: dict[str, float]) -> float:
    """The number of values needed to resolve the leaf ``path``; infinite if it refers to itself."""
    if path in costs:
        return costs[path]
    costs[path] = float("inf")
    total = 1.0
    for names in REFERENCE.findall(texts[path]):
        for name in re.split(r"[,\s]+", names.replace("[", ".").replace("]", "")):
            end = name.strip("'\".")
            found = [p for p in texts if p == end or p.startswith(end + ".") or (name[:1] == "." and f".{end}" in p)]
            total += sum(_cost(p, texts, costs) for p in found if end)
    costs[path] = total
    return total


def map_values(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each value inside its dicts and lists."""
    if isinstance(tree, dict):
        return {key: map_values(function, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_values(function, value) for value in tree]
    return function(tree)


def _plain(value: Any) -> Any:
    """OmegaConf does not accept subclasses of numbers."""
    value = hidden(value)
    return int(value) if isinstance(value, WrittenInt) else float(value) if isinstance(value, WrittenFloat) else value


def hidden(value: Any) -> Any:
    """The text ``???``, which means a missing value in OmegaConf, as another one; ``seen`` is the inverse."""
    return _HIDDEN if value == "???" else value


def seen(value: Any) -> Any:
    return value.replace(_HIDDEN, "???") if isinstance(value, str) and _HIDDEN in value else value


def _keep_numbers(tree: Any, resolved: Any) -> Any:
    """``resolved`` with the numbers of ``tree``, which remember how they are written."""
    if isinstance(tree, dict):
        return {key: _keep_numbers(value, resolved[key]) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_keep_numbers(*pair) for pair in zip(tree, resolved, strict=True)]
    return tree if isinstance(tree, (WrittenInt, WrittenFloat)) else resolved
