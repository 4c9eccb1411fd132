"""YAML and dotted overrides -> a checked dataclass. Every problem is reported at once. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megastar.config.comparison import CompareConfig, SampleConfig
from megastar.config.convert import convert, shown, type_name
from megastar.config.deepspeed import deepspeed_problems
from megastar.config.env_text import EnvText, keep_expressions, recorded, resolve
from megastar.config.files import find_file, read_yaml, require_file
from megastar.config.model_sizes import unset_sizes, unset_sizes_of_base
from megastar.config.override import set_override
from megastar.config.rules.problem import Problem, divisors, words
from megastar.config.rules.token_order import set_target_position
from megastar.config.schema import RunConfig, TokenizerTrainConfig, TrainConfig
from megastar.config.validate import find_problems
from megastar.config.yaml_text import YamlError, hidden, map_values, seen
from megastar.errors import UserError
from megastar.utils.files import write_atomic

T = TypeVar("T")
AnyConfig = RunConfig | TokenizerTrainConfig | CompareConfig
NOT_IN_METHOD = ("base", "method", "run", "model", "data")  # they belong to one run


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in ``path`` (defaults without one) with ``a.b=c`` overrides, later ones winning.

    A file holds what differs. Of the values of a field, the last of these applies: the schema's default, the files
    that are named by ``method``, by a section (``model: configs/model/b.yaml``) and by ``base`` in a section
    (``model: {base: configs/model/b.yaml, dim: 512}``), the file's own fields, the overrides. The override
    ``method=FILE`` removes the file's method and, like any override, wins over the file's own fields. Named files are
    found from the working directory or a parent of the YAML file. Raises one ``UserError`` that lists every problem.
    """
    return _load_file(path, overrides, RunConfig)


def load_tokenizer_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TokenizerTrainConfig:
    """``load_config`` for ``megastar train-tokenizer``."""
    return _load_file(path, overrides, TokenizerTrainConfig)


def load_compare_config(path: str | Path | None, overrides: Sequence[str] = ()) -> CompareConfig:
    """``load_config`` for ``megastar compare``."""
    return _load_file(path, overrides, CompareConfig)


def compare_config_of(data: dict[str, Any], where: Path) -> CompareConfig:
    """The configuration that the results of a comparison record. Raises ``UserError``."""
    return _load(data, (), CompareConfig, where, None)


def override_config(cfg: RunConfig, overrides: Sequence[str], where: str) -> RunConfig:
    """``cfg`` with ``a.b=c`` overrides, checked; ``where`` begins the sentence about a problem."""
    made = _load(asdict(cfg), overrides, RunConfig, where, None)
    made.model.leave_unset(cfg.model.unset & unset_sizes({}, overrides))
    return made


def override_sample(sample: SampleConfig, overrides: Sequence[str], where: str) -> SampleConfig:
    """``sample`` of a comparison with ``sample.field=value`` overrides, checked; ``where`` begins the sentence about a problem."""
    rest = {"pictures": "-", "variants": {"a": {}}, "base": {"train": {"steps": 1}}}
    return _load(rest | {"sample": asdict(sample)}, overrides, CompareConfig, where, None).sample


def config_from_dict(data: dict[str, Any], near: Path | None = None) -> RunConfig:
    """The inverse of ``dataclasses.asdict``, checked as ``load_config`` does except for the DeepSpeed JSON.

    ``near`` is the file that ``data`` is from, if any.
    """
    data = _resolved(data, lenient=True)
    if isinstance(guided := data.get("self_guided") or {}, dict):  # saved before this field: its only reading
        data["self_guided"] = {"negatives": "micro_batch", **guided}
    return _load(data, (), RunConfig, near or "saved configuration", near, files=False)


def _load_file(path: str | Path | None, overrides: Sequence[str], schema: type[T]) -> T:
    near = None if path is None else require_file(path, "configuration")
    return _load({} if near is None else read_yaml(near), overrides, schema, path, near)


def as_run_config(config: RunConfig | str | Path | Mapping[str, Any]) -> RunConfig:
    """A checked run from a ``RunConfig``, the path of a YAML file, or a dict of its sections. Raises ``UserError``."""
    if isinstance(config, (str, Path)):
        return load_config(config)
    if isinstance(config, Mapping):
        return _load(_resolved(dict(config)), (), RunConfig, "configuration", None)
    if isinstance(config, RunConfig):
        return override_config(config, (), "configuration")
    raise UserError(f"configuration {config!r}: give a RunConfig, the path of a YAML file, or a dict of its sections")


def _resolved(data: dict[str, Any], lenient: bool = False) -> dict[str, Any]:
    try:
        return dict(resolve(data, lenient))
    except YamlError as error:
        raise UserError(f"configuration cannot be read ({error})") from error


def _load(
    data: dict[str, Any],
    overrides: Sequence[str],
    schema: type[T],
    where: str | Path | None,
    near: Path | None,
    files: bool = True,
) -> T:
    problems: list[Problem] = []
    overrides = recorded(list(overrides))  # of a comparison's file
    unset = unset_sizes_of_base(data, overrides, near) if schema is CompareConfig else unset_sizes(data, overrides)
    includes = _Includes(schema, near, problems, [text.partition("=")[0] for text in overrides])
    data = includes.expand(data, schema)
    for text in overrides:
        includes.pending.pop(0)
        set_override(data, text, schema, problems)
        data = includes.expand(data, schema, method_wins=True)

    config = OmegaConf.structured(schema)
    _fill(config, data, schema, "", _leaves(schema), problems)
    try:
        cfg = cast(T, OmegaConf.to_object(config))
    except (OmegaConfBaseException, RecursionError) as error:  # a ${...} of an override
        field, sentence = getattr(error, "full_key", None) or "a field", str(error).splitlines() or ["it is endless"]
        problems.append(Problem(f"{field}: its ${{...}} cannot be resolved ({sentence[0]})", ()))
        raise UserError(_report(str(where or "command line"), [p.text for p in problems])) from error
    _show(cfg)
    keep_expressions(cfg, config, data)
    run = cfg.base if isinstance(cfg, CompareConfig) else cfg
    if isinstance(run, RunConfig):
        set_target_position(run)
        run.model.leave_unset(unset)
    invalid = {name for problem in problems for name in problem.fields}
    problems += [p for p in find_problems(cfg) if not any(_concerns(p, b) for b in invalid)]
    if (
        files
        and isinstance(run, RunConfig)
        and not any(b.removeprefix("base.").startswith("parallel") for b in invalid)
    ):
        found = find_file(run.parallel.deepspeed, near)
        if found is not None and find_file(run.parallel.deepspeed) is None:
            run.parallel.deepspeed = str(found)  # lies beside the YAML file, far from the working directory
        problems += [Problem(text, ("parallel.deepspeed",)) for text in deepspeed_problems(run)]
    if problems:
        raise UserError(_report(str(where or "command line"), [p.text for p in problems]))
    return cfg


@dataclass
class _Includes:
    """Puts the contents of files in the place of their paths: of a section, of ``base`` in it, of a run's ``method``."""

    root: type
    near: Path | None
    problems: list[Problem]
    pending: list[str]  # names of the overrides that are still to come

    def expand(self, node: Any, schema: type, name: str = "", method_wins: bool = False) -> Any:
        """The section ``name``, of type ``schema``, with the contents of files in the place of their paths.

        Its own fields win over those of ``base`` and, unless ``method_wins``, of ``method``.
        """
        if isinstance(node, str) and name:
            return self.read(node, schema, name)
        if not isinstance(node, dict):
            return node
        hints, prefix = get_type_hints(schema), name + "." if name else ""
        node = {
            key: self.expand(value, hints[key], prefix + key, method_wins) if is_dataclass(hints.get(key)) else value
            for key, value in node.items()
        }
        if schema is RunConfig and "method" in node:
            path = node.pop("method")
            if path not in (None, "") and prefix + "method" not in self.pending:
                method = self.read(path, schema, name, "method")
                node = _merge(node, method) if method_wins else _merge(method, node)
        elif name and schema is not RunConfig and "base" in node:
            node = _merge(self.read(node.pop("base"), schema, name, "base"), node)
        return node

    def read(self, path: Any, schema: type, section: str, key: str = "") -> dict[str, Any]:
        """The fields of a file that ``section``, or ``key`` in it, names; {} and problems when one of them is wrong."""
        prefix, label = section + "." if section else "", ".".join(filter(None, (section, key)))
        is_method = key == "method"
        found: list[str] = []
        data: dict[str, Any] = {}
        if isinstance(path, str):
            bare = is_method and not {"/", "."} & set(path) and find_file(path, self.near) is None
            path = f"configs/method/{path}.yaml" if bare else path  # as star
            try:
                data = read_yaml(require_file(path, f"{label}:", self.near))
            except UserError as error:
                found = [str(error)]
        else:
            example = "method/star" if is_method else "model/b"
            found = [f"{label} = {shown(path)}: must be the path of a file, as configs/{example}.yaml"]
        for name in NOT_IN_METHOD if is_method else NOT_IN_METHOD[:1]:
            if name in data:
                kind = "a method file" if is_method else "an included file"
                found.append(f"{path}: {name} is not allowed in {kind}: set it in the run file")
        if not found:
            inner: list[Problem] = []
            data = self.expand(data, schema, section)
            _fill(OmegaConf.structured(self.root), data, schema, prefix, _leaves(self.root), inner)
            found = [f"{path}: {problem.text}" for problem in inner]
        about = prefix + "self_guided" if is_method else section  # rules about these are not checked
        self.problems += [Problem(text, (about,)) for text in found]
        return {} if found else data


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` where both hold a field; a section without fields changes nothing."""
    merged = dict(under)
    for key, value in over.items():
        section = under.get(key)
        if isinstance(section, dict) and (value is None or isinstance(value, dict)):
            merged[key] = _merge(section, value or {})
        else:
            merged[key] = value
    return merged


def _concerns(problem: Problem, prefix: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for name in problem.fields)


def _report(where: str, texts: list[str]) -> str:
    if len(texts) == 1:
        return f"{where}: {texts[0]}"
    return f"{where}: {len(texts)} problems\n" + "\n".join(f"  - {text}" for text in texts)


def _leaves(schema: type, prefix: str = "") -> list[str]:
    """All dotted names, in the schema's order."""
    hints = get_type_hints(schema)
    out = [prefix + "method"] if schema is RunConfig else []
    for f in fields(schema):
        name = prefix + f.name
        out += _leaves(hints[f.name], name + ".") if is_dataclass(hints[f.name]) else [name]
    return out


def _fill(
    config: DictConfig, data: dict[str, Any], schema: type, prefix: str, leaves: list[str], problems: list[Problem]
) -> None:
    hints = get_type_hints(schema)
    choices = {f.name: f.metadata["choices"] for f in fields(schema) if "choices" in f.metadata}
    for key, value in data.items():
        name = f"{prefix}{key}"
        hint = hints.get(str(key))
        if hint is None:
            siblings = [*hints, "method"] if schema is RunConfig else list(hints)
            problems.append(Problem(_unknown(str(key), prefix, siblings, leaves), (name,)))
        elif is_dataclass(hint):
            if isinstance(value, dict):
                _fill(config, value, cast(type, hint), name + ".", leaves, problems)
            elif value is not None:
                problems.append(Problem(f"{name} = {shown(value)}: is a section; write {name}.field: value", (name,)))
        elif get_origin(hint) is dict:
            _fill_named(config, value, get_args(hint)[1], name, leaves, problems)
        else:
            if hint is str and key in choices:
                value = _choice(value, choices[key])
            try:
                plain = str(value).replace("${", "\\${") if isinstance(value, EnvText) else value  # already resolved
                OmegaConf.update(config, name, map_values(hidden, convert(plain, hint)))
            except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
                problems.append(Problem(f"{name} = {shown(value)}: must be {type_name(hint, value)}", (name,)))


def _show(section: Any) -> None:
    """Undo ``hidden`` in the texts of ``section``, which OmegaConf made."""
    fields_of = section if isinstance(section, dict) else vars(section)
    for name, value in list(fields_of.items()):
        if is_dataclass(value) or isinstance(value, dict):
            _show(value)
        elif isinstance(section, dict):
            section[name] = map_values(seen, value)
        elif isinstance(value, (str, list)):
            setattr(section, name, map_values(seen, value))


def _choice(value: Any, choices: Sequence[str]) -> Any:
    """The choice that a boolean, or a word for one, stands for (``off`` for ``false`` or ``no``), else the word itself."""
    word = str(value).lower()
    for same in (("on", "yes", "true"), ("off", "no", "false")):
        if word in same:
            return next((c for c in choices if c in same), word)
    return value


def _fill_named(
    config: DictConfig, value: Any, schema: type, name: str, leaves: list[str], problems: list[Problem]
) -> None:
    """Sections that the user names; an empty value means no sections."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        problems.append(Problem(f"{name} = {shown(value)}: contains sections; write {name}.NAME.field: value", (name,)))
        return
    for key, section in value.items():
        OmegaConf.select(config, name)[str(key)] = schema()
        if isinstance(section, dict):
            _fill(config, section, schema, f"{name}.{key}.", leaves, problems)
        elif section is not None:
            problems.append(
                Problem(f"{name}.{key} = {shown(section)}: is a section; write {name}.{key}.field: value", ())
            )


def _unknown(key: str, prefix: str, siblings: list[str], leaves: list[str]) -> str:
    """Suggest the same field of another section, else the nearest name in this section, else the nearest in any."""
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


def resolve_batch(train: TrainConfig, tensor_parallel: int, world_size: int) -> tuple[int, int]:
    """(images per rank and forward pass, forward passes per optimizer step) on ``world_size`` ranks.

    Raises ``UserError`` when the world size does not divide the batch, naming values that would.
    """
    tp, batch, micro = tensor_parallel, train.global_batch, train.micro_batch
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
            f"train.micro_batch {micro} does not divide the {per_rank} images per rank of train.global_batch {batch} "
            f"on {whose}: set train.micro_batch to {words(divisors(per_rank))}"
        )
    return micro, per_rank // micro


def config_yaml(cfg: AnyConfig) -> str:
    """Every field, so that the text means the same under later defaults; environment variables as expressions."""
    tree = recorded(asdict(cfg))
    try:
        return OmegaConf.to_yaml(OmegaConf.create(tree))
    except UnicodeEncodeError:  # a path that is not UTF-8: libyaml does not escape it
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def save_config(cfg: AnyConfig, path: str | Path) -> None:
    """Write ``config_yaml`` atomically; parent folders are created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), config_yaml(cfg).encode())


def diff_configs(a: Any, b: Any, ignore: Collection[str] = ()) -> list[str]:
    """Dotted fields that differ, each with both values: ``optim.lr: 0.0001 -> 0.0002``.

    ``ignore`` contains fields (``train.log_every``) or sections (``data``) that may differ.
    """
    one, other = flatten(asdict(a)), flatten(asdict(b))
    return [
        f"{name}: {recorded(one.get(name))} -> {recorded(other.get(name))}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name) and not any(name == i or name.startswith(i + ".") for i in ignore)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}"""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out
