"""YAML and dotted overrides -> a checked dataclass. Every problem is reported at once. No torch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megastar.config.comparison import CompareConfig
from megastar.config.deepspeed import deepspeed_problems
from megastar.config.files import find_file, read_yaml, require_file
from megastar.config.schema import RunConfig, TokenizerTrainConfig
from megastar.config.validate import Problem, divisors, find_problems, words
from megastar.errors import UserError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in ``path`` (defaults without one) with ``a.b=c`` overrides, later ones winning.

    A section that is a string (``model: configs/model/b.yaml``) is read from that file, found from the working
    directory or a parent of the YAML file. Raises one ``UserError`` that lists every problem.
    """
    near = None if path is None else require_file(path, "configuration")
    return cast(RunConfig, _load({} if near is None else read_yaml(near), overrides, RunConfig, path, near))


def load_tokenizer_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TokenizerTrainConfig:
    """``load_config`` for ``megastar train-tokenizer``."""
    near = None if path is None else require_file(path, "configuration")
    data = {} if near is None else read_yaml(near)
    return cast(TokenizerTrainConfig, _load(data, overrides, TokenizerTrainConfig, path, near))


def load_compare_config(path: str | Path | None, overrides: Sequence[str] = ()) -> CompareConfig:
    """``load_config`` for ``megastar compare``."""
    near = None if path is None else require_file(path, "configuration")
    return cast(CompareConfig, _load({} if near is None else read_yaml(near), overrides, CompareConfig, path, near))


def override_config(cfg: RunConfig, overrides: Sequence[str], where: str) -> RunConfig:
    """``cfg`` with ``a.b=c`` overrides, checked; ``where`` begins the sentence about a problem."""
    return cast(RunConfig, _load(asdict(cfg), overrides, RunConfig, where, None))


def config_from_dict(data: dict[str, Any]) -> RunConfig:
    """The inverse of ``dataclasses.asdict``, checked as ``load_config`` does but for files on this machine."""
    return cast(RunConfig, _load(data, (), RunConfig, "saved configuration", None, files=False))


def as_run_config(config: RunConfig | str | Path | Mapping[str, Any]) -> RunConfig:
    """A checked run from a ``RunConfig``, the path of a YAML file, or a dict of its sections. Raises ``UserError``."""
    if isinstance(config, (str, Path)):
        return load_config(config)
    if isinstance(config, Mapping):
        return cast(RunConfig, _load(deepcopy(dict(config)), (), RunConfig, "configuration", None))
    if isinstance(config, RunConfig):
        return override_config(config, (), "configuration")
    raise UserError(f"configuration {config!r}: give a RunConfig, the path of a YAML file, or a dict of its sections")


def _load(
    data: dict[str, Any],
    overrides: Sequence[str],
    schema: type,
    where: str | Path | None,
    near: Path | None,
    files: bool = True,
) -> Any:
    problems: list[Problem] = []
    sections = _sections(schema)
    _read_sections(data, sections, near, problems)
    for text in overrides:
        _override(data, text, problems)
        _read_sections(data, sections, near, problems)

    config = OmegaConf.structured(schema)
    _fill(config, data, schema, "", _leaves(schema), problems)
    cfg = OmegaConf.to_object(config)
    broken = {name for problem in problems for name in problem.about}
    problems += [p for p in find_problems(cfg) if not any(_touches(p, b) for b in broken)]
    run = cfg.base if isinstance(cfg, CompareConfig) else cfg
    if files and isinstance(run, RunConfig) and not any(b.removeprefix("base.").startswith("parallel") for b in broken):
        found = find_file(run.parallel.deepspeed, near)
        if found is not None and find_file(run.parallel.deepspeed) is None:
            run.parallel.deepspeed = str(found)  # lies beside the YAML file, far from the working directory
        problems += [Problem(text, ("parallel.deepspeed",)) for text in deepspeed_problems(run)]
    if problems:
        raise UserError(_report(str(where or "command line"), [p.text for p in problems]))
    return cfg


def _touches(problem: Problem, broken: str) -> bool:
    return any(name == broken or name.startswith(broken + ".") for name in problem.about)


def _report(where: str, texts: list[str]) -> str:
    if len(texts) == 1:
        return f"{where}: {texts[0]}"
    return f"{where}: {len(texts)} problems\n" + "\n".join(f"  - {text}" for text in texts)


def _sections(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all sections, outer ones first."""
    inner = {prefix + name: hint for name, hint in get_type_hints(schema).items() if is_dataclass(hint)}
    return [*inner, *(more for name, hint in inner.items() for more in _sections(cast(type, hint), name + "."))]


def _read_sections(data: dict[str, Any], sections: Sequence[str], near: Path | None, problems: list[Problem]) -> None:
    """Put the contents of a file in the place of its path, wherever a section is a text."""
    for name in sections:
        *parents, last = name.split(".")
        node: Any = data
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(last), str):
            try:
                node[last] = read_yaml(require_file(node[last], f"{name}:", near))
            except UserError as error:
                problems.append(Problem(str(error), (name,)))
                node[last] = {}


def _override(data: dict[str, Any], text: str, problems: list[Problem]) -> None:
    name, equals, _ = text.partition("=")
    if not equals or not name or not all(name.split(".")):
        problems.append(Problem(f"override {text!r} is not of the form section.field=value", ()))
        return
    try:
        value = OmegaConf.select(OmegaConf.from_dotlist([text]), name)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, ValueError) as error:
        problems.append(Problem(f"override {text!r} cannot be read ({str(error).splitlines()[0]})", (name,)))
        return
    *parents, last = name.split(".")
    node = data
    for parent in parents:
        inner = node.get(parent)
        node[parent] = node = inner if isinstance(inner, dict) else {}
    node[last] = value


def _leaves(schema: type, prefix: str = "") -> list[str]:
    """All dotted names, in the schema's order."""
    hints = get_type_hints(schema)
    out: list[str] = []
    for f in fields(schema):
        name = prefix + f.name
        out += _leaves(hints[f.name], name + ".") if is_dataclass(hints[f.name]) else [name]
    return out


def _fill(
    config: DictConfig, data: dict[str, Any], schema: type, prefix: str, leaves: list[str], problems: list[Problem]
) -> None:
    hints = get_type_hints(schema)
    for key, value in data.items():
        name = f"{prefix}{key}"
        hint = hints.get(str(key))
        if hint is None:
            problems.append(Problem(_unknown(str(key), prefix, list(hints), leaves), (name,)))
        elif is_dataclass(hint):
            if isinstance(value, dict):
                _fill(config, value, cast(type, hint), name + ".", leaves, problems)
            elif value is not None:
                problems.append(Problem(f"{name} = {value!r}: is a section, write {name}.field: value", (name,)))
        elif get_origin(hint) is dict:
            _fill_named(config, value, get_args(hint)[1], name, leaves, problems)
        else:
            if hint is str and value is None:
                value = ""  # an empty value, `data.val_shards=`, turns a file off
            if hint is int and isinstance(value, float) and value.is_integer():
                value = int(value)  # 1e4 is a float in YAML
            if hint is str and value is None:
                value = ""  # `data.val_shards=`
            try:
                OmegaConf.update(config, name, value)
            except (OmegaConfBaseException, ValueError, TypeError):
                problems.append(Problem(f"{name} = {value!r}: must be {_type_name(hint)}", (name,)))


def _fill_named(
    config: DictConfig, value: Any, schema: type, name: str, leaves: list[str], problems: list[Problem]
) -> None:
    """Sections that the user names; an empty value is none."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        problems.append(Problem(f"{name} = {value!r}: holds sections, write {name}.NAME.field: value", (name,)))
        return
    for key, section in value.items():
        OmegaConf.select(config, name)[str(key)] = schema()
        if isinstance(section, dict):
            _fill(config, section, schema, f"{name}.{key}.", leaves, problems)
        elif section is not None:
            problems.append(Problem(f"{name}.{key} = {section!r}: is a section, write {name}.{key}.field: value", ()))


def _unknown(key: str, prefix: str, siblings: list[str], leaves: list[str]) -> str:
    """Names the same field of another section, else the nearest name here, else the nearest anywhere."""
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(leaves)}
    near = difflib.get_close_matches(key, siblings, 1, 0.6)
    far = difflib.get_close_matches(key, by_leaf, 1, 0.6)
    if key in by_leaf:
        hint = f"did you mean {by_leaf[key]}?"
    elif near:
        hint = f"did you mean {prefix}{near[0]}?"
    elif far:
        hint = f"did you mean {by_leaf[far[0]]}?"
    else:
        hint = f"the fields here are {', '.join(siblings)}"
    return f"unknown key {prefix}{key}: {hint}"


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    if get_origin(hint) is list:
        return f"a list of which each is {names[get_args(hint)[0]]}"
    return names[hint]


def resolve_batch(cfg: RunConfig, world_size: int) -> tuple[int, int]:
    """(images a rank and forward pass, forward passes an optimizer step) on ``world_size`` ranks.

    Raises ``UserError`` when the world size does not divide the batch, naming what would.
    """
    tp, batch, micro = cfg.parallel.tensor_parallel, cfg.train.global_batch, cfg.train.micro_batch
    if world_size % tp:
        raise UserError(
            f"world size {world_size} is not a multiple of parallel.tensor_parallel {tp}: "
            f"start {words([tp, 2 * tp, 4 * tp])} processes, or change it"
        )
    ranks = world_size // tp
    whose = f"world size {world_size}" + (f" / tensor_parallel {tp} = {ranks} data ranks" if tp > 1 else "")
    if batch % ranks:
        below = batch // ranks * ranks
        around = [b for b in (below, below + ranks) if b > 0]
        raise UserError(
            f"{whose} does not divide train.global_batch {batch}: start {words([d * tp for d in divisors(batch)])} "
            f"processes, or set train.global_batch to {words(around)}"
        )
    per_rank = batch // ranks
    micro = micro or per_rank
    if per_rank % micro:
        raise UserError(
            f"train.micro_batch {micro} does not divide the {per_rank} images a rank has of train.global_batch {batch} "
            f"on {whose}: set train.micro_batch to {words(divisors(per_rank))}"
        )
    return micro, per_rank // micro


def save_config(cfg: RunConfig | TokenizerTrainConfig | CompareConfig, path: str | Path) -> None:
    """Write every field, so that the file means the same under later defaults; atomic."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as f:
        f.write(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def diff_configs(a: Any, b: Any, ignore: Collection[str] = ()) -> list[str]:
    """Dotted fields that differ, each with both values: ``optim.lr: 0.0001 -> 0.0002``.

    ``ignore`` holds fields (``train.log_every``) or sections (``data``) that may differ.
    """
    one, other = _flat(asdict(a)), _flat(asdict(b))
    return [
        f"{name}: {one.get(name)} -> {other.get(name)}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name) and not any(name == i or name.startswith(i + ".") for i in ignore)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
