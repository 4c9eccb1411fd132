"""What is wrong with the shards of a run is told in one sentence before anything is built."""

from __future__ import annotations

import pytest

from megastar.config.load import load_config
from megastar.config.schema import RunConfig, TokenizerConfig
from megastar.data.order import VERSION
from megastar.engine.input_pipeline.data_checks import check_same_data, check_same_order, open_data
from megastar.errors import UserError
from megastar.tokenizer.io import save_tokenizer
from megastar.tokenizer.vq import VQModel
from tests.unit.data.shards.test_shards import T, V, write_set

SIZES = (7, 6, 8, 5)


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "train", SIZES)


def run_config(shards, *overrides: str) -> RunConfig:
    fits = [f"model.vocab_size={V}", f"model.image_tokens={T}", "model.num_classes=4", "train.global_batch=8"]
    return load_config(None, [f"data.shards={shards}", *fits, *overrides])


def test_what_fits_is_opened(folder, tmp_path):
    data = open_data(run_config(folder))
    assert data.train.manifest.samples == 26 and data.val is None
    held_out = write_set(tmp_path / "val", (4,))
    assert open_data(run_config(folder, f"data.val_shards={held_out}")).val.manifest.samples == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.image_tokens=64"], "the shards have 16 tokens per image, a grid of 4, model.image_tokens is 64"),
        (["model.vocab_size=64"], "the shards have 50 codes, model.vocab_size is 64"),
        (["model.num_classes=3"], "the shards have 4 classes, model.num_classes is 3"),
        (
            ["train.global_batch=32"],
            "holds 26 samples, fewer than one global batch of 32: lower train.global_batch or add",
        ),
        (["self_guided.views=4"], r"4 views are requested, the shards store 3 \(crops center-flip\)"),
        (["data.tokenizer=nowhere.safetensors"], "data.tokenizer=nowhere.safetensors does not exist"),
    ],
)
def test_what_does_not_fit(folder, overrides, message):
    with pytest.raises(UserError, match=message):
        open_data(run_config(folder, *overrides))


def test_one_stored_view_and_the_view_loss(tmp_path):
    single = write_set(tmp_path / "one", SIZES, views=1, crops="center")
    with pytest.raises(UserError, match=r"2 views are requested, the shards store 1 \(crops center\)"):
        open_data(run_config(single))
    with pytest.raises(UserError, match=r"self_guided.views = 1: the view loss compares two crops; set views to 2"):
        run_config(single, "self_guided.views=1", "self_guided.student_views=1")
    open_data(run_config(single, "self_guided.views=1", "self_guided.student_views=1", "self_guided.view_loss=false"))


def test_an_empty_set(tmp_path):
    with pytest.raises(UserError, match="holds no samples"):
        open_data(run_config(write_set(tmp_path / "none", (0, 0))))


def test_mixed_tokenizers(folder, tmp_path):
    other = write_set(tmp_path / "other", SIZES, tokenizer_sha256="cd" * 32)
    with pytest.raises(UserError, match=r"made with the tokenizer abababababab..., .*other with cdcdcdcdcdcd"):
        open_data(run_config(folder, f"data.val_shards={other}"))
    tokenizer = tmp_path / "t.safetensors"
    small = TokenizerConfig(
        image_size=32, channels=4, channel_multipliers=[1, 1, 1, 1], res_blocks=1, z_channels=4, norm_groups=2
    )
    save_tokenizer(VQModel(small), tokenizer, {})
    with pytest.raises(UserError, match=r"made with another tokenizer \(SHA-256 abababababab"):
        open_data(run_config(folder, f"data.tokenizer={tokenizer}"))
    unknown = write_set(tmp_path / "foreign", SIZES, tokenizer_sha256="")  # of a set that others made
    assert open_data(run_config(unknown, f"data.val_shards={folder}")).train.manifest.tokenizer_sha256 == ""
    open_data(run_config(unknown, f"data.tokenizer={tokenizer}"))


def test_other_classes_in_the_validation_set(folder, tmp_path):
    other = write_set(tmp_path / "other", SIZES, classes=["a", "b", "c", "e"])
    with pytest.raises(UserError, match="name different classes"):
        open_data(run_config(folder, f"data.val_shards={other}"))


def test_a_run_goes_on_with_its_shards_wherever_they_lie(folder, tmp_path):
    copied, other = write_set(tmp_path / "copy", SIZES), write_set(tmp_path / "other", (1, *SIZES))
    digests = [open_data(run_config(f)).digests["data"] for f in (folder, copied, other)]
    assert digests[0] == digests[1] != digests[2] and open_data(run_config(folder)).digests["val_data"] == ""
    cfg, found = run_config(other, f"data.val_shards={other}"), tmp_path / "step-1"
    was = {"data": digests[0], "val_data": digests[0], "tokenizer": ""}
    check_same_data(cfg.data, was, was, found)
    check_same_data(cfg.data, {"data": digests[0]}, was, found)  # a checkpoint that does not say
    with pytest.raises(UserError, match=r"data.shards = .*other holds different shards than .*step-1 was trained on"):
        check_same_data(cfg.data, was, was | {"data": digests[2]}, found)
    with pytest.raises(
        UserError, match=r"data.val_shards = .*other holds different shards than .*step-1 was validated on"
    ):
        check_same_data(cfg.data, was, was | {"val_data": digests[2]}, found)


def test_a_checkpoint_in_another_order_of_the_samples(folder, tmp_path):
    cfg, found = run_config(folder, "data.window=3"), tmp_path / "step-4"
    manifest = open_data(cfg).train.manifest
    check_same_order(cfg.data.window, manifest, {"order": VERSION}, found)
    with pytest.raises(UserError, match=f"step-4 was trained in sample order 1, this .* order {VERSION}: finish"):
        check_same_order(cfg.data.window, manifest, {}, found)  # from before it was written down
    check_same_order(4, manifest, {}, found)  # four shards, all mixed: the same
