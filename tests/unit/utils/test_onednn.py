"""oneDNN's fp32 products against fp64, with gradients; where they are not chosen, torch's own."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from megastar.errors import UserError
from megastar.model.layers import Linear
from megastar.utils import onednn


@pytest.fixture(params=[True, False])
def mkl_slow(request, monkeypatch) -> bool:
    """The operator is in every x86 build of torch, so both ways are tested on any of them."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.fail("this torch has no oneDNN: its x86 builds do")
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: request.param)
    monkeypatch.setattr(onednn, "LEAST", 0)
    return request.param


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (5, 7, 3), (64, 48, 130)])
def test_products_of_any_strides(mkl_slow: bool, rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    for x in (a, a.t().contiguous().t(), torch.randn(rows, 2 * inner)[:, ::2]):
        for y in (b, b.t().contiguous().t()):
            torch.testing.assert_close(onednn.product(x, y).double(), x.double() @ y.double().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_and_its_gradients(mkl_slow: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    sides = []
    for one, function in ((dtype, onednn.linear), (torch.float64, F.linear)):
        a, w = (v.detach().to(one, copy=True).requires_grad_() for v in (x, weight))
        out = function(a, w)
        out.transpose(0, 1).square().sum().backward()  # a gradient that is not contiguous
        sides.append((out, a.grad, w.grad))
    for got, want in zip(*sides, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert got.dtype == dtype and got.shape == want.shape and error < (2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_only_the_gradients_asked_for(mkl_slow: bool) -> None:
    layer = Linear(24, 40, 0.02).requires_grad_(False)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 24))
    assert layer.weight.grad is None
    with torch.inference_mode():
        assert not layer(x).requires_grad


def test_a_torch_without_the_operator_is_no_error(monkeypatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    assert onednn.has_onednn() is False
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("MEGASTAR_FP32_PRODUCT", "onednn")
    assert onednn.mkl_is_slow.__wrapped__() is False


@pytest.fixture
def avx512(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(onednn, "has_onednn", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MEGASTAR_FP32_PRODUCT", raising=False)
    return tmp_path / "megastar"


@pytest.mark.parametrize(("gain", "slow"), [(2.2, True), (1.05, False), (0.7, False)])
def test_the_choice_is_measured_once_and_recorded(avx512, monkeypatch, gain, slow) -> None:
    monkeypatch.setattr(onednn, "measured_gain", lambda: gain)
    assert onednn.mkl_is_slow.__wrapped__() is slow
    (record,) = avx512.iterdir()
    assert json.loads(record.read_text())["onednn_gain"] == gain
    monkeypatch.setattr(onednn, "measured_gain", lambda: pytest.fail("measured again"))
    assert onednn.mkl_is_slow.__wrapped__() is slow  # a run that resumes computes the same bits


def test_the_first_record_counts_when_two_processes_measure(avx512, monkeypatch) -> None:
    def measure() -> float:
        monkeypatch.setattr(onednn, "measured_gain", lambda: 2.0)
        assert onednn.recorded_gain() == 2.0  # the other process
        return 0.5

    monkeypatch.setattr(onednn, "measured_gain", measure)
    assert onednn.recorded_gain() == 2.0
    assert len(list(avx512.iterdir())) == 1  # no temporary file remains


@pytest.mark.parametrize("content", ["", "[]", '{"onednn_gain": "x"}', "{}"])
def test_a_damaged_record_is_told_and_mkl_used(avx512, caplog, content) -> None:
    onednn.recorded_gain()
    (record,) = avx512.iterdir()
    record.write_text(content)
    assert onednn.mkl_is_slow.__wrapped__() is False
    assert "remove the file to measure again" in caplog.text


def test_a_cache_that_cannot_be_written(avx512, caplog) -> None:
    avx512.write_text("a file where the folder is meant")
    assert onednn.mkl_is_slow.__wrapped__() is False
    assert "cannot record" in caplog.text


def test_the_variable_decides(avx512, monkeypatch) -> None:
    monkeypatch.setattr(onednn, "measured_gain", lambda: pytest.fail("measured"))
    for value, slow in (("onednn", True), ("mkl", False)):
        monkeypatch.setenv("MEGASTAR_FP32_PRODUCT", value)
        assert onednn.mkl_is_slow.__wrapped__() is slow
    monkeypatch.setenv("MEGASTAR_FP32_PRODUCT", "fast")
    with pytest.raises(UserError, match="use mkl or onednn"):
        onednn.mkl_is_slow.__wrapped__()


def test_the_switch_selects_torchs_own_implementations(mkl_slow: bool, monkeypatch) -> None:
    x, weight = torch.randn(64, 48), torch.randn(130, 48)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)  # calling it fails
    monkeypatch.setattr(onednn, "_enabled", True)
    onednn.set_enabled(False)
    assert torch.equal(onednn.product(x, weight), x @ weight.t())
    assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))
    torch.manual_seed(3)
    ours = onednn.dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(ours, F.dropout(x, 0.3))
    onednn.set_enabled(True)
    torch.manual_seed(3)
    assert not torch.equal(onednn.dropout(x, 0.3), ours)
