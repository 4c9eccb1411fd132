"""From pictures to a result: sources, features, reference, cache, distributed statistics, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file

from megastar.config.schema import TokenizerConfig
from megastar.data.pretokenize.runner import pretokenize
from megastar.encoders.efficientnet import EfficientNetLite0
from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector
from megastar.evaluation.features import EffLite0, resize
from megastar.evaluation.image_sources import load_images, open_images, source_hash
from megastar.evaluation.options import Settings
from megastar.evaluation.runner import evaluate, evaluate_collected, evaluate_reconstruction
from megastar.tokenizer.io import load_tokenizer, save_tokenizer
from megastar.tokenizer.scores import score
from megastar.tokenizer.vq import VQModel
from megastar.utils.logs import ROOT
from megastar.utils.weights.safetensors_header import read_header


@pytest.fixture(autouse=True)
def warnings_in_caplog(monkeypatch):
    monkeypatch.setattr(ROOT, "propagate", True)


def random_images(n: int, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


# Features ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def extract() -> EffLite0:
    pytest.importorskip("efficientnet_lite_pytorch")
    return EffLite0()


def test_resize_is_pillows_bicubic_without_rounding():
    for side in (64, 200):
        images = random_images(1, side)
        floats = [Image.fromarray(images[0, :, :, c].astype(np.float32)) for c in range(3)]
        expected = np.stack([np.asarray(f.resize((128, 128), Image.Resampling.BICUBIC)) for f in floats])
        got = (resize(torch.from_numpy(images))[0].numpy() + 1) * 127.5
        np.testing.assert_allclose(got, expected, atol=1e-2)
    same = random_images(1, 128)
    assert np.allclose((resize(torch.from_numpy(same)).permute(0, 2, 3, 1).numpy() + 1) * 127.5, same, atol=1e-4)


def test_features_are_those_of_the_plain_network(extract):
    images = random_images(5)
    got, spatial = extract(torch.from_numpy(images))
    assert got.shape == (5, 1280) and got.dtype == torch.float32 and spatial is None
    wide = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    wide = torch.nn.functional.interpolate(wide, size=(128, 128), mode="bicubic", antialias=True)
    with torch.no_grad():
        plain = EfficientNetLite0().net.extract_features((wide - 127) / 128).mean((2, 3)).numpy()
    np.testing.assert_allclose(got, plain, atol=1e-3)
    assert plain.std() > 0.1


# Sources -------------------------------------------------------------------------------------------------------
def folder_of(tmp_path, images, name="folder"):
    for i, pixels in enumerate(images):
        path = tmp_path / name / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / name


def test_folder_tar_and_npz_contain_the_same_images(tmp_path):
    images = random_images(6)
    images = images[[0, 2, 4, 1, 3, 5]]  # the order of the keys
    folder = folder_of(tmp_path, images[[0, 3, 1, 4, 2, 5]])
    np.savez(tmp_path / "a.npz", images)
    np.savez(tmp_path / "b.npz", images=images)
    tar = tmp_path / "c.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, "train")
        for pixels in random_images(2, seed=9):
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            member = tarfile.TarInfo(f"val/class0/{pixels[0, 0, 0]}.png")
            member.size = data.tell()
            data.seek(0)
            archive.addfile(member, data)
    for source, known in ((folder, {}), (tmp_path / "a.npz", {}), (tmp_path / "b.npz", {}), (tar, {"subset": "train"})):
        assert np.array_equal(load_images(source, **known), images)
    assert len(load_images(tar)) == 8
    assert len(load_images(folder, limit=2)) == 2 and len(load_images(tmp_path / "a.npz", limit=2)) == 2
    assert load_images(folder, size=8).shape == (6, 8, 8, 3)
    with pytest.raises(UserError, match="16 x 16 pixels, but 8 x 8 are required"):
        load_images(tmp_path / "a.npz", size=8)


def test_hash_follows_the_content_only(tmp_path):
    one, two = folder_of(tmp_path, random_images(4), "one"), folder_of(tmp_path, random_images(4), "two")
    assert source_hash(one) == source_hash(two)
    Image.fromarray(random_images(1, seed=5)[0]).save(two / "class0" / "000.png")
    assert source_hash(one) != source_hash(two)


def test_unreadable_images_are_skipped_with_a_warning(tmp_path, caplog):
    folder = folder_of(tmp_path, random_images(3))
    (folder / "class0" / "zzz.png").write_bytes(b"no image")
    assert len(load_images(folder)) == 3
    assert "skipped 1 of 4 images" in caplog.text and "zzz" in caplog.text
    for path in folder.rglob("0*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of its 4 images can be read"):
        load_images(folder)
    with pytest.raises(UserError, match="none of 4 images can be read; the first: class0"):
        load_images(folder, size=16)


def test_bad_npz_files_have_their_sentence(tmp_path):
    with pytest.raises(UserError, match="none.npz does not exist: name a folder, a .tar, an .npz or token shards"):
        load_images(tmp_path / "none.npz")
    path = tmp_path / "x.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a readable .npz"):
        load_images(path)
    np.savez(path, codes=np.zeros(3))
    with pytest.raises(UserError, match="contains codes: expected arr_0 or images"):
        load_images(path)
    np.savez(path, random_images(3).astype(np.float32))
    with pytest.raises(UserError, match=r"arr_0 is float32 \(3, 16, 16, 3\), expected uint8"):
        load_images(path)
    np.savez(path, np.array([{}], dtype=object))
    with pytest.raises(UserError, match="arr_0 contains Python objects, which can run code when loaded"):
        load_images(path)
    np.savez(path, np.asfortranarray(random_images(3)))
    with pytest.raises(UserError, match="Fortran order"):
        load_images(path)
    short = io.BytesIO()
    np.save(short, random_images(3))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", short.getvalue()[:-5])
    with pytest.raises(UserError, match=r"arr_0 has the shape \(3, 16, 16, 3\) of uint8 but 2299 bytes"):
        load_images(path)


def test_an_npz_is_never_whole_in_memory(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", random_images(20), np.arange(20) % 4)
    read = []
    plain = zipfile.ZipExtFile.read

    def watched(self, n=-1):
        read.append(n)
        return plain(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)
    source = open_images(tmp_path / "x.npz", limit=11)
    batches = list(source.batches(4))
    assert [len(b) for b in batches] == [4, 4, 3] and max(read) == 4 * 16 * 16 * 3 and min(read) > 0
    assert np.array_equal(np.concatenate(batches), random_images(20)[:11])
    monkeypatch.undo()
    assert source.labels().tolist() == [i % 4 for i in range(11)]


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        evaluate(tmp_path / "nothing", tmp_path / "nothing")


class Fewer(EffLite0):
    """The whole path with 12 of the 1280 features: eigenvalues of 1280 take a second each."""

    def __call__(self, pixels, spatial=False):
        return super().__call__(pixels)[0][:, :12], None


@pytest.fixture
def fewer_features(extract, monkeypatch):
    monkeypatch.setattr("megastar.evaluation.features.EffLite0", Fewer)


# The whole score -----------------------------------------------------------------------------------------------
def test_evaluate_writes_a_reproducible_result(tmp_path, monkeypatch, caplog, fewer_features):
    real = folder_of(tmp_path, random_images(14, 20))
    np.savez(tmp_path / "made.npz", random_images(9, 16, seed=1), np.arange(9) % 4)
    out, text = tmp_path / "new" / "score.json", io.StringIO()
    known = {"cache": tmp_path / "cache", "out": out, "provenance": {"seed": 3, "cfg_scale": 2.0}, "batch": 4}
    first = evaluate(tmp_path / "made.npz", real, console=Console(file=text, width=200), **known)
    assert json.loads(out.read_text()) == first
    assert first["metric"] == "FD-EffLite0" and first["value"] > 0 and first["floor"] > 0
    assert first["scores"] == {"FD-EffLite0": first["value"]}
    assert first["generated"]["pictures"] == 9 and first["real"]["pictures"] == 14 and first["real"]["size"] == 16
    assert first["generated"]["classes"] == {"classes": 4, "fewest": 2, "most": 3}
    assert first["provenance"] == {"seed": 3, "cfg_scale": 2.0} and len(first["features"]["weights_sha256"]) == 64
    assert first["not_recorded"] == ["label_plan", "weights", "dtype"]
    assert "provenance of the images is incomplete: label_plan, weights, dtype" in caplog.text
    assert {"torch", "numpy", "python", "megastar", "pillow"} <= first["versions"].keys()
    assert first["real"]["sha256"] == source_hash(real)
    assert "only 9 generated images: below 5000" in first["warnings"][0] and "only 14 real" in first["warnings"][1]
    assert first["warnings"][0] in caplog.messages
    assert "FD-EffLite0" in text.getvalue() and "floor" in text.getvalue() and "FID" not in text.getvalue()

    def never(*_):
        raise AssertionError("the real set was read again")

    with monkeypatch.context() as patch:  # the real set comes from the cache
        patch.setattr("megastar.evaluation.image_sources.FolderImages.batches", never)
        again = evaluate(tmp_path / "made.npz", real, **known)
    assert (again["value"], again["floor"]) == (first["value"], first["floor"])
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"broken")
    assert evaluate(tmp_path / "made.npz", real, **known)["value"] == first["value"]
    other_batch = evaluate(tmp_path / "made.npz", real, **known | {"batch": 5, "cache": tmp_path / "other"})
    assert other_batch["value"] == pytest.approx(first["value"], rel=1e-5)  # fp32 sums in the network

    same = evaluate(real, real, cache=tmp_path / "cache")
    assert same["value"] < 1e-3 < same["floor"]


@pytest.mark.parametrize("damage", ["NaN", "a bit of the mean", "a bit of the features", "the count", "no hash"])
def test_a_cache_whose_arrays_differ_from_their_hash_is_computed_again(tmp_path, fewer_features, caplog, damage):
    np.savez(tmp_path / "made.npz", random_images(9))
    np.savez(tmp_path / "real.npz", random_images(14, seed=5))
    known = {"cache": tmp_path / "c", "metrics": ["fd", "kid"], "settings": Settings(kid_subsets=3, kid_size=5)}
    first = evaluate(tmp_path / "made.npz", tmp_path / "real.npz", **known)
    (file,) = (tmp_path / "c").iterdir()
    caplog.clear()
    again = evaluate(tmp_path / "made.npz", tmp_path / "real.npz", **known)
    assert again["scores"] == first["scores"] and "computed again" not in caplog.text
    whole, arrays = file.read_bytes(), load_file(file)
    metadata = {} if damage == "no hash" else read_header(file)[0]
    assert metadata or damage == "no hash"
    if damage == "NaN":
        arrays["scatter"][0, 0] = np.nan
    elif damage != "no hash":
        name = {"a bit of the mean": "mean", "a bit of the features": "features", "the count": "count"}[damage]
        arrays[name].view(np.uint8).flat[6 if name == "mean" else 2 if name == "features" else 0] ^= 4
    save_file(arrays, file, metadata)
    assert file.read_bytes() != whole
    again = evaluate(tmp_path / "made.npz", tmp_path / "real.npz", **known)
    assert again["scores"] == first["scores"] and file.read_bytes() == whole
    reason = "records no hash of its arrays" if damage == "no hash" else "its arrays differ from their hash"
    assert f"the cached features {file} of the real set are computed again: it" in caplog.text and reason in caplog.text


def test_the_samplers_record_is_part_of_the_provenance(tmp_path, fewer_features):
    np.savez(tmp_path / "made.npz", random_images(9))
    sidecar = tmp_path / "made.npz.json"
    sidecar.write_text(
        json.dumps({"label_plan": "balanced", "cfg_scale": 1.5, "weights": "w", "dtype": "bf16", "seed": 0, "a": 1})
    )
    result = evaluate(tmp_path / "made.npz", tmp_path / "made.npz", cache=tmp_path / "c", provenance={"a": 2})
    assert result["not_recorded"] == [] and result["provenance"]["label_plan"] == "balanced"
    assert result["provenance"]["a"] == 2 and result["generated"]["classes"] is None
    sidecar.write_text(json.dumps({"identity": {"count": 8}, "about": {}}))
    with pytest.raises(UserError, match="made.npz.json records 8 images, but .*made.npz contains 9: remove the wrong"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz")
    sidecar.write_text("[1]")
    with pytest.raises(UserError, match="is damaged: the content is a list"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz")
    sidecar.write_text("{")
    with pytest.raises(UserError, match="it is not JSON"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz")


def test_all_scores_of_custom_features(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "def mean(pixels):\n    return pixels.float().mean((1, 2))\n\ndef flat(pixels):\n    return pixels.flatten(1)[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    made, real = random_images(40, 8), random_images(50, 8, seed=1)
    np.savez("made.npz", made)
    np.savez("real.npz", real)
    known = {"cache": tmp_path / "c", "settings": Settings(kid_subsets=5, kid_size=20), "metrics": ["fd", "pr", "kid"]}
    result = evaluate("made.npz", "real.npz", features="my_features:mean", **known)
    suffix = "my_features:mean"
    assert list(result["scores"]) == [f"{n}-{suffix}" for n in ("FD", "precision", "recall", "KD")]
    m, c = ((x.mean((1, 2)).mean(0), np.cov(x.mean((1, 2)), rowvar=False)) for x in (made, real))
    trace = np.sqrt(np.linalg.eigvals(m[1] @ c[1]).real).sum()
    expected = ((m[0] - c[0]) ** 2).sum() + np.trace(m[1] + c[1]) - 2 * trace
    assert result["value"] == pytest.approx(expected, rel=1e-4)
    for features, message in (
        ("my_features:flat", r"returned torch.uint8 \(192,\) for 32 images: return a tensor"),
        ("my_features:none", "has no attribute 'none'"),
        ("nowhere:x", "No module named 'nowhere'"),
        ("resnet", "unknown features 'resnet': choose efflite0"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate("made.npz", "real.npz", features=features, **known)


def test_too_few_and_oblong_images(tmp_path, extract):
    np.savez(tmp_path / "made.npz", random_images(3))
    with pytest.raises(UserError, match="3 images, but fd requires 4; use 5000 or more"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz")
    np.savez(tmp_path / "made.npz", random_images(5)[:, :8])
    with pytest.raises(UserError, match="16 x 8 pixels; crop them to squares first"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz")
    np.savez(tmp_path / "made.npz", random_images(30))
    with pytest.raises(UserError, match="30 images, but kid requires 1000"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz", metrics=["kid"])
    with pytest.raises(
        UserError, match=r"'fid' is not available with these features: use fd, kid, pr; .* require --inception"
    ):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz", metrics=["fid"])
    with pytest.raises(UserError, match="unknown metric 'fad': choose from fid"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz", metrics=["fad"])


def test_a_reference_that_does_not_fit_is_rejected(tmp_path, fewer_features):
    made, real = tmp_path / "made.npz", tmp_path / "real.npz"
    np.savez(made, random_images(6))
    np.savez(real, random_images(6, 8))
    with pytest.raises(UserError, match="8 x 8 pixels, but 16 x 16 are required"):
        evaluate(made, real, cache=tmp_path)
    np.savez(real, random_images(6))
    evaluate(made, real, cache=tmp_path, real_sha256=source_hash(real).upper())
    with pytest.raises(UserError, match=f"has the SHA-256 {source_hash(real)}, not the expected abcd"):
        evaluate(made, real, cache=tmp_path, real_sha256="abcd")
    with pytest.raises(UserError, match="none.npz does not exist: name a folder"):
        evaluate(made, tmp_path / "none.npz", cache=tmp_path)
    np.savez(real, mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float16))
    with pytest.raises(UserError, match="contains only Inception's statistics: pass --inception FILE"):
        evaluate(made, real, cache=tmp_path)


def test_scores_of_collected_features_are_those_of_the_file(tmp_path, fewer_features):
    made, real = random_images(11), tmp_path / "real.npz"
    np.savez(real, random_images(12, seed=1))
    np.savez(tmp_path / "made.npz", made)
    stream = Collector(Fewer())
    for some in np.array_split(made, 3):
        stream.update(torch.from_numpy(some))
    got = evaluate_collected(
        stream.finish(), real, cache=tmp_path, out=tmp_path / "o.json", provenance={"dtype": "fp32"}
    )
    wanted = evaluate(tmp_path / "made.npz", real, cache=tmp_path)
    assert got["value"] == pytest.approx(wanted["value"], rel=1e-5) and got["generated"]["pictures"] == 11
    assert "dtype" not in got["not_recorded"] and got["floor"] == wanted["floor"]


# Tokenizers ----------------------------------------------------------------------------------------------------
def tokenizer_file(tmp_path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    file = tmp_path / f"tokenizer{seed}.safetensors"
    save_tokenizer(VQModel(TokenizerConfig(16, 8, [1, 1, 1], 1, 8, 32, 4, norm_groups=4)), file, {})
    return file


def test_reconstruction_mode_agrees_with_the_trainers_score(tmp_path, fewer_features):
    file = tokenizer_file(tmp_path)
    np.savez(tmp_path / "real.npz", random_images(10))
    got = evaluate_reconstruction(file, tmp_path / "real.npz", batch=4, cache=tmp_path, out=tmp_path / "r.json")
    wanted = score(load_tokenizer(file), torch.from_numpy(random_images(10)))
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-6)
    assert got["value"] > 0 and len(got["tokenizer"]["sha256"]) == 64 and got["not_recorded"] == []
    part = evaluate_reconstruction(file, tmp_path / "real.npz", limit=6, cache=tmp_path)
    assert part["real"]["pictures"] == 6


def test_token_shards_are_a_reference_of_reconstructions(tmp_path, fewer_features):
    file, folder = tokenizer_file(tmp_path), folder_of(tmp_path, random_images(7))
    pretokenize(folder, None, file, tmp_path / "codes", crops="center")
    known = {"cache": tmp_path / "cache", "real_tokenizer": file}
    result = evaluate(folder, tmp_path / "codes", **known)
    rebuilt = evaluate_reconstruction(file, folder, cache=tmp_path / "cache")
    assert result["value"] == pytest.approx(rebuilt["value"], rel=1e-4)  # the distance is symmetric
    assert result["real"]["pictures"] == 7 and result["real"]["tokenizer"] == str(file)
    with pytest.raises(UserError, match="name the tokenizer that decodes them with --real-tokenizer"):
        evaluate(folder, tmp_path / "codes")
    with pytest.raises(UserError, match="name the tokenizer that encoded them"):
        evaluate(folder, tmp_path / "codes", real_tokenizer=tokenizer_file(tmp_path, 1))
    source = open_images(tmp_path / "codes", tokenizer=file)
    assert sorted(source.labels().tolist()) == [0, 0, 0, 0, 1, 1, 1] and source.height == 16
