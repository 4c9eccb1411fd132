"""Configurations that are damaged or hostile: one sentence each, with the file and where it is known the line."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from megastar.config.comparison import CompareConfig
from megastar.config.load import (
    config_from_dict,
    config_yaml,
    load_compare_config,
    load_config,
    load_tokenizer_config,
    save_config,
)
from megastar.config.override import parse_as
from megastar.config.schema import RunConfig, TokenizerTrainConfig
from megastar.errors import UserError

BASE = "data: {shards: x}\ntrain: {steps: 5}\n"
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
REFERENCES = "a0: xxx\n" + "".join(f"a{i}: {('${a' + str(i - 1) + '}') * 9}\n" for i in range(1, 12))


def refusal(text: str | bytes, folder: Path) -> str:
    file = folder / "run.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        load_config(file, ["data.shards=x"])
    assert time.process_time() - started < 10
    return str(caught.value).removeprefix(f"{file}").lstrip(": ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: !!python/object/apply:os.system [touch x]", "line 1 cannot be read (the tag !!python/object/apply:os.system is not allowed"),
        ("a: 1\nrun: !x y", "line 2 cannot be read (the tag !x is not allowed: write a plain value)"),
        ("run: !!binary aGVsbG8=", "the tag !!binary is not allowed"),
        (ALIASES, "cannot be read (it has more than 10000 values"),
        (REFERENCES, "cannot be read (its ${...} refer to themselves or to too many values)"),
        ("run: ${run}", "its ${...} refer to themselves"),
        ("run: &a [*a]", "it has more than 32 levels"),
        ("run: " + "[" * 5000 + "]" * 5000, "it has more than 32 levels"),
        ("".join(" " * i + "a:\n" for i in range(1200)), "line 33 cannot be read (it has more than 32 levels)"),
        ("run: [" + "x," * 30_000 + "]", "it has more than 10000 values"),
        ("x" * (2 << 20), "more than the limit of 1048576 for this file"),
        ("run: a\nrun: b", "line 2 is not YAML (the key run occurs twice)"),
        ("run: x\n\tdata: 5", "line 2 is not YAML (found character '\\t' that cannot start any token)"),
        (b"run: a\0b", "line 1 is not YAML (the character '\\x00' is not allowed)"),
        ('run: "a\\0b"', "run = 'a\\x00b': must be a string of at most 4000 characters without NUL"),
        ("run: a".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"a: 1\nrun: \xe9", "line 2 is not UTF-8 text: save it as UTF-8"),
        ("5", "contains a single value instead of sections of `field: value`"),
        ("? [a]\n: b", "line 1 cannot be read (a list or a mapping is used as a key)"),
        ("train: {steps: " + "9" * 5000 + "}", "(5002 characters): must be an integer"),
        ("train: {steps: true}", "train.steps = True: must be an integer"),
        ("optim: {lr: yes}", "optim.lr = 'yes': must be a number"),
        ("optim: {lr: .inf}", "optim.lr = inf: must be a finite number"),
    ],
)  # fmt: skip
def test_a_damaged_file_gets_one_sentence(tmp_path, text, message):
    found = refusal(text, tmp_path)
    assert message in found and "\n" not in found and len(found) < 400


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="is a device or pipe: name a file"):
            load_config(path)
        with pytest.raises(UserError, match="is a device or pipe: name a file"):
            load_config(None, ["data.shards=x", "train.steps=5", f"model={path}"])
    for path in ("a\0b", "a" * 5000):
        with pytest.raises(UserError, match="cannot be the path of a file"):
            load_config(path)


@pytest.mark.parametrize("written", ["2024_01_01", "007", "1e-4", "on", "12:30:00", "0x10", "3.10", "run #2", "a/{b}", "12", "runs/lr=1e-4", "???"])  # fmt: skip
def test_a_string_is_what_was_written(tmp_path, written):
    assert load_config(None, ["data.shards=x", "train.steps=5", f"run={written}"]).run == written
    (tmp_path / "run.yaml").write_text(BASE + (f'run: "{written}"' if "#" in written else f"run: {written}"))
    assert load_config(tmp_path / "run.yaml").run == written


@pytest.mark.parametrize("typed", ["null", "~", "yes", "no", "True", "FALSE", "#2", "a: b", "a:", "{a: 1}", "[a]", "[1", "- a", "*a", "&a", "@a", "%a", "`a", "| a", "? a", ", a", "---", "...", "'a' b", "a 'b'", "'x", "!!str 3", "a\tb", "'", '"', "=", "<<", "???"])  # fmt: skip
def test_text_of_an_override_is_taken_as_typed(tmp_path, typed):
    """Also where a file would need quotes, and the saved configuration loads as the same text."""
    cfg = load_config(None, ["data.shards=x", "train.steps=5", f"run={typed}", f"train.init= {typed} "])
    assert (cfg.run, cfg.train.init) == (typed, typed)
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").run == typed


def test_text_that_means_a_missing_value_in_omegaconf_is_text(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "???")
    (tmp_path / "run.yaml").write_text("run: ???\ndata: {shards: '${run}/a', val_shards: '${oc.env:PLACE}'}\n")
    for cfg in (
        load_config(tmp_path / "run.yaml", ["train.init=${data.val_shards}/b"]),
        load_config(None, ["run=???", "data.shards=${run}/a", "data.val_shards=${oc.env:PLACE}", "train.init=???/b"]),
    ):
        assert (cfg.run, cfg.data.shards, cfg.data.val_shards, cfg.train.init) == ("???", "???/a", "???", "???/b")
        assert "val_shards: ${oc.env:PLACE}" in config_yaml(cfg)
        assert config_from_dict(asdict(cfg)) == cfg
    with pytest.raises(UserError, match=r"train.steps = '\?\?\?': must be an integer"):
        load_config(None, ["data.shards=x", "train.steps=???"])


@pytest.mark.parametrize(("typed", "text"), [('"a b"', "a b"), ("'it''s'", "it's"), ('"007"', "007"), ("''", ""), ("", ""), ("  ", "")])  # fmt: skip
def test_quotes_around_a_whole_value_are_removed(typed, text):
    assert load_config(None, ["data.shards=x", "train.steps=5", f"train.init={typed}"]).train.init == text


def test_lists_of_text_and_files_are_taken_as_typed(tmp_path, monkeypatch):
    texts = parse_as(list[str], "[007, null, 2024_01_01, yes, 'a, b', 1e-4]")
    assert texts == ["007", "null", "2024_01_01", "yes", "a, b", "1e-4"]
    overrides = ["pictures=p", "variants.a.label=007", "variants.a.overrides=[train.init=007]"]
    cfg = load_compare_config("configs/run/compare_emoji.yaml", overrides)
    assert cfg.variants["a"].label == "007" and cfg.variants["a"].overrides == ["train.init=007"]
    listed = load_compare_config("configs/run/compare_emoji.yaml", ['variants.a.overrides=["???"]'])
    assert listed.variants["a"].overrides == ["???"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1e3").write_text("n_layer: 7\n")
    assert load_config(None, ["data.shards=x", "train.steps=5", "model=1e3"]).model.n_layer == 7
    assert load_config(None, ["data.shards=x", "train.steps=5", "model=null", "method="]).model.n_layer == RunConfig().model.n_layer  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=!!python/name:os.system", "cannot be read (the tag !!python/name:os.system is not allowed"),
        ("train.steps=[1", "cannot be read (expected ',' or ']'"),
        ("train.steps={a: b}", "train.steps = {'a': 'b'}: must be an integer"),
        ("model={name: [x]}", "model.name = ['x']: must be a string"),
        ("model=!!python/name:os.system", "model: !!python/name:os.system does not exist"),
        ("train.steps=" + "[" * 3000, "(3014 characters) cannot be read (it has more than 32 levels)"),
        ("run=${x}", "run: its ${...} cannot be resolved (Interpolation key 'x' not found)"),
        ("run=${", "must be a value in which each ${ has a matching }"),
        ("train.steps=${train.steps}", "cannot be resolved"),
        ("run=a\x1b[31m", "override 'run=a\\x1b[31m' cannot be read (the character '\\x1b' is not allowed)"),
        ("train.steps=1e400", "train.steps = 1e400: must be an integer"),
        ("train.steps=1.5", "train.steps = 1.5: must be an integer"),
        ("train.deterministic=5", "train.deterministic = 5: must be true or false"),
        ("optim.lr=-0.0", "optim.lr = 0.0: must be above 0"),
        ("parallel.deepspeed=/dev/zero", "/dev/zero is a device or pipe"),
    ],
)
def test_a_damaged_override_gets_one_sentence(override, message):
    with pytest.raises(UserError) as caught:
        load_config(None, ["data.shards=x", "train.steps=5", override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def numbers(schema: type, prefix: str = "") -> list[tuple[str, bool, Mapping[str, Any]]]:
    """(dotted name, whether a list, metadata) of every numeric field, also of lists of numbers."""
    found = []
    for f in fields(schema):
        hint = get_type_hints(schema)[f.name]
        if is_dataclass(hint):
            found += numbers(hint, f"{prefix}{f.name}.")
        elif get_origin(hint) is dict:
            found += numbers(get_args(hint)[1], f"{prefix}{f.name}.v.")
        elif (get_args(hint) or (hint,))[0] in (int, float) and "choices" not in f.metadata:
            found.append((prefix + f.name, get_origin(hint) is list, f.metadata))
    return found


@pytest.mark.parametrize(
    ("schema", "load"),
    [(RunConfig, load_config), (TokenizerTrainConfig, load_tokenizer_config), (CompareConfig, load_compare_config)],
)
def test_every_number_has_bounds(schema, load):
    known = numbers(schema)
    for name, _, bounds in known:
        assert {"low", "above"} & bounds.keys() and {"high", "below"} & bounds.keys(), f"{name} lacks a bound"
    for value in ("1e31", "-1e31", "nan", "inf", "true", "9" * 35):
        with pytest.raises(UserError) as caught:
            load(None, [f"{name}={f'[{value}]' if is_list else value}" for name, is_list, _ in known])
        for name, _, _ in known:
            assert f"  - {name} = " in str(caught.value), (name, value)


def test_random_damage_is_refused_or_read(tmp_path):
    """Bytes changed, cut, doubled or inserted in a whole configuration: never another exception, never a hang."""
    whole = config_yaml(load_config(None, ["data.shards=x", "train.steps=5"])).encode()
    rng = random.Random("configs")
    pieces = [
        b"\0",
        b"\xff",
        b"\t",
        b"&a ",
        b"*a",
        b"!!",
        b"[",
        b"{",
        b"- ",
        b": ",
        b"${",
        b"}",
        b"|\n",
        b'"',
        b"'",
        b"%",
        b"<<: ",
        b"1e999",
    ]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            how = rng.randrange(4)
            if how == 0:
                data[at] = rng.randrange(256)
            elif how == 1:
                data[at:at] = rng.choice(pieces)
            elif how == 2:
                del data[at : at + rng.randrange(60)]
            else:
                data[at:at] = data[at : at + rng.randrange(200)]
        file = tmp_path / "run.yaml"
        file.write_bytes(bytes(data))
        try:
            load_config(file)
            outcomes["read"] += 1
        except UserError as error:
            assert str(file) in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 30, outcomes
