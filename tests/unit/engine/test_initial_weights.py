"""``train.init``: what is taken of the weights, and what is refused before anything is built."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megastar.checkpoint.class_rows import read_class_map
from megastar.config.load import load_config
from megastar.config.schema import DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainConfig
from megastar.data.shards.manifest import Manifest, write_manifest
from megastar.data.shards.writer import ShardWriter
from megastar.data.storage.store import open_store
from megastar.engine.checkpointer.initial_weights import check_initial, mapped_table, open_initial
from megastar.engine.input_pipeline.data_checks import open_data
from megastar.engine.lr_schedule import is_frozen, layer_scale
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.run_dir.config_file import check_same_init, may_change
from megastar.tokenizer.io import save_tokenizer, tokenizer_hash
from megastar.tokenizer.vq import VQModel
from megastar.utils.files import sha256
from tests.checkpoints import save_model, write_checkpoint
from tests.fuzz import odd_files

CFG = ModelConfig(name="t", n_layer=2, n_head=2, dim=16, multiple_of=8, vocab_size=23, num_classes=4, image_tokens=16)
OLD = ["ant", "bee", "cat", "dog"]


def shards(folder: Path, classes: list[str], tokenizer: str = "", grid: int = 4, downsample: int = 4) -> str:
    """Four samples of ``classes`` on a grid, as ``megastar pretokenize`` writes them."""
    folder.mkdir(parents=True)
    with ShardWriter(folder / "shard-000000.tar") as out:
        for i in range(4):
            out.add(f"{i}", np.full((1, grid * grid), i), i % len(classes), f"{i}.png")
    write_manifest(
        open_store(folder),
        Manifest(4, classes, grid, grid * grid, 1, 23, "center", downsample * grid, tokenizer, [out.info()]),
    )
    return str(folder)


@pytest.fixture
def init(tmp_path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "w.safetensors"
    provenance = {"classes": OLD, "tokenizer": "a" * 64, "downsample": 4, "step": 9}
    save_model(path, Transformer(CFG).state_dict(), CFG, provenance)
    return str(path)


def run(tmp_path, init: str, codes: str, model: ModelConfig = CFG, **train: object) -> RunConfig:
    cfg = load_config(None, ["data.shards=x", "self_guided.enabled=false", "train.global_batch=2"])
    cfg.run, cfg.model, cfg.data = str(tmp_path / "run"), model, DataConfig(shards=codes)
    cfg.train = replace(cfg.train, init=init, **train)
    return cfg


def rows(cfg: RunConfig) -> list[int | None]:
    initial = open_initial(cfg)
    data = open_data(cfg)
    check_initial(initial, cfg, data)
    data.close()
    return initial.rows


def refused(cfg: RunConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        rows(cfg)
    assert not Path(cfg.run).exists()


def test_rows_of_the_class_table(tmp_path, init, caplog):
    caplog.set_level(logging.INFO)
    three = replace(CFG, num_classes=3)
    same, few = shards(tmp_path / "same", OLD, "a" * 64), shards(tmp_path / "few", ["dog", "eel", "ant"], "a" * 64)
    assert rows(run(tmp_path, init, same)) == [0, 1, 2, 3, 4]
    assert rows(run(tmp_path, init, few, three, init_classes="fresh")) == [None, None, None, 4]
    assert rows(run(tmp_path, init, few, three, init_classes="map")) == [3, None, 0, 4]
    assert "2 of 3 class embeddings are taken; new ones: eel" in caplog.text
    (tmp_path / "m.yaml").write_text("ant: 1\n0: dog\neel: null\n")
    cfg = run(tmp_path, init, few, three, init_classes="map", init_class_map=str(tmp_path / "m.yaml"))
    assert rows(cfg) == [3, None, 1, 4]
    table = torch.arange(10.0).view(5, 2)
    values, taken = mapped_table(table, [3, None, 1, 4])
    assert values[[0, 2, 3]].equal(table[[3, 1, 4]]) and taken.all(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "ant: 0\neel: pig\ndog: 1",
            "m.yaml: 'eel': the old class 'pig' does not exist: choose one of ant, bee, cat, dog",
        ),
        ("ant: 0\neel: 4\ndog: 1", r"the old class 4 is outside 0\.\.3"),
        ("ant: 0\neal: 3\ndog: 1", "the new class 'eal' does not exist: did you mean eel"),
        ("ant: 0\ndog: 1", "lacks the classes eel: map each to an old class, or to null for a new embedding"),
        ("ant: 0\n2: 1\ndog: 1\neel: 1", "the new class '2' occurs twice"),
        ("ant: [0]\ndog: 1\neel: 1", "neither a name nor a number"),
        ("- ant", "contains a list instead of"),
    ],
)
def test_a_wrong_map_is_refused(tmp_path, init, text, sentence):
    few = shards(tmp_path / "few", ["dog", "eel", "ant"], "a" * 64)
    (tmp_path / "m.yaml").write_text(text)
    more = {"init_classes": "map", "init_class_map": str(tmp_path / "m.yaml")}
    refused(run(tmp_path, init, few, replace(CFG, num_classes=3), **more), sentence)
    more["init_class_map"] = "nowhere.yaml"
    refused(
        run(tmp_path, init, few, replace(CFG, num_classes=3), **more),
        "train.init_class_map: nowhere.yaml does not exist",
    )


@pytest.mark.parametrize("kind", odd_files())
def test_a_map_that_is_no_text_is_refused(tmp_path, kind):
    path = tmp_path / "m.yaml"
    odd_files()[kind](path)
    with pytest.raises(UserError, match="m.yaml"):
        read_class_map(str(path), 1, None, 1, None)


def test_other_weights_are_refused(tmp_path, init, caplog):
    codes = shards(tmp_path / "codes", OLD, "a" * 64)
    refused(run(tmp_path, init, codes, replace(CFG, dim=32)), "dim 16, not 32; ffn_dim 48, not 88: set model to")
    refused(run(tmp_path, init, codes, replace(CFG, n_head=1)), "n_head 2, not 1")  # equal shapes
    refused(run(tmp_path, init, codes, replace(CFG, num_classes=3)), "has 4 classes, model.num_classes is 3: set train")
    other = shards(tmp_path / "other", OLD, "b" * 64)
    refused(
        run(tmp_path, init, other), "codes of the tokenizer aaaaaaaaaaaa, this run's codes are of bbbbbbbbbbbb: encode"
    )
    assert rows(run(tmp_path, init, other, init_any_tokenizer=True)) == [0, 1, 2, 3, 4]
    assert "started from nevertheless" in caplog.text
    unknown = shards(tmp_path / "unknown", OLD)
    assert rows(run(tmp_path, init, unknown)) and "unknown records no tokenizer hash" in caplog.text
    eighth = shards(tmp_path / "eighth", OLD, downsample=8)
    refused(run(tmp_path, init, eighth), "downsample images by 4, this run's codes downsample by 8: encode")
    refused(
        run(tmp_path, init, shards(tmp_path / "mixed", OLD[::-1], "a" * 64)),
        "in another order: set train.init_classes=map",
    )
    strangers = shards(tmp_path / "strangers", ["e", "f", "g", "h"], "a" * 64)
    assert rows(run(tmp_path, init, strangers)) and "class 0 is ant in" in caplog.text
    refused(run(tmp_path, init, strangers, init_classes="map"), "no class of the shards has a name of")
    state = Transformer(CFG).state_dict()
    state["norm.weight"][2] = float("nan")
    save_model(init, state, CFG, {})
    refused(run(tmp_path, init, codes), r"norm.weight is not finite \(NaN or infinite\)")


def test_another_grid_needs_init_resize(tmp_path, init):
    wide = replace(CFG, image_tokens=36)
    codes = shards(tmp_path / "codes", OLD, "a" * 64, grid=6)
    sentence = r"has 16 tokens per image \(4 x 4\), model.image_tokens is 36: set train.init_resize=true"
    refused(run(tmp_path, init, codes, wide), sentence)
    assert rows(run(tmp_path, init, codes, wide, init_resize=True)) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="model.image_tokens = 40: must be a square number"):
        load_config(None, ["data.shards=x", f"train.init={init}", "train.init_resize=true", "model.image_tokens=40"])


def test_a_tokenizer_of_another_downsampling_is_refused(tmp_path, init):
    vq = TokenizerConfig(16, 32, [1, 2], 1, 8, 23, 4)
    save_tokenizer(VQModel(vq), tmp_path / "t.safetensors", {})
    cfg = run(tmp_path, init, shards(tmp_path / "codes", OLD))
    cfg.data.tokenizer = str(tmp_path / "t.safetensors")
    refused(cfg, "t.safetensors downsamples images by 2, but .* has 4 x 4 codes of 16 pixels, downsampled by 4")
    assert tokenizer_hash(cfg.data.tokenizer) != "a" * 64


def test_weights_of_llamagen_take_from_the_run_what_they_do_not_store(tmp_path):
    torch.manual_seed(1)
    state = Transformer(CFG).state_dict()
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "c2i.pt")
    codes = shards(tmp_path / "codes", OLD, "a" * 64)
    refused(run(tmp_path, str(tmp_path / "c2i.pt"), codes), "give train.init_weights=model or train.init_weights=ema")
    cfg = run(tmp_path, str(tmp_path / "c2i.pt"), codes, init_weights="ema")
    assert rows(cfg) == [0, 1, 2, 3, 4]
    assert torch.equal(open_initial(cfg).network.read("norm.weight"), state["norm.weight"] + 1)
    cfg = run(tmp_path, str(tmp_path / "c2i.pt"), codes, init_weights="ema", init_classes="fresh")
    refused(
        cfg,
        r"is not one of LlamaGen's sizes .*: megastar convert .*c2i.pt --to safetensors --out c2i.safetensors --config",
    )
    table = state["cls_embedding.embedding_table.weight"][:4]
    torch.save({"model": state | {"cls_embedding.embedding_table.weight": table}}, tmp_path / "n.pt")
    assert rows(run(tmp_path, str(tmp_path / "n.pt"), codes)) == [0, 1, 2, 3, None]  # a new null class


def test_a_run_is_a_source(tmp_path):
    cfg = run(tmp_path, "", shards(tmp_path / "codes", OLD, "a" * 64))
    checkpoint = write_checkpoint(tmp_path / "old", cfg, 1, 1)
    cfg.train.init = str(tmp_path / "old")
    initial = open_initial(cfg)
    assert initial.network.path == checkpoint and initial.record(cfg.train.init, True)["checkpoint"] == checkpoint.name
    student = open_initial(replace(cfg, train=replace(cfg.train, init_weights="student")))
    assert not torch.equal(initial.network.read("norm.weight"), student.network.read("norm.weight"))
    refused(replace(cfg, train=replace(cfg.train, init_weights="model")), "has the weights ema and student")
    record = initial.record(cfg.train.init, True)
    moved = (tmp_path / "old").rename(tmp_path / "moved")
    check_same_init(str(moved), record, cfg.train.init, checkpoint)
    assert record["sha256"] == sha256(moved / "checkpoints" / checkpoint.name / "megastar.json")
    with pytest.raises(UserError, match="which cannot change on resume"):
        check_same_init(str(tmp_path / "codes"), record, cfg.train.init, checkpoint)
    assert may_change("train.init") and may_change("train.init_class_map") and not may_change("train.init_classes")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.freeze_blocks=2", "train.freeze_blocks = 2: applies to train.init, which is empty"),
        ("train.init_classes=fresh", "train.init_classes = fresh: applies to train.init, which is empty"),
        ("train.init_resize=true", "train.init_resize = true: applies to train.init, which is empty"),
        ("optim.layer_decay=0", "optim.layer_decay = 0.0: must be above 0"),
        ("optim.layer_decay=1.5", "optim.layer_decay = 1.5: must be at most 1"),
    ],
)
def test_fields_that_do_not_fit_each_other(override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(None, ["data.shards=x", override])
    with pytest.raises(UserError, match="train.freeze_blocks = 13: must be at most model.n_layer 12"):
        load_config(None, ["data.shards=x", "train.init=w", "train.freeze_blocks=13"])
    with pytest.raises(UserError, match="train.init_class_map = m: needs train.init_classes=map, not same"):
        load_config(None, ["data.shards=x", "train.init=w", "train.init_class_map=m"])


def test_rates_of_layers_and_frozen_weights():
    names = ["transformer.tok_embeddings.weight", *(f"transformer.layers.{i}.ffn_norm.weight" for i in range(3))]
    names += ["transformer.norm.weight", "transformer.output.weight", "projector.w1.weight"]
    assert [layer_scale(n, 3, 0.5) for n in names] == [0.125, 0.25, 0.5, 1, 1, 1, 1]
    table = "transformer.cls_embedding.embedding_table.weight"
    train = TrainConfig(freeze_blocks=2)
    assert [is_frozen(n, train) for n in [table, *names]] == [True, True, True, True, False, False, False, False]
    assert not is_frozen(table, replace(train, init_classes="map"))
    assert not any(is_frozen(n, TrainConfig()) for n in [table, *names])
