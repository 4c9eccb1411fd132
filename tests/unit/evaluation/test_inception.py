"""FID's Inception network: its input, its blocks, its file, and ADM's suite through it with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megastar.cli import main
from megastar.errors import UserError
from megastar.evaluation import inception as module
from megastar.evaluation.features import Inception
from megastar.evaluation.inception import (
    SHA256,
    FIDInceptionV3,
    InceptionE,
    from_state,
    load_inception,
    mean3,
    resize_tf1,
    scale,
)
from megastar.evaluation.options import EvaluationOptions
from megastar.evaluation.reference import read_reference


def random_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep the activations' size through the network, and BatchNorms that are not the identity."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in FIDInceptionV3().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape) + 0.5
        elif not name.endswith("num_batches_tracked"):  # older files lack it
            state[name] = torch.randn(shape) * 0.1
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_state(), file)
    return file


@pytest.fixture(scope="module")
def digest(weights):
    return module.sha256(weights)


def pictures(n: int, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


# Input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(5, 8), (64, 64), (299, 299), (400, 310)])
def test_resize_is_tensorflow_ones(size):
    """Output i reads input i * in / out, between floor and floor + 1, the last pixel repeated: by scalar loops."""
    image = np.random.default_rng(0).uniform(0, 255, size)
    got = resize_tf1(torch.from_numpy(image)[None, None].float(), 299)[0, 0].numpy()
    height, width = size
    for i, j in [(0, 0), (1, 2), (150, 77), (297, 298), (298, 298)]:
        y, x = i * height / 299, j * width / 299
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * (x - x0)
        bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * (x - x0)
        assert got[i, j] == pytest.approx(top + (bottom - top) * (y - y0), abs=2e-2)


def test_scale_is_the_graphs():
    at_size = torch.from_numpy(pictures(1, 299))
    assert torch.equal(scale(at_size), (at_size.permute(0, 3, 1, 2).float() - 128) / 128)


# Network -------------------------------------------------------------------------------------------------------
def test_folding_changes_nothing_and_the_spatial_features_are_mixed_6ds_first():
    state = random_state()
    plain = FIDInceptionV3().eval()
    plain.load_state_dict(state, strict=False)
    seen = {}
    plain.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.update(six=o))
    x = scale(torch.from_numpy(pictures(2)))
    with torch.no_grad():
        pool, spatial = plain(x)
        fused, fused_spatial = from_state(state)(x)
        logits = plain.logits(pool)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and pool.std() > 0.1
    torch.testing.assert_close(fused, pool, rtol=1e-4, atol=1e-4 * pool.abs().max().item())
    torch.testing.assert_close(fused_spatial, spatial, rtol=1e-4, atol=1e-4 * spatial.abs().max().item())
    assert torch.equal(spatial, torch.einsum("bchw->bhwc", seen["six"][:, :7]).reshape(2, -1))
    torch.testing.assert_close(logits, plain.fc(pool) - plain.fc.bias, rtol=1e-4, atol=1e-3)


def test_pools_exclude_the_padding_and_the_last_block_uses_a_max_pool():
    ones = torch.ones(1, 4, 5, 5)
    torch.testing.assert_close(mean3(ones), ones)  # with padding in the mean a corner is 4 / 9
    torch.manual_seed(0)
    x = torch.rand(1, 4, 6, 6)
    for by_maximum in (False, True):
        block = InceptionE(4, by_maximum).eval()
        pooled = F.max_pool2d(x, 3, 1, 1) if by_maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        with torch.no_grad():
            assert torch.equal(block(x)[:, -192:], block.branch_pool(pooled)) and block(x).shape[1] == 2048


# File ----------------------------------------------------------------------------------------------------------
def test_only_a_file_of_the_named_hash_is_opened(tmp_path, weights, digest):
    with pytest.raises(UserError, match=f"FID requires --inception FILE: download pt_inception.*SHA-256 {SHA256}"):
        load_inception(None)
    with pytest.raises(
        UserError, match="none.pth does not exist: download pt_inception-2015-12-05-6726825d.pth at github"
    ):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(UserError, match=f"has the SHA-256 {digest}, not {SHA256}.*--inception-sha256"):
        load_inception(weights)
    net, got = load_inception(weights, digest)
    assert got == digest and not any(p.requires_grad for p in net.parameters()) and not net.training
    assert SHA256.startswith("6726825d")  # as both published names say


def test_hostile_truncated_and_other_files_are_rejected(tmp_path, weights):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    def refused(file):
        with pytest.raises(UserError) as error:
            load_inception(file, module.sha256(file))
        return str(error.value)

    evil = tmp_path / "evil.pth"
    torch.save({"fc.weight": Evil()}, evil)
    assert "contains objects other than tensors" in refused(evil) and not (tmp_path / "ran").exists()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:100_000])
    assert "is damaged" in refused(cut)
    torch.save([torch.zeros(1)], cut)
    assert "is not a dictionary of tensors" in refused(cut)
    state = random_state()
    state["fc.weight"] = torch.zeros(1000, 2048)
    del state["Mixed_5b.branch1x1.conv.weight"]
    torch.save({"state_dict": state}, cut)
    expected = "1 missing (Mixed_5b.branch1x1.conv.weight) and 1 with a different shape (fc.weight (1000, 2048))"
    assert expected in refused(cut)


# ADM's suite ---------------------------------------------------------------------------------------------------
def test_the_suite_on_published_statistics(tmp_path, weights, digest, monkeypatch, capsys):
    """A VIRTUAL_*.npz through the command line: FID and sFID take its moments, precision and recall its pictures."""
    monkeypatch.setenv("MEGASTAR_CACHE", str(tmp_path / "cache"))
    made, real, out = tmp_path / "made.npz", tmp_path / "VIRTUAL.npz", tmp_path / "out.json"
    np.savez(made, pictures(5), np.arange(5) % 2)
    rng = np.random.default_rng(1)
    moments = {"mu": rng.normal(size=2048), "mu_s": rng.normal(size=2023)}
    moments |= {"sigma": np.diag(rng.uniform(size=2048)), "sigma_s": np.diag(rng.uniform(size=2023))}
    np.savez(real, arr_0=pictures(4, seed=1), **moments)
    words = ["evaluate", str(made), "--real", str(real), "--inception", str(weights), "--inception-sha256", digest]
    words += ["--device", "cpu", "--out", str(out)]
    assert main(words) == 2 and "5 images, but fid requires 2049" in capsys.readouterr().err
    words += ["--allow-few"]
    assert main(words) == 0
    result = json.loads(out.read_text())
    name = f"@{digest[:8]}"  # not the published weights: the numbers must not look like FID
    assert list(result["scores"]) == [n + name for n in ("FID", "sFID", "IS", "precision", "recall")]
    net = Inception(weights, "cpu", digest)
    pool, spatial = (x.double().numpy() for x in net(torch.from_numpy(pictures(5)), spatial=True))
    for score, x, m in (("FID", pool, "mu"), ("sFID", spatial, "mu_s")):
        # with a diagonal C_r, tr((C C_r)^(1/2)) is the sum of the singular values of X C_r^(1/2) / sqrt(n - 1)
        spread = np.diag(moments["sigma" + m[2:]])
        centred = x - x.mean(0)
        trace = np.linalg.svd(centred * np.sqrt(spread), compute_uv=False).sum() / np.sqrt(4)
        expected = ((x.mean(0) - moments[m]) ** 2).sum() + (centred**2).sum() / 4 + spread.sum() - 2 * trace
        assert result["scores"][score + name] == pytest.approx(expected, rel=1e-5)
    p = torch.softmax(net.logits(torch.from_numpy(pool).float()).double(), 1)
    assert result["scores"]["IS" + name] == pytest.approx(
        (p * (p / p.mean(0)).log()).sum(1).mean().exp().item(), rel=1e-4
    )
    assert result["real"]["statistics"] == "mu and sigma of the file" and result["real"]["pictures"] == 4
    assert result["features"]["weights_sha256"] == digest and not result["features"]["published"]
    assert any("papers use 50000" in w for w in result["warnings"])
    assert any("mu and sigma are from the published Inception file" in w for w in result["warnings"])
    assert "--allow-few" in result["provenance"]["command"]


def test_references_without_what_a_metric_needs(tmp_path, weights, digest):
    net, real = Inception(weights, "cpu", digest), tmp_path / "real.npz"

    def read(keep=False, spatial=False):
        return read_reference(real, 16, net, EvaluationOptions(cache=tmp_path), keep=keep, spatial=spatial)

    np.savez(real, mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    assert read().metadata["size"] == "not recorded in the file" and read().stats.covariance.dtype == np.float64
    with pytest.raises(UserError, match="has no mu_s and sigma_s"):
        read(spatial=True)
    with pytest.raises(UserError, match="contains only statistics: precision, recall and KID also require images"):
        read(keep=True)
    np.savez(real, mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(
        UserError, match=r"mu is float64 \(64,\), sigma is float64 \(64, 64\); expected floats \(2048,\)"
    ):
        read()
    np.savez(real, mu=np.full(2048, np.nan), sigma=np.eye(2048))
    with pytest.raises(UserError, match="mu or sigma contains NaN"):
        read()
    np.savez(real, arr_0=pictures(5, 8), mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="8 x 8 pixels, but 16 x 16 are required"):
        read()


def test_metrics_of_inception_without_its_file(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", pictures(5))
    words = ["evaluate", str(tmp_path / "a.npz"), "--real", str(tmp_path / "a.npz"), "--metrics", "fid,kid"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "FID requires --inception FILE: download pt_inception" in error and SHA256 in error
    assert main([*words[:-2], "--inception", "x.pth", "--features", "a:b"]) == 2
    assert "--inception and --features a:b select different networks: give one" in capsys.readouterr().err
