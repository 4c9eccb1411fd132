"""Features that are computed in training equal those that the shards store; other images are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from megastar.config.load import load_config
from megastar.data.online_features import OnlineFeatures
from megastar.data.pretokenize.runner import pretokenize
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.writer import open_writer
from megastar.errors import UserError
from megastar.utils.console import PlainConsole
from tests.integration.conftest import World, megastar
from tests.integration.methods.test_repa import BOTH, OWN, config_of, refused
from tests.integration.test_train import rows

pytestmark = pytest.mark.dist
POOLED = "tests.integration.methods.encoder:patches"


@pytest.fixture(scope="module")
def sets(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train and val with the features of a function, packed and plain with those of EfficientNet-Lite0."""
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = tmp_path_factory.mktemp("stored")
    for name, encoder, layout in (
        ("train", OWN, "plain"),
        ("val", OWN, "plain"),
        ("packed", "efflite0", "packed"),
        ("pooled", POOLED, "plain"),
    ):
        pretokenize(
            world.pictures, name if name == "val" else "train", world.tokenizer, folder / name, shard_size=10, workers=1,
            layout=layout, features=encoder, feature_pool=encoder == POOLED, console=PlainConsole(),
        )  # fmt: skip
    return folder


def online(world: World, shards: Path, encoder: str, *more: str, pictures: Path | None = None) -> OnlineFeatures:
    fields = [
        f"data.shards={shards}", f"data.tokenizer={world.tokenizer}", "repa.enabled=true", "repa.online=true",
        f"repa.encoder={encoder}", f"repa.pictures={pictures or world.pictures}", *more,
    ]  # fmt: skip
    cfg = load_config(None, fields)
    return OnlineFeatures(cfg.repa, ShardSet(shards), cfg.data.tokenizer)


@pytest.mark.parametrize(
    ("name", "encoder", "error"), [("train", OWN, 0), ("pooled", POOLED, 0), ("packed", "efflite0", 2e-2)]
)
def test_they_equal_the_stored_ones(world, sets, name, encoder, error):
    """Of all samples and crops, in any order; EfficientNet's differ by the rounding of other batches."""
    stored = ShardSet(sets / name)
    features = online(world, sets / name, encoder, f"repa.feature_pool={'true' if name == 'pooled' else 'false'}")
    assert features.stored == stored.manifest.stored_features
    ids = np.random.default_rng(0).permutation(27)
    views = np.random.default_rng(1).integers(0, 10, (27, 2))
    got, wanted = features.gather_features(ids, views), stored.gather_features(ids, views)
    features.close()
    assert got.dtype == wanted.dtype and got.shape == wanted.shape == (27, 2, 16, features.stored.width)
    np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=0, atol=error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_repeats_the_run_with_stored_features(world, sets, tmp_path, ranks):
    """Bit for bit; and it goes on from a checkpoint of that run. The shards of the second run store no features."""
    config = config_of(world, sets, tmp_path, tmp_path / "stored")
    pictures = [f"repa.pictures={world.pictures}", f"repa.encoder={OWN}", "repa.online=true"]
    codes = [f"data.shards={world.codes('train')}", f"data.val_shards={world.codes('val')}"]
    megastar("train", config, BOTH, ranks=ranks)
    megastar("train", config, BOTH, f"run={tmp_path / 'online'}", *codes, *pictures, ranks=ranks)
    stored, computed = rows(tmp_path / "stored"), rows(tmp_path / "online")
    assert sorted(stored) == list(range(1, 7)) and stored[6]["loss_repa"] > 0 and computed == stored
    recorded = [
        json.loads((tmp_path / run / "checkpoints/step-00000006/megastar.json").read_text())["features"]
        for run in ("stored", "online")
    ]
    assert recorded[0] == recorded[1] and recorded[0]["encoder"] == OWN
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "stored/checkpoints/step-00000003", resumed / "checkpoints/step-00000003")
    done = megastar("train", config, BOTH, f"run={resumed}", *pictures, ranks=ranks)
    assert "the features that" in done.stdout and "are not read" in done.stdout
    again = rows(resumed)
    assert sorted(again) == [4, 5, 6] and all(again[step] == stored[step] for step in again)


def test_what_is_refused(world, sets, tmp_path):
    config = config_of(world, sets, tmp_path, tmp_path / "run")
    given = {"repa.online": "true", "repa.pictures": f"{world.pictures}", "repa.encoder": OWN}
    fewer, none = tmp_path / "fewer", tmp_path / "none"
    shutil.copytree(world.pictures, fewer)
    next((fewer / "train").rglob("*.png")).unlink()
    none.mkdir()
    foreign = tmp_path / "foreign"
    shutil.copytree(sets / "train", foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["made_by"] = {}
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    cases = [
        ({"repa.encoder": ""}, "repa.online = true needs repa.encoder"),
        ({"repa.pictures": ""}, "repa.online = true needs repa.pictures"),
        ({"repa.online": "false"}, f"repa.pictures = {world.pictures} is used with repa.online alone"),
        ({"repa.encoder": "dinov2"}, "repa.encoder = dinov2 needs the file of its weights"),
        ({"repa.encoder": POOLED}, "encoder tests.integration.methods.encoder:patches has 64 patches"),
        ({"repa.pictures": f"{none}"}, f"no images in {none}"),
        ({"repa.pictures": f"{tmp_path}/gone"}, "gone"),
        ({"repa.pictures": f"{fewer}"}, "has 26 images in 3 classes, which are not the 27 images"),
        ({"repa.width": "768"}, "repa.width = 768, but features of"),
        ({"data.shards": f"{foreign}"}, "does not record the images that it was made from"),
    ]
    for changed, message in cases:
        error = refused("train", config, BOTH, *(f"{k}={v}" for k, v in (given | changed).items()))
        assert message in error and error.count("\n") <= 6, (changed, error)
    assert not (tmp_path / "run").exists()


def test_images_that_were_changed_or_lost_end_the_run(world, sets, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(world.pictures, changed)
    for path in (changed / "train").rglob("*.png"):
        with Image.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(path)
    features = online(world, sets / "train", OWN, pictures=changed)
    with pytest.raises(UserError, match=r"shard-0000\d.tar, sample \d+ of .* is not of the image in .* that it names"):
        features.gather_features(np.arange(8), np.zeros((8, 1), int))
    features.close()
    lost = tmp_path / "lost"
    shutil.copytree(world.pictures, lost)
    features = online(world, sets / "train", OWN, pictures=lost)
    gone = lost / f"{ShardSet(sets / 'train').sources(0)[3]}.png"
    gone.write_bytes(gone.read_bytes()[:40])
    with pytest.raises(UserError, match=r"the image of shard-00000.tar, sample 3 of .* cannot be read"):
        features.gather_features(np.arange(8), np.zeros((8, 1), int))
    features.close()


def test_a_sample_of_an_unknown_image_is_refused(world, sets, tmp_path):
    """The manifest is that of the images, a sample's note is not."""
    shards = tmp_path / "renamed"
    shutil.copytree(sets / "train", shards)
    features = online(world, shards, OWN)
    source = ShardSet(sets / "train")
    with open_writer(shards / "shard-00000.tar", "plain", "uint16", source.manifest.stored_features) as writer:
        for i in range(10):
            codes, label, _ = source.read(0, i)
            stored = source.gather_features([i], np.arange(10)[None])[0]
            writer.add(f"{i:09d}", codes, label, "train/circle/unknown", stored)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][0] |= {"sha256": writer.info().sha256, "bytes": writer.info().bytes}
    (shards / "manifest.json").write_text(json.dumps(manifest))
    features = online(world, shards, OWN)
    with pytest.raises(UserError, match=r"is of the image 'train/circle/unknown', which .* lacks: pretokenize again"):
        features.gather_features([0], np.zeros((1, 1), int))
    features.close()
