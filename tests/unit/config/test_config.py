"""Loading, checking, saving and comparing configurations."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from megastar.config.help import fields_text, rows
from megastar.config.load import (
    _choice,
    config_from_dict,
    diff_configs,
    load_config,
    load_tokenizer_config,
    resolve_batch,
    save_config,
)
from megastar.config.schema import RunConfig, TokenizerTrainConfig
from megastar.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
BASE = "model: configs/model/nano.yaml\ndata: {shards: codes}\nself_guided: {contrastive_block: 3}\ntrain: {global_batch: 64}\n"


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def failure(path, *overrides, load=load_config) -> str:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value)


# Loading -----------------------------------------------------------------------------------------------------------
def test_file_model_path_and_overrides_in_order(base):
    cfg = load_config(base, ["optim.lr=5e-4", "train.steps=1e3"])
    assert (cfg.model.name, cfg.model.vocab_size, cfg.data.shards) == ("nano", 2048, "codes")
    assert cfg.optim.lr == 5e-4
    assert cfg.train.steps == 1000 and isinstance(cfg.train.steps, int)
    assert cfg.optim.beta2 == 0.95  # a default stays
    cfg = load_config(base, ["model=configs/model/b.yaml", "model.n_layer=6"])
    assert (cfg.model.dim, cfg.model.n_layer) == (768, 6)
    cfg = load_config(base, ["model.n_layer=6", "model=configs/model/b.yaml"])
    assert cfg.model.n_layer == 12  # the later one wins


def test_model_mapping_and_file_beside_the_yaml(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    (project / "nets").mkdir()
    (project / "nets" / "tiny.yaml").write_text("name: tiny\nn_layer: 2\nn_head: 2\ndim: 16\n")
    run = project / "runs" / "a.yaml"
    run.write_text("model: nets/tiny.yaml\ndata: {shards: x}\nself_guided: {contrastive_block: 2}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(run).model.name == "tiny"
    run.write_text("model: {name: own, n_layer: 6}\ndata: {shards: x}\n")
    assert load_config(run).model.name == "own"


def test_environment_variables_resolve(base, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    base.write_text(BASE + "run: ${oc.env:SCRATCH}/run\n")
    assert load_config(base).run == "/scratch/me/run"


def test_round_trip_and_difference(base, tmp_path):
    cfg = load_config(base, ["optim.lr=0.002"])
    save_config(cfg, tmp_path / "deep" / "config.yaml")
    again = load_config(tmp_path / "deep" / "config.yaml")
    assert again == cfg and diff_configs(cfg, again) == []
    assert config_from_dict(dataclasses.asdict(cfg)) == cfg
    other = load_config(base, ["optim.lr=0.004", "train.log_every=3", "data.shards=elsewhere"])
    assert diff_configs(cfg, other) == [
        "data.shards: codes -> elsewhere",
        "optim.lr: 0.002 -> 0.004",
        "train.log_every: 10 -> 3",
    ]
    assert diff_configs(cfg, other, ignore=("data", "train.log_every")) == ["optim.lr: 0.002 -> 0.004"]
    assert not list((tmp_path / "deep").glob("*.tmp"))


def test_saved_configuration_of_other_fields_is_refused(base):
    data = dataclasses.asdict(load_config(base))
    data["train"]["stepz"] = 3
    with pytest.raises(UserError, match=r"saved configuration: unknown key train.stepz: did you mean train.steps\?"):
        config_from_dict(data)


# Every problem at once ---------------------------------------------------------------------------------------------
def test_all_problems_are_reported_together(base):
    text = failure(
        base, "trian.steps=1", "train.steps=abc", "model.n_head=7", "optim.schedule=cosin", "self_guided.views=1"
    )
    head, *lines = text.splitlines()
    assert head == f"{base}: 6 problems"
    assert lines == [
        "  - train.steps = 'abc': must be an integer",
        "  - unknown key trian: did you mean train?",
        "  - optim.schedule = cosin: must be constant, cosine or linear",
        "  - model.n_head = 7: must divide model.dim 256; use 1, 2, 4 or 8",
        "  - self_guided.views = 1: the view loss compares two crops; set views to 2, or view_loss to false",
        "  - self_guided.student_views = 2: must be at most self_guided.views 1",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1", "unknown key train.lr: did you mean optim.lr?"),
        ("optim.betta1=1", "unknown key optim.betta1: did you mean optim.beta1?"),
        ("train.zzzz=1", "unknown key train.zzzz: the fields here are global_batch, micro_batch, steps,"),
        ("steps", "override 'steps' is not of the form section.field=value"),
        ("=5", "override '=5' is not of the form section.field=value"),
        ("data=5", "data = 5: is a section; write data.field: value"),
        ("model=5", "model = 5: is a section; write model.field: value"),
        ("train.steps=1.5", "train.steps = 1.5: must be an integer"),
        ("self_guided.enabled=perhaps", "self_guided.enabled = 'perhaps': must be true or false"),
        ("optim.lr=fast", "optim.lr = 'fast': must be a number"),
        ("optim.lr=nan", "optim.lr = nan: must be a finite number"),
        ("run=", "run is empty: name the run folder"),
        ("train.steps=", "train.steps = None: must be an integer"),
        ("data.shards=''", "data.shards is empty: name a folder of token shards (megastar pretokenize makes it)"),
        ("data.shards=s3:///a", "data.shards = s3:///a: must be a folder or have the form s3://bucket/prefix"),
        (
            "data.val_shards=gs://b/a",
            "data.val_shards = gs://b/a: must be a folder or have the form s3://bucket/prefix",
        ),
        ("data.cache=s3://b/a", "data.cache = s3://b/a: must be a local folder"),
        ("data.cache_gib=0", "data.cache_gib = 0.0: must be above 0"),
        ("data.patience=-1", "data.patience = -1.0: must be at least 0"),
        (
            "model=configs/model/bb.yaml",
            "model: configs/model/bb.yaml does not exist: did you mean configs/model/b.yaml?",
        ),
        ("train.dtype=fp16", "train.dtype = fp16: must be bf16, fp32 or auto"),
        ("train.global_batch=0", "train.global_batch = 0: must be at least 1"),
        ("self_guided.mask_ratio=1", "self_guided.mask_ratio = 1.0: must be below 1"),
        ("self_guided.mask_ratio=-0.1", "self_guided.mask_ratio = -0.1: must be at least 0"),
        ("self_guided.temperature=0", "self_guided.temperature = 0.0: must be above 0"),
        ("model.class_dropout_prob=2", "model.class_dropout_prob = 2.0: must be at most 1"),
        ("model.n_head=128", "model.dim / model.n_head = 256 / 128 = 2: must be a multiple of 4 (2-D rotary pairs)"),
        ("model.image_tokens=70", "model.image_tokens = 70: must be a square number, as 64 or 81"),
        (
            "parallel.tensor_parallel=3",
            "parallel.tensor_parallel = 3: must divide model.n_head 4, the ffn width 768 and model.vocab_size 2048; "
            "use 1, 2 or 4",
        ),
        ("self_guided.student_views=3", "self_guided.student_views = 3: must be 1 or 2"),
        (
            "self_guided.contrastive_block=7",
            "self_guided.contrastive_block = 7: must be at most model.n_layer 6",
        ),
        (
            "self_guided.positions=1",
            "self_guided.positions = 1: the step loss compares two positions; "
            "set positions to 2 or more, or step_loss to false",
        ),
        (
            "self_guided.positions=65",
            "self_guided.positions = 65: must be at most 63 (model.image_tokens without the class position)",
        ),
        ("train.epochs=0", "train.steps and train.epochs are both 0: give one of them"),
        ("train.micro_batch=12", "train.micro_batch = 12: must divide train.global_batch 64; use 2, 4, 8 or 16"),
        (
            "parallel.deepspeed=configs/ds/zero4.json",
            "configs/ds/zero4.json does not exist: did you mean configs/ds/zero",
        ),
    ],
)
def test_each_rule_has_its_sentence(base, override, message):
    text = failure(base, override)
    assert text.startswith(f"{base}: ") and message in text and "\n" not in text


def test_rules_of_the_method_bind_only_where_it_is_used(base):
    load_config(base, ["self_guided.enabled=false", "self_guided.contrastive_block=99", "self_guided.views=1"])
    load_config(base, ["self_guided.view_loss=false", "self_guided.views=1", "self_guided.student_views=1"])
    load_config(base, ["self_guided.step_loss=false", "self_guided.positions=1"])


def test_bad_files(tmp_path, base):
    assert "run.yml does not exist: check the path" in failure(tmp_path / "run.yml")
    assert f"configuration {tmp_path} is a folder: name a file in it" in failure(tmp_path)
    assert "did you mean configs/run/demo.yaml?" in failure("configs/run/demmo.yaml")
    base.write_text("train:\n  steps: [1\nrun: x\n")
    assert failure(base).startswith(f"{base} line 3 is not YAML (")
    base.write_text("run: a\nrun: b\n")
    assert f"{base} line 2 is not YAML (the key run occurs twice)" in failure(base)
    base.write_text("- a\n- b\n")
    assert failure(base) == f"{base} contains a list instead of sections of `field: value`"
    base.write_text("run: ${oc.env:MEGASTAR_NO_SUCH_VARIABLE}\n")
    assert "Environment variable 'MEGASTAR_NO_SUCH_VARIABLE' not found" in failure(base)
    base.write_bytes(b"run: \xff\xfe\n")
    assert f"{base} line 1 is not UTF-8 text: save it as UTF-8" in failure(base)


# The batch ---------------------------------------------------------------------------------------------------------
def test_batch_is_split_over_ranks_and_accumulation():
    cfg = RunConfig()
    assert resolve_batch(cfg.train, cfg.parallel.tensor_parallel, 8) == (32, 1)
    cfg.train.micro_batch = 8
    assert resolve_batch(cfg.train, cfg.parallel.tensor_parallel, 8) == (8, 4)
    cfg.parallel.tensor_parallel = 4
    assert resolve_batch(cfg.train, cfg.parallel.tensor_parallel, 8) == (8, 16)


def test_world_sizes_that_do_not_fit():
    cfg = RunConfig()
    cfg.train.global_batch = 12
    with pytest.raises(UserError) as caught:
        resolve_batch(cfg.train, cfg.parallel.tensor_parallel, 5)
    assert str(caught.value) == (
        "world size 5 does not divide train.global_batch 12: start 1, 2, 3, 4, 6 or 12 processes, "
        "or set train.global_batch to 10 or 15"
    )
    cfg.train.micro_batch = 4
    with pytest.raises(UserError, match="train.micro_batch 4 does not divide the 6 images .* to 1, 2, 3 or 6"):
        resolve_batch(cfg.train, cfg.parallel.tensor_parallel, 2)
    cfg.parallel.tensor_parallel = 2
    with pytest.raises(
        UserError, match="world size 3 is not a multiple of parallel.tensor_parallel 2: start 2, 4 or 8"
    ):
        resolve_batch(cfg.train, cfg.parallel.tensor_parallel, 3)
    cfg.train.micro_batch = 0
    with pytest.raises(
        UserError, match=r"world size 10 / tensor_parallel 2 = 5 data ranks does not .* start 2, 4, 6, 8, 12 or 24"
    ):
        resolve_batch(cfg.train, cfg.parallel.tensor_parallel, 10)


# The tokenizer's configuration -------------------------------------------------------------------------------------
def test_tokenizer_configuration_and_its_rules():
    cfg = load_tokenizer_config("configs/tokenizer/emoji64.yaml", ["steps=7000"])
    assert (cfg.steps, cfg.tokenizer.grid, cfg.tokenizer.codebook_size) == (7000, 8, 2048)

    def broken(*overrides):
        return failure("configs/tokenizer/emoji64.yaml", *overrides, load=load_tokenizer_config)

    assert "tokenizer.image_size = 60: must be a multiple of 8 (4 levels)" in broken("tokenizer.image_size=60")
    assert "tokenizer.norm_groups = 32: must divide the width of every level, but does not divide 16" in broken(
        "tokenizer.norm_groups=32"
    )
    assert "continuous_steps = 300: must be below steps 300, otherwise no codebook is made" in broken("steps=300")
    assert "pictures is empty: name a folder of class folders, a .tar, or a folder of tars" in broken("pictures=''")
    assert "tokenizer.channel_multipliers is empty: give one number per level" in broken(
        "tokenizer.channel_multipliers=[]"
    )
    assert "tokenizer.channel_multipliers = ['a']: must be a list of integers" in broken(
        "tokenizer.channel_multipliers=[a]"
    )
    assert "tokenizer.channel_multipliers = 0: must be at least 1" in broken("tokenizer.channel_multipliers=[1,0]")
    assert "unknown key tokenizer.chanels: did you mean tokenizer.channels?" in broken("tokenizer.chanels=3")


# Help --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schema", [RunConfig, TokenizerTrainConfig])
def test_help_names_every_field_with_its_default(schema):
    def leaves(cls, prefix=""):
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[f.name]):
                yield from leaves(hints[f.name], f"{prefix}{f.name}.")
            else:
                yield prefix + f.name

    shown = [r for r in rows(schema) if not r.name.endswith(".")]
    assert [r.name for r in shown] == list(leaves(schema))
    assert all(len(r.help) > 5 for r in shown)
    text = fields_text(schema, 100)
    assert max(map(len, text.splitlines())) <= 100
    for r in shown:
        assert any(line.split()[:2] == [r.name, r.default] for line in text.splitlines()), r


# Words that YAML reads as booleans --------------------------------------------------------------------------------
@pytest.mark.parametrize("word", ["off", "Off", "no", "false", "'off'", "FALSE"])
def test_a_choice_may_be_a_word_that_yaml_reads_as_a_boolean(tmp_path, word):
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {{shards: x}}\ntrain: {{fused_ops: {word}, keep_best: yes}}\n")
    cfg = load_config(file)
    assert (cfg.train.fused_ops, cfg.train.keep_best) == ("off", True)
    assert load_config(None, ["data.shards=x", f"train.fused_ops={word}"]).train.fused_ops == "off"
    assert config_from_dict({"data": {"shards": "x"}, "train": {"fused_ops": False}}).train.fused_ops == "off"


@pytest.mark.parametrize("word", ["on", "yes", "true", "maybe"])
def test_another_word_is_refused_as_the_user_wrote_it(tmp_path, word):
    file = tmp_path / "run.yaml"
    for field, choices in (
        ("fused_ops", "auto or off"),
        ("dtype", "bf16, fp32 or auto"),
    ):
        file.write_text(f"data: {{shards: x}}\ntrain: {{{field}: {word}}}\n")
        for path, words in ((file, []), (None, ["data.shards=x", f"train.{field}={word}"])):
            with pytest.raises(UserError, match=f"train.{field} = {word}: must be {choices}"):
                load_config(path, words)


def test_every_choice_with_on_and_off_takes_booleans():
    choices = ("auto", "on", "off")
    assert [_choice(v, choices) for v in (True, False, "yes", "No", "auto", "x")] == [
        "on",
        "off",
        "on",
        "off",
        "auto",
        "x",
    ]


def test_other_fields_take_the_word_or_refuse_it():
    cfg = load_config(None, ["data.shards=x", "model.name=no", "train.keep_best=on", "self_guided.step_loss=off"])
    assert (cfg.model.name, cfg.train.keep_best, cfg.self_guided.step_loss) == ("no", True, False)
    with pytest.raises(UserError, match="optim.lr = 'off': must be a number"):
        load_config(None, ["data.shards=x", "optim.lr=off"])
    with pytest.raises(UserError, match="cannot be read"):
        load_config(None, ["data.shards=x", "optim.lr=[1"])
