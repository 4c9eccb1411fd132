"""Scores against closed forms and slow references; sources, cache and result files; the linear probe."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.evaluation import runner
from megastar.evaluation.features import DIM, FeatureExtractor, resize
from megastar.evaluation.frechet import Statistics, finite_sample_floor, frechet_distance, statistics
from megastar.evaluation.linear_probe import fit_probes, linear_probe, probe_features, probe_positions
from megastar.evaluation.pictures import load_images, source_hash
from megastar.evaluation.runner import evaluate, evaluate_reconstruction
from megastar.model.transformer import Transformer
from megastar.tokenizer.efficientnet import EfficientNetLite0
from megastar.tokenizer.io import load_tokenizer, save_tokenizer
from megastar.tokenizer.train import score
from megastar.tokenizer.vq import VQModel


def pictures(n: int, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


# Frechet distance ----------------------------------------------------------------------------------------------
def random_statistics(rng: np.random.Generator, f: int, n: int) -> Statistics:
    return statistics(rng.normal(size=(n, f)) @ rng.normal(size=(f, f)) + rng.normal(size=f))


def test_diagonal_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    m, n, a, b = rng.normal(size=(4, 7))
    expected = ((m - n) ** 2).sum() + ((np.abs(a) - np.abs(b)) ** 2).sum()
    got = frechet_distance(Statistics(m, np.diag(a**2), 9), Statistics(n, np.diag(b**2), 9))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [200, 6])  # 6 vectors of 12 numbers: singular covariances
def test_distance_against_eigenvalues_of_the_plain_product(n):
    rng = np.random.default_rng(1)
    a, b = random_statistics(rng, 12, n), random_statistics(rng, 12, n)
    product = a.covariance @ b.covariance  # not symmetric; its eigenvalues are real and not negative
    trace = np.sqrt(np.linalg.eigvals(product).real.clip(0)).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5 if n == 6 else 1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_distance_against_a_matrix_square_root():
    rng = np.random.default_rng(2)
    a, b = random_statistics(rng, 10, 100), random_statistics(rng, 10, 100)
    root, inverse = a.covariance @ b.covariance, np.eye(10)
    for _ in range(30):  # Denman and Beavers: root -> (C_a C_b)^(1/2)
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    np.testing.assert_allclose(root @ root, a.covariance @ b.covariance, rtol=1e-6)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_identical_sets_score_zero_and_statistics_are_numpys():
    x = np.random.default_rng(3).normal(size=(50, 9)).astype(np.float32)
    s = statistics(x)
    np.testing.assert_allclose(s.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)
    assert 0 <= frechet_distance(s, s) < 1e-9
    with pytest.raises(ValueError, match="at least 2"):
        statistics(x[:1])
    x[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        statistics(x)


def test_floor_is_of_disjoint_halves():
    x = np.random.default_rng(4).normal(size=(401, 6))
    floor, half = finite_sample_floor(x, seed=1)
    order = np.random.default_rng(1).permutation(401)
    assert half == 200 and floor > 0
    assert floor == frechet_distance(statistics(x[order[:200]]), statistics(x[order[200:400]]))
    assert floor != finite_sample_floor(x, seed=2)[0]


# Features ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def extract() -> FeatureExtractor:
    pytest.importorskip("efficientnet_lite_pytorch")
    return FeatureExtractor()


def test_resize_is_pillows_bicubic_without_rounding():
    for side in (64, 200):
        some = pictures(1, side)
        floats = [Image.fromarray(some[0, :, :, c].astype(np.float32)) for c in range(3)]
        expected = np.stack([np.asarray(f.resize((128, 128), Image.Resampling.BICUBIC)) for f in floats])
        got = (resize(torch.from_numpy(some))[0].numpy() + 1) * 127.5
        np.testing.assert_allclose(got, expected, atol=1e-2)
    same = pictures(1, 128)
    assert np.allclose((resize(torch.from_numpy(same)).permute(0, 2, 3, 1).numpy() + 1) * 127.5, same, atol=1e-4)


def test_features_are_those_of_the_plain_network(extract):
    some = pictures(5)
    got = extract(some, batch=2)
    assert got.shape == (5, DIM) and got.dtype == np.float32
    wide = torch.from_numpy(some).permute(0, 3, 1, 2).float()
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


def test_folder_tar_and_npz_hold_the_same_pictures(tmp_path):
    images = pictures(6)
    images = images[[0, 2, 4, 1, 3, 5]]  # the order of the keys
    folder = folder_of(tmp_path, images[[0, 3, 1, 4, 2, 5]])
    np.savez(tmp_path / "a.npz", images)
    np.savez(tmp_path / "b.npz", images=images)
    tar = tmp_path / "c.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, "train")
        for pixels in pictures(2, seed=9):
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
    with pytest.raises(UserError, match="16 x 16 pixels, 8 x 8 are needed"):
        load_images(tmp_path / "a.npz", size=8)


def test_hash_follows_the_content_only(tmp_path):
    one, two = folder_of(tmp_path, pictures(4), "one"), folder_of(tmp_path, pictures(4), "two")
    assert source_hash(one) == source_hash(two)
    Image.fromarray(pictures(1, seed=5)[0]).save(two / "class0" / "000.png")
    assert source_hash(one) != source_hash(two)


def test_unreadable_pictures_are_left_out_and_named(tmp_path):
    folder = folder_of(tmp_path, pictures(3))
    (folder / "class0" / "zzz.png").write_bytes(b"no picture")
    text = io.StringIO()
    assert len(load_images(folder, console=Console(file=text, width=200))) == 3
    assert "1 of 4 pictures left out" in text.getvalue() and "zzz" in text.getvalue()
    for path in folder.rglob("0*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of (its )?4 pictures can be read"):
        load_images(folder)
    with pytest.raises(UserError, match="none of 4 pictures can be read; the first: class0"):
        load_images(folder, size=16)


def test_bad_npz_files_have_their_sentence(tmp_path):
    with pytest.raises(UserError, match="do not exist"):
        load_images(tmp_path / "none.npz")
    path = tmp_path / "x.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a readable .npz"):
        load_images(path)
    np.savez(path, codes=np.zeros(3))
    with pytest.raises(UserError, match="holds codes: expected arr_0 or images"):
        load_images(path)
    np.savez(path, pictures(3).astype(np.float32))
    with pytest.raises(UserError, match=r"arr_0 is float32 \(3, 16, 16, 3\), expected uint8"):
        load_images(path)
    np.savez(path, np.array([{}], dtype=object))
    with pytest.raises(UserError, match="not a readable .npz"):
        load_images(path)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        evaluate(tmp_path / "nothing", tmp_path / "nothing")


@pytest.fixture
def fewer_features(extract, monkeypatch):
    """The whole path with 12 of the 1280 features: eigenvalues of 1280 take a second each."""

    class Fewer(FeatureExtractor):
        def __call__(self, *args, **known):
            return np.ascontiguousarray(super().__call__(*args, **known)[:, :12])

    monkeypatch.setattr(runner, "FeatureExtractor", Fewer)


# The whole score -----------------------------------------------------------------------------------------------
def test_evaluate_writes_a_result_that_can_be_repeated(tmp_path, monkeypatch, fewer_features):
    real = folder_of(tmp_path, pictures(14, 20))
    np.savez(tmp_path / "made.npz", pictures(9, 16, seed=1))
    out, text = tmp_path / "new" / "score.json", io.StringIO()
    known = {"cache": tmp_path / "cache", "out": out, "provenance": {"seed": 3}}
    first = evaluate(tmp_path / "made.npz", real, console=Console(file=text, width=200), **known)
    assert json.loads(out.read_text()) == first
    assert first["metric"] == "FD-EffLite0" and first["value"] > 0 and first["floor"] > 0
    assert first["generated"]["pictures"] == 9 and first["real"]["pictures"] == 14 and first["real"]["size"] == 16
    assert first["provenance"] == {"seed": 3} and len(first["features"]["weights_sha256"]) == 64
    assert {"torch", "numpy", "python", "megastar"} <= first["versions"].keys()
    assert first["real"]["sha256"] == source_hash(real)
    assert "only 9 scored pictures: below 5000" in first["warnings"][0] and "only 14 real" in first["warnings"][1]
    assert "FD-EffLite0" in text.getvalue() and "floor" in text.getvalue() and "FID" not in text.getvalue()

    def never_real(path, **known):
        assert path != real
        return load_images(path, **known)

    with monkeypatch.context() as patch:  # the real set comes from the cache
        patch.setattr(runner, "load_images", never_real)
        again = evaluate(tmp_path / "made.npz", real, **known)
    assert (again["value"], again["floor"]) == (first["value"], first["floor"])
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"broken")
    assert evaluate(tmp_path / "made.npz", real, **known)["value"] == pytest.approx(first["value"])

    same = evaluate(real, real, cache=tmp_path / "cache")
    assert same["value"] < 1e-3 < same["floor"]


def test_too_few_and_oblong_pictures(tmp_path):
    np.savez(tmp_path / "made.npz", pictures(3))
    with pytest.raises(UserError, match="3 pictures cannot be scored; 5000 or more"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz")
    np.savez(tmp_path / "made.npz", pictures(5)[:, :8])
    with pytest.raises(UserError, match="16 x 8 pixels: only square pictures"):
        evaluate(tmp_path / "made.npz", tmp_path / "made.npz")


def test_reconstruction_mode_agrees_with_the_trainers_score(tmp_path, fewer_features):
    torch.manual_seed(0)
    file = tmp_path / "tokenizer.safetensors"
    save_tokenizer(VQModel(TokenizerConfig(16, 8, [1, 1, 1], 1, 8, 32, 4, norm_groups=4)), file, {})
    np.savez(tmp_path / "real.npz", pictures(10))
    got = evaluate_reconstruction(file, tmp_path / "real.npz", batch=4, cache=tmp_path, out=tmp_path / "r.json")
    wanted = score(load_tokenizer(file), torch.from_numpy(pictures(10)))
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-6)
    assert got["value"] > 0 and len(got["tokenizer"]["sha256"]) == 64
    part = evaluate_reconstruction(file, tmp_path / "real.npz", limit=6, cache=tmp_path)
    assert part["real"]["pictures"] == 6


# Linear probe --------------------------------------------------------------------------------------------------
CFG = ModelConfig(name="t", n_layer=3, n_head=2, dim=16, multiple_of=16, vocab_size=11, num_classes=3, image_tokens=16)


def test_positions_are_the_papers():
    assert probe_positions(256) == [32, 64, 96, 128, 160, 192, 224, 256]
    assert probe_positions(64, 4) == [16, 32, 48, 64]


def test_probe_features_are_the_blocks_output_with_the_null_class():
    torch.manual_seed(0)
    model = Transformer(CFG).train()  # dropout must be off while features are read
    codes = np.random.default_rng(0).integers(0, 11, (5, 16)).astype(np.uint16)
    got = probe_features(model, codes, block=2, positions=[4, 16], batch=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        whole = model(torch.full((5,), 3), torch.from_numpy(codes.astype(np.int64))[:, :-1], features_at=2).features
    torch.testing.assert_close(got, whole[:, [3, 15]])


def test_probe_learns_where_the_class_is_and_nothing_where_it_is_not():
    torch.manual_seed(0)
    labels = torch.randint(4, (700,))
    x = 3 + 5 * torch.randn(700, 2, 12)  # BatchNorm must take the offset and the scale away
    x[:, 1, :4] += 25 * torch.nn.functional.one_hot(labels, 4)

    def fit(seed: int) -> torch.Tensor:
        return fit_probes(x[:500], labels[:500], x[500:], labels[500:], 4, epochs=30, batch=100, lr=0.1, seed=seed)

    accuracy = fit(0)
    assert accuracy[1] > 0.95 and accuracy[0] < 0.4
    assert torch.equal(accuracy, fit(0))


def test_probe_gradient_is_autograds():
    """One step without momentum equals autograd's on BatchNorm1d + Linear."""
    torch.manual_seed(0)
    x, labels = torch.randn(40, 1, 6), torch.randint(3, (40,))
    init = torch.nn.init.trunc_normal_(torch.empty(1, 6, 3), std=0.01, generator=torch.Generator().manual_seed(5))
    norm, linear = torch.nn.BatchNorm1d(6, eps=1e-6, affine=False), torch.nn.Linear(6, 3)
    with torch.no_grad():
        linear.weight.copy_(init[0].t())
        linear.bias.zero_()
    torch.nn.functional.cross_entropy(linear(norm(x[:, 0])), labels).backward()
    with torch.no_grad():
        for p in linear.parameters():
            p -= 0.5 * p.grad
    expected = (linear(norm.eval()(x[:, 0])).argmax(-1) == labels).double().mean()
    got = fit_probes(x, labels, x, labels, 3, epochs=1, batch=40, lr=0.5, seed=5)
    assert got.item() == pytest.approx(expected.item())


def test_linear_probe_result_and_errors():
    torch.manual_seed(0)
    model = Transformer(CFG)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    codes = ((labels * 3)[:, None] + rng.integers(0, 3, (60, 16))).astype(np.uint16)  # the codes tell the class
    args = [model, codes[:40], labels[:40], codes[40:], labels[40:]]
    text = io.StringIO()
    result = linear_probe(*args, block=2, positions=4, epochs=20, batch=20, console=Console(file=text, width=100))
    assert result["positions"] == [4, 8, 12, 16] and len(result["accuracy"]) == 4
    assert result["accuracy"][-1] > 0.8 and result["train_pictures"] == 40 and result["lr"] == 0.1 * 20 / 256
    assert "linear probe" in text.getvalue()
    for change, message in (
        ({"block": 4}, r"block 4 is outside 1\.\.3"),
        ({"block": 1, "positions": 17}, "17 positions"),
    ):
        with pytest.raises(UserError, match=message):
            linear_probe(*args, **change)
    for i, value, message in (
        (1, codes[:40, :9], r"training codes \(40, 9\)"),
        (4, labels[:5], r"labels \(5,\)"),
        (3, codes[40:] + 9, "validation codes go up to 1[0-9], the model's vocabulary ends at 10"),
        (2, labels[:40] + 1, r"training classes lie in 1\.\.3, the model's in 0\.\.2"),
    ):
        bad = list(args)
        bad[i] = value
        with pytest.raises(UserError, match=message):
            linear_probe(*bad, block=1)
