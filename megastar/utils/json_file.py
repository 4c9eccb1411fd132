"""JSON that this process did not write: bounded in size and depth, and compared with a schema once, where it is read.

Schemas are pydantic's core schemas, used without pydantic itself, whose import takes as long as `megastar status`.
Numbers are strict: neither a string nor a boolean is one. Fields that a schema does not name are kept: a newer megastar
may have written them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import SchemaValidator, ValidationError, from_json
from pydantic_core import core_schema as core

from megastar.errors import UserError
from megastar.utils.files import read_regular

Schema = core.CoreSchema
MAX_BYTES = 64 << 20  # of a JSON file: the manifest of a checkpoint of 100,000 ranks has 20 MB
MAX_CONTAINERS = 4_000_000  # lists and objects, each of which takes 60 bytes or more in memory
MAX_INT = 2**53  # other programs cannot represent larger integers exactly
SHA256 = core.str_schema(strict=True, pattern="^[0-9a-f]{64}$")
# The name of a file in a folder, and the dotted name of a weight.
FILE_NAME = core.str_schema(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")
WEIGHT_NAME = core.str_schema(strict=True, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=200)
FLOAT = core.float_schema(strict=True)
BOOL = core.bool_schema(strict=True)
ANY = core.any_schema()


def integer(low: int = 0, high: int = MAX_INT) -> Schema:
    return core.int_schema(strict=True, ge=low, le=high)


def text(most: int = 1 << 20) -> Schema:
    return core.str_schema(strict=True, max_length=most)


def one_of(*values: str) -> Schema:
    return core.literal_schema(list(values))


def optional(schema: Schema) -> Schema:
    """``schema`` or null."""
    return core.nullable_schema(schema)


def list_of(schema: Schema, low: int = 0, high: int = 1_000_000) -> Schema:
    return core.list_schema(schema, min_length=low, max_length=high, strict=True)


def dict_of(keys: Schema, values: Schema) -> Schema:
    return core.dict_schema(keys, values, max_length=1_000_000, strict=True)


def record(required: Mapping[str, Schema], others: Mapping[str, Schema] | None = None, closed: bool = False) -> Schema:
    """An object with the ``required`` fields and optionally ``others``; ``closed``: no further fields."""
    fields = {name: core.typed_dict_field(schema) for name, schema in required.items()}
    fields |= {name: core.typed_dict_field(schema, required=False) for name, schema in (others or {}).items()}
    return core.typed_dict_schema(fields, extra_behavior="forbid" if closed else "allow", strict=True)


def validator(schema: Schema) -> SchemaValidator:
    return SchemaValidator(schema)


def parse_json(data: bytes | str, where: object, schema: SchemaValidator | None = None, remedy: str = "") -> Any:
    """The content of ``data``. Raises a ``UserError`` that names its origin ``where`` and the invalid field."""
    end = f": {remedy}" if remedy else ""
    opened = data.count(b"[") + data.count(b"{") if isinstance(data, bytes) else data.count("[") + data.count("{")
    if len(data) > MAX_BYTES or opened > MAX_CONTAINERS:
        raise UserError(f"{where} is too large for JSON ({len(data)} bytes, {opened} lists and objects){end}")
    try:
        content = from_json(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: it is not JSON ({error}){end}") from error
    return content if schema is None else check(content, where, schema, remedy)


def check(content: Any, where: object, schema: SchemaValidator, remedy: str = "") -> Any:
    """``content`` if it fits ``schema``; raises a ``UserError`` about the first field that does not."""
    try:
        schema.validate_python(content)
    except ValidationError as error:
        raise UserError(f"{where} is damaged: {describe(error)}" + (f": {remedy}" if remedy else "")) from None
    return content


def read_json(path: Path, schema: SchemaValidator | None = None, remedy: str = "", most: int = MAX_BYTES) -> Any:
    """The content of a regular file of at most ``most`` bytes. Raises ``UserError``."""
    return parse_json(read_regular(path, most), path, schema, remedy)


def describe(error: ValidationError) -> str:
    """ "mesh.tensor is '2' (input should be a valid integer)" of the first problem."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = shown(dotted(first["loc"])) or "the content"
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].replace("Input should", "it should")
    return f"{field} is {shown(first['input'])} ({message[:200]})"


def dotted(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc if part != "[key]")


def shown(value: Any, most: int = 80) -> str:
    """An untrusted value for a message: on one line, printable, shortened."""
    if isinstance(value, (dict, list)):
        return f"a{'n object' if isinstance(value, dict) else ' list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    plain = str(value) if not isinstance(value, str) or value.isprintable() else repr(value)
    return plain if len(plain) <= most else f"{plain[:most]}..."
