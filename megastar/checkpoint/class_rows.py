"""Which row of a class table each class of a new run starts from: by a YAML file, or by the names of the classes."""

from __future__ import annotations

from megastar.config.convert import shown
from megastar.config.files import read_yaml, require_file
from megastar.errors import UserError, nearest


def read_class_map(
    file: str, new: int, new_names: list[str] | None, old: int, old_names: list[str] | None
) -> list[int | None]:
    """The old class of each of the ``new`` classes according to ``file``; None for a new embedding.

    The file maps each new class to an old one, or to null: ``cat: tiger``, ``0: 281``. A class is given by its name or,
    where no class has that name, by its number. Raises ``UserError`` for classes that do not exist and for a missing one.
    """
    path = require_file(file, "train.init_class_map:")
    rows: dict[int, int | None] = {}
    for key, value in read_yaml(path).items():
        place = _number(f"{path}: the new class", key, new, new_names)
        if place in rows:
            raise UserError(f"{path}: the new class {shown(key)} occurs twice, by name and by number: remove one")
        rows[place] = None if value is None else _number(f"{path}: {shown(key)}: the old class", value, old, old_names)
    if missing := [i for i in range(new) if i not in rows]:
        names = ", ".join(new_names[i] if new_names else str(i) for i in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{path} lacks the classes {names}{more}: map each to an old class, or to null for a new embedding"
        )
    return [rows[i] for i in range(new)]


def match_classes(init: str, new_names: list[str], old_names: list[str] | None) -> list[int | None]:
    """The old class with the name of each new one, else None. Raises ``UserError`` without any match."""
    if old_names is None:
        raise UserError(
            f"train.init_classes = map: {init} records no class names: give train.init_class_map, a YAML file of new class: "
            "old class"
        )
    number = {name: i for i, name in enumerate(old_names)}
    found = [number.get(name) for name in new_names]
    if all(row is None for row in found):
        raise UserError(
            f"train.init_classes = map: no class of the shards has a name of {init} ({', '.join(old_names[:3])}, ...): give "
            "train.init_class_map, or set init_classes=fresh"
        )
    return found


def _number(what: str, given: object, count: int, names: list[str] | None) -> int:
    text = given.text if hasattr(given, "text") else str(given).lower() if isinstance(given, bool) else given
    if not isinstance(text, str):
        raise UserError(f"{what} {shown(given)} is neither a name nor a number: write new class: old class")
    if names and text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and len(text) < 10:
        if int(text) < count:
            return int(text)
        raise UserError(f"{what} {text} is outside 0..{count - 1}")
    known = nearest(text, names) if names and len(names) <= 1000 else f"give a number from 0 to {count - 1}"
    raise UserError(f"{what} {shown(text)} does not exist: {known}")
