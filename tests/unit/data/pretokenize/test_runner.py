"""pretokenize: right codes, any number of workers, any kill, every bad input."""

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from megastar.config.schema import TokenizerConfig
from megastar.data.images import crops as crops_module
from megastar.data.images.crops import parse_crops
from megastar.data.images.dataset import ImageSet, ten_crop
from megastar.data.pretokenize import runner as module
from megastar.data.pretokenize.encoding import ViewEncoder
from megastar.data.pretokenize.runner import pretokenize
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.verify import verify
from megastar.data.shards.writer import ShardWriter
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, save_tokenizer, tokenizer_hash
from megastar.tokenizer.vq import VQModel
from tests.unit.data.images.test_dataset import gigantic, make_folder, png

TINY = TokenizerConfig(
    image_size=16, channels=4, channel_multipliers=[1, 2], res_blocks=1, norm_groups=2, z_channels=8, codebook_size=32
)
QUIET = Console(quiet=True)


@pytest.fixture
def notes(caplog, monkeypatch):
    """What the package logs, whatever handlers it has."""
    monkeypatch.setattr(logging.getLogger("megastar"), "propagate", True)
    caplog.set_level(logging.INFO, "megastar")
    return caplog


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.safetensors"
    torch.manual_seed(0)
    save_tokenizer(VQModel(TINY), path, {})
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(23):
        path = tmp_path / "images" / "train" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def run(images, tokenizer, out, console=QUIET, **changes):
    settings = {"shard_size": 5, "workers": 2, "device": "cpu", "batch": 20, "console": console} | changes
    return pretokenize(images, settings.pop("subset", "train"), tokenizer, out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_codes_are_the_tokenizers(images, tokenizer, tmp_path):
    manifest = run(images, tokenizer, tmp_path / "out")
    source, model = ImageSet(images, "train"), load_tokenizer(tokenizer)
    assert manifest.shard_sizes == (5, 5, 5, 5, 3) and manifest.samples == 23 and manifest.skipped == []
    assert manifest.classes == ["a", "b", "c"] and manifest.tokenizer_sha256 == tokenizer_hash(tokenizer)
    assert (manifest.grid, manifest.tokens, manifest.views, manifest.codebook_size) == (8, 64, 10, 32)
    assert load_manifest(tmp_path / "out") == manifest and verify(tmp_path / "out") == []
    shards = ShardSet(tmp_path / "out")
    by_key = {p.key: i for i, p in enumerate(source)}
    seen = []
    for i in range(23):
        shard, k = divmod(i, 5)
        codes, label, _ = shards.read(shard, k)
        key = source_of(tmp_path / "out" / manifest.shards[shard].name, k)
        seen.append(key)
        crops = torch.from_numpy(ten_crop(source.read(by_key[key]), 16)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            expected = model.encode(crops).numpy()
        assert (codes == expected).mean() > 0.999  # another memory layout may turn a near tie
        assert label == source[by_key[key]].label
    assert sorted(seen) == sorted(by_key) and seen != sorted(seen)  # every image once, permuted


def source_of(tar: Path, k: int) -> str:
    import tarfile

    with tarfile.open(tar) as archive:
        member = [m for m in archive if m.name.endswith(".json")][k]
        return json.load(archive.extractfile(member))["source"]


@pytest.mark.parametrize("workers", [1, 3])
def test_same_bytes_for_any_number_of_workers(images, tokenizer, tmp_path, workers):
    run(images, tokenizer, tmp_path / "two")
    before = torch.get_num_threads()
    run(images, tokenizer, tmp_path / "n", workers=workers)
    assert contents(tmp_path / "two") == contents(tmp_path / "n")
    assert torch.get_num_threads() == before
    run(images, tokenizer, tmp_path / "seed", seed=1)
    assert contents(tmp_path / "seed").keys() == contents(tmp_path / "two").keys()
    assert contents(tmp_path / "seed")["shard-00000.tar"] != contents(tmp_path / "two")["shard-00000.tar"]


def test_killed_and_run_again(images, tokenizer, tmp_path):
    """SIGKILL in the third shard; the second run keeps the first two files and ends with the same bytes."""
    run(images, tokenizer, tmp_path / "straight")
    out = tmp_path / "killed"
    script = f"""
import time
from pathlib import Path
from megastar.data.pretokenize import encoding as e, runner as p
encode, out = e.ViewEncoder.encode, Path({str(out)!r})
def encode_two_shards(self, crops):
    if list(out.glob("shard-00002*.tmp")):
        time.sleep(600)
    return encode(self, crops)
e.ViewEncoder.encode = encode_two_shards
p.pretokenize({str(images)!r}, "train", {str(tokenizer)!r}, {str(out)!r}, shard_size=5, workers=1, device="cpu", batch=20)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(out.glob("shard-00002*.tmp")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert list(out.glob("shard-00002*.tmp")) and not (out / "manifest.json").exists()
    kept = {n: (out / n).stat() for n in ("shard-00000.tar", "shard-00001.tar")}
    run(images, tokenizer, out, workers=2)
    assert contents(out) == contents(tmp_path / "straight")
    for name, stat in kept.items():
        assert (out / name).stat().st_mtime_ns == stat.st_mtime_ns, f"{name} was written again"


def test_stopped_by_an_error_and_run_again(images, tokenizer, tmp_path, monkeypatch):
    run(images, tokenizer, tmp_path / "straight")
    out, add, calls = tmp_path / "out", ShardWriter.add, []

    def full_disk(self, *sample):
        calls.append(1)
        if len(calls) == 13:
            raise OSError(28, "No space left on device")
        add(self, *sample)

    monkeypatch.setattr(ShardWriter, "add", full_disk)
    with pytest.raises(UserError, match=r"cannot write to .*No space left.* the finished shards are kept"):
        run(images, tokenizer, out)
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".idx") == [
        ".progress",
        "shard-00000.tar",
        "shard-00001.tar",
    ]
    (out / "shard-00001.tar").unlink()  # a finished shard that was lost since is made again
    run(images, tokenizer, out)
    assert contents(out) == contents(tmp_path / "straight")


def test_done_is_done(images, tokenizer, tmp_path, notes, monkeypatch):
    first = run(images, tokenizer, tmp_path / "out")
    (tmp_path / "out" / ".progress").mkdir()  # as a kill right after the manifest leaves it
    monkeypatch.setattr(module, "PretokenizeRun", None)
    assert run(images, tokenizer, tmp_path / "out") == first
    assert "out is complete: 23 images in 5 shards" in notes.text
    assert not (tmp_path / "out" / ".progress").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": "center"}, r"other settings: crops \('ten:1.1' there, 'center' now\): choose another folder"),
        ({"seed": 5, "shard_size": 6}, r"seed \(0 there, 5 now\); shard_size \(5 there, 6 now\)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings(images, tokenizer, tmp_path, changes, message, finished):
    run(images, tokenizer, tmp_path / "out")
    if not finished:
        unfinish(tmp_path / "out", images, tokenizer)
    before = contents(tmp_path / "out") if finished else None
    with pytest.raises(UserError, match=message):
        run(images, tokenizer, tmp_path / "out", **changes)
    assert before is None or contents(tmp_path / "out") == before


def unfinish(out: Path, images, tokenizer) -> None:
    """Turn a finished folder into one that was stopped after its shards."""
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").unlink()
    (out / ".progress").mkdir()
    plan = {"tokenizer": manifest["tokenizer_sha256"], **{k: manifest[k] for k in ("crops", "layout")}}
    plan |= manifest["made_by"]
    (out / ".progress" / "plan.json").write_text(json.dumps(plan))


def test_another_tokenizer_and_other_images(images, tokenizer, tmp_path):
    run(images, tokenizer, tmp_path / "out")
    torch.manual_seed(1)
    save_tokenizer(VQModel(TINY), tmp_path / "other.safetensors", {})
    with pytest.raises(UserError, match=r"token shards of other settings: tokenizer \('[0-9a-f]{64}' there"):
        run(images, tmp_path / "other.safetensors", tmp_path / "out")
    (images / "train" / "a" / "new.png").write_bytes(png())
    with pytest.raises(UserError, match=r"pictures \(23 there, 24 now\)"):
        run(images, tokenizer, tmp_path / "out")


# Bad images --------------------------------------------------------------------------------------------------
def test_skipped_images_are_counted_and_named(images, tokenizer, tmp_path, notes, monkeypatch):
    bad = {"train/a/huge.png": gigantic(9000, 9000), "train/b/torn.png": png()[:45], "train/c/empty.png": b""}
    make_folder(images, bad)
    sizes = []
    cut = crops_module.ten_crop
    monkeypatch.setattr(
        crops_module, "ten_crop", lambda image, *a, **k: sizes.append(image.size) or cut(image, *a, **k)
    )
    manifest = run(images, tokenizer, tmp_path / "out")
    assert manifest.samples == 23 and len(sizes) == 23 and max(map(max, sizes)) < 100  # huge was never decoded
    reasons = {s["picture"]: s["reason"] for s in manifest.skipped}
    assert reasons.keys() == {"train/a/huge", "train/b/torn", "train/c/empty"}
    assert "9000 x 9000 exceeds 40 megapixels" in reasons["train/a/huge"] and "unreadable" in reasons["train/b/torn"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert rows == manifest.skipped
    assert "3 images skipped (train/" in notes.text and "skipped.jsonl for the reasons" in notes.text
    assert sum(manifest.shard_sizes) == 23 and ShardSet(tmp_path / "out").read(0, 0)[0].shape == (10, 64)
    run(images, tokenizer, tmp_path / "again", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_no_usable_image(tokenizer, tmp_path):
    make_folder(tmp_path / "p", {"a/0.png": b"", "a/1.png": b"x"})
    with pytest.raises(UserError, match="none of 2 images could be read: correct the source; the first error: a/"):
        run(tmp_path / "p", tokenizer, tmp_path / "out", subset=None)


def test_missing_and_empty_source(tokenizer, tmp_path):
    with pytest.raises(UserError, match="does not exist: give a folder of images"):
        run(tmp_path / "none", tokenizer, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        run(tmp_path / "empty", tokenizer, tmp_path / "out", subset=None)
    assert not (tmp_path / "out").exists()


def test_bad_settings(images, tokenizer, tmp_path):
    for changes, message in (
        ({"crops": "five"}, "crops 'five' is unknown: use ten:1.1"),
        ({"crops": "ten:0.5"}, "crops 'ten:0.5' is unknown"),
        ({"crops": "ten:x"}, "crops 'ten:x' is unknown"),
        ({"shard_size": 0}, "shard_size 0 must be at least 1"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown: use fp32 or bf16"),
    ):
        with pytest.raises(UserError, match=message):
            run(images, tokenizer, tmp_path / "out", **changes)
    with pytest.raises(UserError, match="tokenizer .* does not exist"):
        run(images, tmp_path / "none.safetensors", tmp_path / "out")
    large = TokenizerConfig(**{**vars(TINY), "codebook_size": 300000})
    save_tokenizer(VQModel(large), tmp_path / "large.safetensors", {})
    with pytest.raises(UserError, match="has 300000 codes, shards store at most 262144"):
        run(images, tmp_path / "large.safetensors", tmp_path / "out")


def test_foreign_folder(images, tokenizer, tmp_path):
    make_folder(tmp_path / "out", {"thesis.txt": b"precious"})
    with pytest.raises(UserError, match="holds other files, for example 'thesis.txt': give a new or an empty folder"):
        run(images, tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == {"thesis.txt": b"precious"}


# Crops and batches ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("crops", "views"), [("ten:1.1", 10), ("ten", 10), ("center-flip", 2), ("center", 1)])
def test_crops(images, tokenizer, tmp_path, crops, views):
    make, stored = parse_crops(crops)
    image = ImageSet(images, "train").read(3)
    made = make(image, 16)
    assert stored == views and made.shape == (views, 16, 16, 3) and made.dtype == np.uint8
    if views == 2:
        np.testing.assert_array_equal(made[1], made[0][:, ::-1])
    manifest = run(images, tokenizer, tmp_path / "out", crops=crops)
    assert manifest.views == views and manifest.crops == crops


def test_batch_size_by_device_and_image_size():
    model = VQModel(replace(TINY))  # its own, for it is changed here
    assert ViewEncoder(model, torch.device("cpu"), torch.float32, 0).batch == 64
    model.config.image_size, model.config.channels = 256, 128
    assert ViewEncoder(model, torch.device("cpu"), torch.float32, 0).batch == 1
    assert ViewEncoder(model, torch.device("cpu"), torch.float32, 7).batch == 7
    assert ViewEncoder(VQModel(TINY), torch.device("cuda"), torch.float32, 0).batch == 64
