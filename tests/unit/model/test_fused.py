"""SwiGLU and RMSNorm of optional libraries, without a GPU: which packages are accepted, and the check of the first use."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from megastar.model import fused
from megastar.model.layers import RMSNorm
from megastar.model.rope import plain_split_qkv, rope_table, split_qkv
from megastar.model.transformer import FeedForward
from megastar.utils.logs import ROOT
from tests.unit.model.test_model import TINY

LIGER = "from torch.autograd import Function\nclass LigerSiLUMulFunction(Function):\n    {}"
RIGHT = """
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a.sigmoid() * a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        return g * b * s * (1 + a * (1 - s)), g * a * s
"""
APEX = "def fused_rms_norm_affine(x, weight, shape, eps=1e-6, memory_efficient=False):\n    import torch\n    "
APEX_RIGHT = APEX + "assert shape == (x.shape[-1],)\n    return torch.nn.functional.rms_norm(x, shape, weight, eps)"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes packages that come first on sys.path and are used on a CPU too; none of them stays imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ROOT, "propagate", True)  # to caplog
    monkeypatch.setattr(fused, "_uses_torch", lambda x: not fused._enabled)

    def forget() -> None:
        for name in [m for m in sys.modules if m.split(".")[0] in ("liger_kernel", "apex")]:
            del sys.modules[name]
        fused.library_function.cache_clear()
        fused.set_fused(True)

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/") / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        forget()

    forget()
    yield write
    forget()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def liger(body: str) -> dict[str, str]:
    return {"liger_kernel": "", "liger_kernel__ops": "", "liger_kernel__ops__swiglu": LIGER.format(body)}


def apex(text: str) -> dict[str, str]:
    return {"apex": "", "apex__normalization": "", "apex__normalization__fused_layer_norm": text}


def test_without_the_libraries_torch_is_used(packages, caplog) -> None:
    a, b, w = drawn(2, 8), drawn(3, 2, 8)[0], drawn(8)
    assert torch.equal(fused.swiglu(a, b), F.silu(a) * b)
    assert torch.equal(fused.rms_norm(a, w, 1e-5), F.rms_norm(a, (8,), w, 1e-5))
    assert caplog.messages == []


@pytest.mark.parametrize("trap", ["", "raise RuntimeError('another package')", "fused_rms_norm_affine = 3"])
def test_a_package_with_a_misleading_name(packages, trap: str) -> None:
    packages(**apex(trap), liger_kernel="raise OSError('undefined symbol')")
    assert fused.library_function("rms_norm") is None and fused.library_function("swiglu") is None
    x, w = drawn(2, 8), drawn(8)
    assert torch.equal(fused.rms_norm(x, w, 1e-5), F.rms_norm(x, (8,), w, 1e-5))
    packages(apex="")  # the registry's: no normalization at all
    assert fused.library_function("rms_norm") is None


def test_a_correct_library_is_compared_once_and_used(packages, monkeypatch, caplog) -> None:
    packages(**liger(RIGHT), **apex(APEX_RIGHT))
    calls: list[str] = []
    compare = fused.disagreement
    monkeypatch.setattr(fused, "disagreement", lambda *a: (calls.append("compared"), compare(*a))[1])
    layer, norm = FeedForward(TINY).eval(), RMSNorm(TINY.dim, 1e-5)
    x = drawn(100, TINY.dim)
    state = torch.get_rng_state()
    for _ in range(3):
        got = torch.autograd.grad(layer(x).sum() + fused.rms_norm(x, norm.weight, 1e-5).sum(), [x, norm.weight])
    assert calls == ["compared"] * 2 and caplog.messages == []
    assert torch.equal(torch.get_rng_state(), state)  # the comparison uses none of the run's random numbers
    assert all(fused._chosen.values())
    fused.set_fused(False)
    want = torch.autograd.grad(layer(x).sum() + fused.rms_norm(x, norm.weight, 1e-5).sum(), [x, norm.weight])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        fused.set_fused(True)
        layer(x)
    assert calls == ["compared"] * 3  # without gradients: another case


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (RIGHT.replace("* a * b", "* a * b * 1.01"), "differs from torch (result off by"),
        (RIGHT.replace("g * a * s\n", "g * a * s * 1.01\n"), "differs from torch (gradient 2 off by"),
        (RIGHT.replace("* a * b", "* a * b * float('nan')"), "differs from torch (result off by nan"),
        ("pass", "failed ("),
    ],
)
def test_a_wrong_library_is_detected_at_its_first_use(packages, caplog, text: str, problem: str) -> None:
    packages(**liger(text))
    a, b = drawn(4, 8), drawn(5, 4, 8)[0]
    for _ in range(2):  # compared and reported once
        assert torch.equal(fused.swiglu(a, b), F.silu(a) * b)
        (message,) = caplog.messages
    assert message.startswith(f"liger-kernel: swiglu {problem}")
    assert message.endswith("for 8 columns, float32, cpu; using torch instead")


def test_an_apex_that_cannot_run_on_this_machine(packages, caplog) -> None:
    packages(**apex(APEX + "raise ModuleNotFoundError('fused_layer_norm_cuda')"))
    x, w = drawn(4, 8), drawn(8)
    assert torch.equal(fused.rms_norm(x, w, 1e-5), F.rms_norm(x, (8,), w, 1e-5))
    assert "apex: rms_norm failed (ModuleNotFoundError: fused_layer_norm_cuda) for 8 columns" in caplog.messages[0]


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_wrong_rotation_is_detected_at_its_first_use(packages, monkeypatch, caplog, factor: float) -> None:
    class Kernel:
        @staticmethod
        def apply(qkv, table):
            used.append(qkv.shape)
            q, k, v = plain_split_qkv(qkv, table)
            return q * factor, k, v

    used: list[torch.Size] = []
    qkv, table = drawn(3, 5, 3, 2, 8), rope_table(4, 8, 10000.0, torch.device("cpu"))[:5]
    with monkeypatch.context() as patch:
        patch.setattr(fused, "library_function", lambda operation: Kernel)
        for _ in range(2):
            got = split_qkv(qkv, table)
        split_qkv(qkv.double(), table.double())  # the kernel computes in fp32: not used
    assert all(torch.equal(a, b) for a, b in zip(got, plain_split_qkv(qkv, table), strict=True))
    if factor == 1:
        assert [shape[0] for shape in used] == [1, 3, 3] and caplog.messages == []  # one sequence is compared
    else:
        assert len(used) == 1
        (message,) = caplog.messages
        assert message.startswith("triton: rope differs from torch (result off by")


def test_compiled_rotation_agrees_with_eager(monkeypatch) -> None:
    table = rope_table(4, 8, 10000.0, torch.device("cpu"))[:11]
    for kind in (torch.float32, torch.bfloat16):
        qkv = drawn(2, 11, 3, 3, 8).detach().to(kind).requires_grad_()
        want = split_qkv(qkv, table)
        grads = torch.autograd.grad(want, qkv, [t.detach() for t in want])
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            got = split_qkv(qkv, table)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, qkv, [t.detach() for t in want]), grads)


def test_a_compiled_block_uses_torch(monkeypatch) -> None:
    monkeypatch.setattr(fused, "_usable", None)  # a call would fail
    real = fused._uses_torch
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    a, b = drawn(4, 8), drawn(5, 4, 8)[0]
    assert not real(a)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(fused.swiglu(a, b), F.silu(a) * b)
