"""The linear probe: frozen features, MAE's optimizer and schedule against references, and its table and figure."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.evaluation.linear_probe import fit_probes, linear_probe, probe_features, probe_positions
from megastar.model.transformer import Transformer

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
