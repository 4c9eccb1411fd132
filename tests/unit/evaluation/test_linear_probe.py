"""The linear probe: frozen features, MAE's optimizer and schedule against references, and its table and figure."""

from __future__ import annotations

import io
import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from megastar.cli import main
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.evaluation.figure import draw_probes
from megastar.evaluation.lars import LARS, learning_rate
from megastar.evaluation.linear_probe import fit_probes, linear_probe, probe_features, probe_positions
from megastar.model.transformer import Transformer
from megastar.utils.logs import ROOT
from tests.fuzz import byte_variants

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
    np.testing.assert_allclose(got, whole[:, [3, 15]], rtol=1e-5, atol=1e-6)


def test_features_in_a_file_are_those_in_memory_and_follow_what_made_them(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, codes = Transformer(CFG), np.random.default_rng(0).integers(0, 11, (5, 16)).astype(np.uint16)
    places = {"block": 2, "positions": [4, 16]}
    plain = probe_features(model, codes, **places)
    first = probe_features(model, codes, **places, cache=tmp_path)
    assert np.array_equal(first, plain) and isinstance(first, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", None)  # the second time nothing is computed
        assert np.array_equal(probe_features(model, codes, **places, cache=tmp_path), plain)
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(2)
    assert not np.array_equal(probe_features(model, codes, **places, cache=tmp_path), plain)
    other = probe_features(model, codes[:, ::-1], **places, cache=tmp_path)
    assert not np.array_equal(other, plain) and len(list(tmp_path.glob("*.npy"))) == 3


def test_probe_learns_where_the_class_is_and_nothing_where_it_is_not():
    torch.manual_seed(0)
    labels = torch.randint(4, (700,))
    x = 3 + 5 * torch.randn(700, 2, 12)  # BatchNorm must take the offset and the scale away
    x[:, 1, :4] += 25 * torch.nn.functional.one_hot(labels, 4)

    def fit(x, seed: int = 0, **known) -> torch.Tensor:
        known = {"epochs": 30, "batch": 100, "lr": 0.1, "optimizer": "sgd"} | known
        return fit_probes(x[:500], labels[:500], x[500:], labels[500:], 4, seed=seed, **known)

    for known in ({}, {"optimizer": "lars", "lr": 20.0}):
        accuracy = fit(x, **known)
        assert accuracy[1] > 0.95 and accuracy[0] < 0.4
        assert torch.equal(accuracy, fit(x, **known)) and torch.equal(accuracy, fit(x.numpy(), **known))
        alone = fit(x[:, 1:], **known)  # another initial draw, the same problem
        assert alone[0] > 0.95


def adaptive(optimizer: str):
    return {"lars": True, "sgd": False}[optimizer]


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_steps_are_a_scalar_references(optimizer):
    """Two stacked layers, three steps, against loops over Python floats written from MAE's util/lars.py."""
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 4))
    gradients = [(rng.normal(size=w.shape), rng.normal(size=b.shape)) for _ in range(3)]
    gradients[1][0][1] = 0  # a layer without a gradient keeps a ratio of 1
    decay, momentum, trust, lr = 0.1 * (optimizer == "lars"), 0.9, 0.02, 0.3
    weight, bias = torch.from_numpy(w.copy()), torch.from_numpy(b.copy())
    descent = LARS(
        [weight], [bias], momentum=momentum, weight_decay=decay, trust=trust, adaptive=adaptive(optimizer)
    )  # fmt: skip
    wanted = {}
    for layer in range(2):
        p, mu, q, nu = w[layer].copy(), np.zeros((3, 4)), b[layer].copy(), np.zeros(4)
        for g, h in gradients:
            d = g[layer] + decay * p
            if optimizer == "lars":
                size, slope = math.sqrt((p**2).sum()), math.sqrt((d**2).sum())
                d = d * (trust * size / slope if size > 0 and slope > 0 else 1)
            mu, nu = momentum * mu + d, momentum * nu + h[layer]
            p, q = p - lr * mu, q - lr * nu
        wanted[layer] = p, q
    for g, h in gradients:
        descent.step([torch.from_numpy(g), torch.from_numpy(h)], lr)
    for layer, (p, q) in wanted.items():
        np.testing.assert_allclose(weight[layer], p, rtol=1e-12)
        np.testing.assert_allclose(bias[layer], q, rtol=1e-12)


def test_the_schedule_is_maes():
    at = [learning_rate(e, 90, 6.4) for e in (0, 5, 10, 50, 90)]
    assert at == pytest.approx([0, 3.2, 6.4, 3.2, 0])
    assert learning_rate(0.5, 9, 1.0) == 0.5 and learning_rate(1, 9, 1.0) == 1  # short runs keep the proportion


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_training_is_torchs_batchnorm_and_autograd(optimizer):
    """Four steps of two positions equal BatchNorm1d + Linear trained by autograd, running statistics included."""
    torch.manual_seed(0)
    x, labels, val = torch.randn(42, 2, 6) * 3 + 1, torch.arange(42) % 3, torch.randn(64, 2, 6) * 3 + 1
    init = torch.nn.init.trunc_normal_(torch.empty(2, 6, 3), std=0.01, generator=torch.Generator().manual_seed(5))
    predicted = []
    for p in range(2):
        norm, linear = torch.nn.BatchNorm1d(6, eps=1e-6, affine=False), torch.nn.Linear(6, 3)
        with torch.no_grad():
            linear.weight.copy_(init[p].t())
            linear.bias.zero_()
        weight, bias = linear.weight.data.t().contiguous()[None], linear.bias.data[None].clone()
        descent = LARS([weight], [bias], adaptive=adaptive(optimizer))
        for step in range(4):
            linear.zero_grad()
            torch.nn.functional.cross_entropy(linear(norm(x[:, p])), labels).backward()
            descent.step([linear.weight.grad.t()[None], linear.bias.grad[None]], learning_rate(step, 4, 5.0))
            linear.weight.data.copy_(weight[0].t())
            linear.bias.data.copy_(bias[0])
        predicted.append(linear(norm.eval()(val[:, p])).argmax(-1))
    for p in range(2):  # with the reference's answers as labels, the accuracy is 1 only if all answers agree
        got = fit_probes(x, labels, val, predicted[p], 3, epochs=4, batch=42, lr=5.0, seed=5, optimizer=optimizer)
        assert got[p] == 1 and (predicted[p].bincount() > 0).all()


def test_linear_probe_result_and_errors(monkeypatch, caplog):
    monkeypatch.setattr(ROOT, "propagate", True)
    torch.manual_seed(0)
    model = Transformer(CFG)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    codes = ((labels * 3)[:, None] + rng.integers(0, 3, (60, 16))).astype(np.uint16)  # the codes tell the class
    args = [model, codes[:40], labels[:40], codes[40:], labels[40:]]
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True, color_system=None)
    options = {"optimizer": "sgd", "epochs": 20, "batch": 20, "console": console}
    result = linear_probe(*args, block=2, positions=4, **options)
    assert result["positions"] == [4, 8, 12, 16] and len(result["accuracy"]) == 4
    assert result["accuracy"][-1] > 0.8 and result["train_pictures"] == 40 and result["lr"] == 0.1 * 20 / 256
    assert "linear probe" in text.getvalue() and not caplog.messages
    other = linear_probe(*args, block=2, positions=[16, 4], **options | {"optimizer": "lars"})
    assert other["positions"] == [16, 4] and other["optimizer"] == "lars"
    assert "use --optimizer sgd, or a higher --lr" in other["warnings"][0] and set(caplog.messages) == set(
        other["warnings"]
    )
    for change, message in (
        ({"block": 4}, r"block 4 is outside 1\.\.3"),
        ({"block": 1, "positions": 17}, "17 positions"),
        ({"block": 1, "positions": [3, 0]}, r"position 0 is outside 1\.\.16"),
        ({"block": 1, "positions": []}, "0 positions: choose 1..16"),
        ({"block": 1, "optimizer": "adam"}, "unknown optimizer 'adam': choose from lars, sgd"),
    ):
        with pytest.raises(UserError, match=message):
            linear_probe(*args, **change)
    for i, value, message in (
        (1, codes[:40, :9], r"training codes \(40, 9\)"),
        (4, labels[:5], r"labels \(5,\)"),
        (3, codes[40:] + 9, "validation codes up to 1[0-9], but the model's vocabulary ends at 10"),
        (2, labels[:40] + 1, r"training labels in 1\.\.3, but the model's classes are 0\.\.2"),
    ):
        bad = list(args)
        bad[i] = value
        with pytest.raises(UserError, match=message):
            linear_probe(*bad, block=1)


# Table and figure ----------------------------------------------------------------------------------------------
def test_two_probes_become_a_table_and_a_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, accuracy in (("ar", [0.1, 0.15, 0.12]), ("star", [0.2, 0.3, 0.45])):
        result = {"block": 6, "positions": [64, 128, 256], "accuracy": accuracy}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    files = [str(tmp_path / "ar.json"), str(tmp_path / "star.json")]
    figure = tmp_path / "new" / "probe.png"
    assert main(["probe", *files, "--names", "AR,ST-AR", "--figure", str(figure)]) == 0
    table = capsys.readouterr().out
    assert "ST-AR" in table and "45.00%" in table and "256" in table
    with Image.open(figure) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xDE, 0x8F, 0x05)):  # one line each, in the first two colours
        assert (pixels == colour).all(1).sum() > 100
    words = ["probe", *files]
    for more, message in (
        (["--names", "AR"], "--names AR: give 2 different names, one for each source"),
        (["--figure", "probe.pdf"], "--figure probe.pdf must end in .png"),
        ([str(tmp_path / "none.json")], "none.json cannot be read"),
        (["--positions", "a"], "'a' is neither a number of positions nor a list"),
        (["run"], "the following arguments are required: --val-shards"),
    ):
        assert main([*words, *more]) == 2 and message in capsys.readouterr().err
    (tmp_path / "ar.json").write_text(json.dumps({"runs": {}}))
    assert main(words) == 2 and "give the --out file of an earlier probe of one source" in capsys.readouterr().err


def test_a_figure_without_matplotlib_reports_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"a figure needs matplotlib .*megastar\[eval\]"):
        draw_probes({}, tmp_path / "x.png")


def test_a_damaged_file_of_features_is_computed_again(tmp_path):
    torch.manual_seed(0)
    model, codes = Transformer(CFG), np.random.default_rng(0).integers(0, 11, (5, 16)).astype(np.uint16)

    def features():
        return np.array(probe_features(model, codes, block=2, positions=[4, 16], cache=tmp_path))

    plain = features()
    (file,) = tmp_path.glob("*.npy")
    digest = file.with_name(file.name + ".sha256")
    recorded = digest.read_bytes()
    whole, archive = file.read_bytes(), io.BytesIO()
    np.savez(archive, plain)
    start = len(whole) - plain.nbytes
    variants = [data + whole[start:] for _, data in byte_variants(whole[:start], random.Random("probe"), 60)]
    for data in [*variants, b"", whole[:-1], whole + b"x", archive.getvalue(), whole[:10] + b"(" * 9000]:
        file.write_bytes(data)
        assert np.array_equal(features(), plain)
    assert file.read_bytes() == whole and digest.read_bytes() == recorded
    for at in (start, start + 7, len(whole) - 1):  # a bit of the values
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        assert np.array_equal(features(), plain) and file.read_bytes() == whole
    for other in (b"", b"0" * 64, b"0" * 65, b"\xff" * 64):  # of an earlier version, which recorded none, or damaged
        digest.write_bytes(other)
        if not other:
            digest.unlink()
        assert np.array_equal(features(), plain) and digest.read_bytes() == recorded
