"""Representation alignment from pictures to weights, as a user runs it: stored features, training, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from megastar.data.pretokenize.runner import pretokenize
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.writer import open_writer
from megastar.encoders.spatial import EffLite0Patches
from megastar.model.io import read_model_header
from megastar.utils.console import PlainConsole
from tests.integration.conftest import TOKENIZER, World, megastar
from tests.integration.test_train import rows

pytestmark = [pytest.mark.dist, pytest.mark.long]
OWN = "tests.integration.methods.encoder:same_grid"
REPA, BOTH = "method=configs/method/repa.yaml", "method=configs/method/star+repa.yaml"


@pytest.fixture(scope="session")
def encoded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train and val with features of EfficientNet-Lite0, and own with those of another encoder."""
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = tmp_path_factory.mktemp("encoded")
    for split in ("train", "val"):
        done = megastar(
            "pretokenize", world.pictures, "--subset", split, "--tokenizer", world.tokenizer, "--out", folder / split,
            "--shard-size", 10, "--features", "efflite0",
        )  # fmt: skip
        count = 27 if split == "train" else 9
        assert "4 x 4 x 112 float16" in done.stdout and f"for {count} images" in done.stdout
    pretokenize(
        world.pictures,
        "val",
        world.tokenizer,
        folder / "own",
        shard_size=10,
        workers=1,
        features=OWN,
        console=PlainConsole(),
    )
    return folder


def config_of(world: World, encoded: Path, tmp_path: Path, run: Path, **train: object) -> Path:
    """The run of ``world`` on the shards with features."""
    path = world.write_config(
        tmp_path / f"{run.name}.yaml", run, **{"steps": 6, "save_every": 3, "val_every": 3, **train}
    )
    data = yaml.safe_load(path.read_text())
    del data["self_guided"]["contrastive_block"], data["self_guided"]["teacher_decay"]
    data["data"] |= {"shards": str(encoded / "train"), "val_shards": str(encoded / "val")}
    data |= {"method": "configs/method/ar.yaml", "repa": {"projector_dim": 24}}
    data["self_guided"] |= {"contrastive_block": 1}
    path.write_text(yaml.safe_dump(data))
    return path


def refused(*words: object) -> str:
    done = megastar(*words, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_stored_features_are_those_of_the_stored_crops(world, encoded):
    """Codes are those of a set without features; the features are the encoder's of the same crops."""
    plain, shards = ShardSet(world.codes("train")), ShardSet(encoded / "train")
    ids, views = np.arange(27), np.tile(np.arange(10), (27, 1))
    for a, b in zip(plain.gather(ids, views), shards.gather(ids, views), strict=True):
        np.testing.assert_array_equal(a, b)
    from megastar.data.images.crops import parse_crops

    make, encoder = parse_crops("ten:1.1")[0], EffLite0Patches()
    source = shards.sources(0)[4]
    with Image.open(world.pictures / f"{source}.png") as image:
        crops = make(image.convert("RGB"), TOKENIZER.image_size)
    import torch

    wanted = encoder(torch.from_numpy(np.stack(list(crops))), 4).numpy()
    np.testing.assert_allclose(shards.gather_features([4], views[:1])[0], wanted, rtol=2e-3, atol=2e-2)
    assert json.loads(megastar("data", "inspect", encoded / "train", "--json").stdout)["features"]["width"] == 112
    assert (
        "efflite0 (block 10, 16 px a patch), 4 x 4 x 112 float16" in megastar("data", "inspect", encoded / "val").stdout
    )
    assert "all match the manifest" in megastar("data", "verify", encoded / "train").stdout


def test_any_number_of_processes_writes_the_same_bytes(world, encoded, tmp_path):
    pretokenize(
        world.pictures, "train", world.tokenizer, tmp_path / "again", shard_size=10, workers=2, features="efflite0",
        console=PlainConsole(),
    )  # fmt: skip
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (encoded / "train" / "manifest.json").read_bytes()


def test_a_set_is_continued_with_the_same_encoder_only(world, encoded, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(encoded / "val", folder)
    command = ["pretokenize", world.pictures, "--subset", "val", "--tokenizer", world.tokenizer, "--out", folder]
    command += ["--shard-size", 10]
    assert "other settings: features ({'encoder': 'efflite0'" in refused(*command)
    assert "same_grid" in refused(*command, "--features", OWN)
    assert "for 16 pixels" in refused(*command, "--features", "tests.integration.methods.encoder:patches").replace(
        "images of 16", "16"
    )
    (folder / "shard-00000.tar").unlink()
    megastar(*command, "--features", "efflite0")
    assert load_manifest(folder) == load_manifest(encoded / "val")


@pytest.mark.parametrize(("method", "ranks"), [(REPA, 1), (BOTH, 2)])
def test_a_resumed_run_repeats_every_number(world, encoded, tmp_path, method, ranks):
    """Dropout on; a copy of the run as it was after three steps goes on to the last bit."""
    straight, again = tmp_path / "a", tmp_path / "b"
    megastar("train", config_of(world, encoded, tmp_path, straight), method, ranks=ranks)
    shutil.copytree(straight / "checkpoints" / "step-00000003", again / "checkpoints" / "step-00000003")
    megastar("train", config_of(world, encoded, tmp_path, again), method, ranks=ranks)
    whole, resumed = rows(straight), rows(again)
    assert sorted(resumed) == [4, 5, 6] and all(resumed[step] == whole[step] for step in resumed)
    parts = {"loss", "loss_ar", "loss_repa"} | ({"loss_mim", "loss_view"} if method == BOTH else set())
    assert parts <= set(whole[2]) and whole[6]["loss_repa"] < whole[1]["loss_repa"]
    weight, term = 0.5, whole[1]["loss_repa"]
    if method == REPA:
        assert whole[1]["loss"] == pytest.approx(whole[1]["loss_ar"] + weight * term, rel=1e-6)
        assert "teacher_distance" not in whole[1]


@pytest.mark.parametrize("method", ["ar", "star", "star+repa"])
def test_validation_does_not_disturb_training(world, encoded, tmp_path, method):
    """Dropout on: the numbers of a run that validates are those of a run that does not, to the last bit."""
    found = {}
    for every in (0, 2):
        config = config_of(world, encoded, tmp_path, tmp_path / f"every{every}", val_every=every)
        megastar("train", config, f"method=configs/method/{method}.yaml")
        found[every] = rows(tmp_path / f"every{every}")
    validated = {step: row.pop("val_loss_ar") for step, row in found[2].items() if "val_loss_ar" in row}
    for row in found[2].values():
        row.pop("val_s", None)
    assert sorted(validated) == [2, 4, 6] and found[0] == found[2]


def test_the_projector_stays_with_the_run(world, encoded, tmp_path):
    run = tmp_path / "run"
    megastar("train", config_of(world, encoded, tmp_path, run), BOTH)
    shown = megastar("convert", "--inspect", run).stdout
    assert "ST-AR (self-guided) and REPA" in shown
    megastar("convert", run, "--to", "safetensors", "--out", tmp_path / "w.safetensors")
    weights = read_model_header(tmp_path / "w.safetensors")[2]
    assert weights and not [name for name in weights if "projector" in name]
    manifest = json.loads((run / "checkpoints/step-00000006/megastar.json").read_text())
    assert manifest["parameters"]["repa_projector.w3.weight"] == [112, 24]
    assert manifest["features"]["encoder"] == "efflite0" and manifest["config"]["repa"]["width"] == 112


def test_a_run_from_before_the_section_goes_on(world, encoded, tmp_path):
    run = tmp_path / "run"
    config = config_of(world, encoded, tmp_path, run)
    megastar("train", config, "method=configs/method/star.yaml", "train.steps=3")
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    del recorded["repa"]
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    path = run / "checkpoints/step-00000003/megastar.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["repa"], manifest["features"]
    path.write_text(json.dumps(manifest))
    assert "at step 3" in megastar("train", config, "method=configs/method/star.yaml", "repa.projector_dim=2048").stdout
    assert "repa.enabled: False -> True" in refused("train", config, BOTH, "repa.projector_dim=2048")


def test_wrong_features_are_refused_in_one_sentence(world, encoded, tmp_path):
    run = tmp_path / "run"
    config = config_of(world, encoded, tmp_path, run)
    other = tmp_path / "other.bin"
    other.write_bytes(b"x")
    cases = {
        f"data.shards={world.codes('train')}": "stores no features, which repa.enabled needs: make the set again",
        "repa.encoder=dinov2": "repa.encoder = dinov2, but data.shards",
        "repa.encoder=vgg": "must be efflite0, dinov2, dinov3 or module:function, or empty",
        f"repa.encoder_weights={other}": f"repa.encoder_weights = {other} has SHA-256",
        f"repa.encoder_weights={tmp_path}/none": "does not exist",
        "repa.width=768": "repa.width = 768, but data.shards",
        "repa.block=3": "repa.block = 3: must be at most model.n_layer 2",
        f"data.val_shards={encoded / 'own'}": "has features of efflite0 (block 10, 16 px a patch), 4 x 4 x 112 float16, weights",
    }  # fmt: skip
    for override, message in cases.items():
        error = refused("train", config, REPA, override)
        assert message in error and error.count("\n") <= 6, (override, error)
    assert not run.exists()


def test_a_run_resumes_with_its_features_only(world, encoded, tmp_path):
    run = tmp_path / "run"
    config = config_of(world, encoded, tmp_path, run, val_every=0)
    megastar("train", config, REPA, "train.steps=3")
    assert "another configuration: repa.enabled: True -> False" in refused("train", config)
    (run / "config.yaml").rename(tmp_path / "config.yaml")
    assert "another network: repa_projector.w1.weight is" in refused("train", config)
    (tmp_path / "config.yaml").rename(run / "config.yaml")
    changed = tmp_path / "changed"
    pretokenize(
        world.pictures,
        "train",
        world.tokenizer,
        changed,
        shard_size=10,
        workers=1,
        features=OWN,
        console=PlainConsole(),
    )
    error = refused("train", config, REPA, f"data.shards={changed}", "data.val_shards=")
    assert "repa.width: 112 -> 3" in error
    record = json.loads((changed / "manifest.json").read_text())
    before = json.loads((encoded / "train" / "manifest.json").read_text())
    assert record["shards"] != before["shards"]
    shutil.rmtree(changed)
    shutil.copytree(encoded / "train", changed)
    before["features"]["weights_sha256"] = "0" * 64
    (changed / "manifest.json").write_text(json.dumps(before))
    error = refused("train", config, REPA, f"data.shards={changed}", "data.val_shards=")
    assert "was trained on shards with features of efflite0" in error and "weights 000000000000" in error
    assert "at step 3" in megastar("train", config, REPA, "repa.encoder=efflite0").stdout


def test_features_that_are_not_finite_end_the_run_with_one_sentence(world, encoded, tmp_path):
    folder, shards = tmp_path / "nan", ShardSet(encoded / "train")
    folder.mkdir()
    manifest, infos, views = shards.manifest, [], np.arange(10)[None]
    for number, info in enumerate(manifest.shards):
        with open_writer(folder / info.name, features=manifest.stored_features) as writer:
            for row in range(info.samples):
                codes, label, i = shards.read(number, row)
                features = shards.gather_features([i], views)[0]
                features[:, 3, 5] = np.nan
                writer.add(f"{i:09d}", codes, label, "x", features)
        infos.append(writer.info())
    record = json.loads(manifest.to_json()) | {"shards": [vars(info) for info in infos]}
    (folder / "manifest.json").write_text(json.dumps(record))
    config = config_of(world, encoded, tmp_path, tmp_path / "run")
    error = refused("train", config, REPA, f"data.shards={folder}")
    assert "holds features that are not finite: find all such samples with `megastar data verify" in error
    done = megastar("data", "verify", folder, check=False)
    assert done.returncode == 1 and done.stdout.count("holds features that are not finite") == 3


def test_a_dry_run_and_a_plan_know_the_projector(world, encoded, tmp_path):
    config = config_of(world, encoded, tmp_path, tmp_path / "run")
    assert "none (next token and REPA)" in megastar("train", "--dry-run", config, REPA).stdout
    plan = megastar("plan", config, REPA, "--gpus", 1).stdout
    assert "features of 4 x 4 patches, width 112: 3.6 kB a stored crop" in plan and "+ projector" in plan
    assert json.loads(megastar("plan", config, REPA, "--gpus", 1, "--json").stdout)["feature_bytes"]["crop"] == 3584
