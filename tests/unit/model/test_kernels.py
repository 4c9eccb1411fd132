"""Backends without a GPU: flex forward, sdpa, which backend is selected, and packages whose name misleads."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megastar.diagnosis.packages import has_nvidia_apex
from megastar.errors import UserError
from megastar.model import kernels
from megastar.model.kernels import check, flash, flex, sdpa, select, table
from megastar.model.kernels import triton as ours
from megastar.model.masks import PATTERNS, MaskSpec
from megastar.utils.logs import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Selection as at the start of a process, and the package's warnings in caplog."""
    monkeypatch.setattr(ROOT, "propagate", True)
    monkeypatch.setattr(select, "_wanted", "auto")
    monkeypatch.setattr(select, "_chosen", {})


# flex --------------------------------------------------------------------------------------------------------------
def test_flex_forward_compiles_once_for_all_draws() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    q, k, v, _ = check.draw(2, 2, 144, 64, torch.float32, CPU)
    for seed in range(4):
        spec = check.example("hidden", 2, 144, seed)
        with torch.no_grad():
            torch.testing.assert_close(
                flex.attention(q, k, v, spec).double(), check.exact_attention(q, k, v, spec), rtol=0, atol=1e-5
            )
    assert counters["stats"]["unique_graphs"] == 1
    assert "no backward pass on CPU" in flex.supports(spec, torch.float32, 64, CPU, True)


def test_flex_goes_on_compiling_past_torchs_limit(monkeypatch) -> None:
    """Past eight shapes of one code object torch falls back to an uncompiled flex, which costs memory and time."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flex._compiled.cache_clear()
    counters.clear()
    for size in range(16, 16 * 11, 16):
        q, k, v, _ = check.draw(1, 1, size, 16, torch.float32, CPU)
        with torch.no_grad():
            flex.attention(q, k, v, check.example("hidden", 1, size))
    assert counters["stats"]["unique_graphs"] == 10
    flex._compiled.cache_clear()


# sdpa and the check that check-gpu makes ---------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sdpa_against_fp64(dtype: torch.dtype) -> None:
    rows = list(check.compare(("sdpa",), CPU, dtype, [(2, 2, 80, 64), (2, 1, 48, 100)]))
    assert len(rows) == 2 * len(PATTERNS) and all(row["ok"] for row in rows), rows


def test_sdpa_in_bf16_on_either_side_of_the_switch(monkeypatch) -> None:
    """Long sequences take torch's kernel: here told that all are long; and a prompt in front of a cache."""
    monkeypatch.setattr(sdpa, "PRODUCTS", 16)
    rows = list(check.compare(("sdpa",), CPU, torch.bfloat16, [(2, 2, 80, 64), (2, 1, 16, 64)]))
    assert len(rows) == 2 * len(PATTERNS) and all(row["ok"] for row in rows), rows
    q, k, v, _ = check.draw(1, 2, 48, 64, torch.bfloat16, CPU)
    exact = check.exact_attention(q, k, v, MaskSpec())[:, :, -5:]
    torch.testing.assert_close(sdpa.attention(q[:, :, -5:], k, v).double(), exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize("head_dim", [64, 100])
def test_sdpa_with_a_mask_as_on_a_gpu(head_dim: int) -> None:
    def attend(q, k, v, spec):
        return sdpa._padded_to_eights(q, k, v, spec.additive(48, CPU, q.dtype))

    spec, drawn = check.example("hidden", 2, 48), check.draw(2, 2, 48, head_dim, torch.float32, CPU)
    exact = check.results(check.exact_attention, [t.double() for t in drawn], spec)
    assert max(check.errors(attend, drawn, spec, exact)) < 1e-5


def test_compare_finds_a_wrong_kernel_and_reports_what_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(flex, "attention", lambda q, k, v, mask: sdpa.attention(q, k, v))
    monkeypatch.setattr(flex, "supports", lambda *_: None)
    rows = list(check.compare(("sdpa", "flex", "flash"), CPU, torch.float32, [(2, 1, 32, 16)], ("causal", "hidden")))
    found = {(r["backend"], r["pattern"]): r["ok"] for r in rows}
    assert found == {
        ("sdpa", "causal"): True, ("sdpa", "hidden"): True, ("flex", "causal"): True, ("flex", "hidden"): False,
        ("flash", "causal"): None, ("flash", "hidden"): None,
    }  # fmt: skip
    assert all(r["why"] for r in rows if r["ok"] is None)


# Selection ---------------------------------------------------------------------------------------------------------
def inputs(grad: bool = True) -> tuple[list[torch.Tensor], MaskSpec]:
    return [t.requires_grad_(grad) for t in check.draw(3, 4, 32, 16, torch.float32, CPU)[:3]], check.example(
        "hidden", 3, 32
    )


def stand_in(monkeypatch, attend) -> list[int]:
    """flex, as something else: the calls it gets are counted."""
    calls: list[int] = []
    monkeypatch.setattr(flex, "form", lambda spec, like: spec)
    monkeypatch.setattr(flex, "attend", lambda *a: (calls.append(len(a[0])), attend(*a))[1])
    monkeypatch.setattr(flex, "supports", lambda *_: None)
    kernels.set_backend("flex")
    return calls


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.1 * g


def broken(*_):
    raise RuntimeError("PTXAS error: no such GPU\nand more")


@pytest.mark.parametrize(
    ("attend", "grad", "problem"),
    [
        (lambda q, k, v, mask: sdpa.attention(q, k, v), True, "differs from sdpa (output off by"),
        (
            lambda q, k, v, mask: WrongGradient.apply(sdpa.attention(q, k, v, mask)),
            True,
            "differs from sdpa (dq off by",
        ),
        (
            lambda q, k, v, mask: sdpa.attention(q, k, v, mask) * float("nan"),
            False,
            "differs from sdpa (output off by nan",
        ),
        (broken, True, "failed (RuntimeError: PTXAS error: no such GPU)"),
    ],
)
def test_a_wrong_backend_is_detected_at_its_first_use(monkeypatch, caplog, attend, grad: bool, problem: str) -> None:
    calls = stand_in(monkeypatch, attend)
    qkv, spec = inputs(grad)
    want = sdpa.attention(*qkv, spec)
    for _ in range(2):  # compared and reported once
        assert torch.equal(kernels.attention(*qkv, spec), want)
        (message,) = caplog.messages
    assert message.startswith(f"attention backend flex {problem}")
    assert "causal, column intervals, float32, head dimension 16, cpu" in message
    assert calls == [3]  # on all of the real inputs: it compiles what it will run


def test_a_correct_backend_is_checked_once_per_case(monkeypatch) -> None:
    calls = stand_in(monkeypatch, sdpa.attention)
    qkv, spec = inputs()
    state = torch.get_rng_state()
    for _ in range(3):
        kernels.attention(*qkv, spec)
    assert calls == [3] * 4
    assert torch.equal(torch.get_rng_state(), state)  # the comparison uses none of the run's random numbers
    kernels.attention(*qkv)  # another mask is another case
    assert calls == [3] * 6
    kernels.attention(*(t[:, :, -1:] for t in qkv[:1]), *qkv[1:])  # decoding with a cache is sdpa's
    assert len(calls) == 6


def test_the_check_is_not_seen_by_activation_checkpointing(monkeypatch) -> None:
    from torch.utils.checkpoint import checkpoint

    stand_in(monkeypatch, sdpa.attention)
    qkv, spec = inputs()
    checkpoint(kernels.attention, *qkv, spec, use_reentrant=False).sum().backward()
    assert all(t.grad is not None for t in qkv)


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_a_compiled_block_has_no_graph_break_and_compiles_once_for_all_masks(name: str) -> None:
    from torch._dynamo.utils import counters

    module, (qkv, _) = select.backend(name), inputs(grad=False)

    def block(q, k, v, mask):
        return kernels.attention(2 * q, k, v, mask) + 1

    counters.clear()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    for seed in range(4):
        spec = check.example("hidden", 3, 32, seed)
        with torch.no_grad():
            want = sdpa.attention(2 * qkv[0], *qkv[1:], spec) + 1
            torch.testing.assert_close(
                compiled(*qkv, kernels.AttentionPlan(module.attend, module.form(spec, qkv[0]))), want
            )
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():  # a mask without a plan is planned outside of the graph
        torch.testing.assert_close(torch.compile(block, backend="eager")(*qkv, spec), want)


def test_the_next_candidate_is_tried_when_one_fails(monkeypatch, caplog) -> None:
    monkeypatch.setattr(table, "order", lambda *_: ("flex", "triton", "sdpa"))
    monkeypatch.setattr(flex, "attend", broken)
    monkeypatch.setattr(ours, "form", lambda spec, like: spec)
    monkeypatch.setattr(ours, "attend", sdpa.attention)
    for module in (flex, ours):
        monkeypatch.setattr(module, "supports", lambda *_: None)
        monkeypatch.setattr(module, "missing", lambda: None)
    qkv, spec = inputs()
    for _ in range(2):
        kernels.attention(*qkv, spec)
    (message,) = caplog.messages
    assert message.startswith("attention backend flex failed (RuntimeError: PTXAS error")
    assert kernels.select.chosen() == {"causal, column intervals, forward and backward": "triton"}


def test_commands_without_an_engine_use_sdpa() -> None:
    done = "from megastar.model.kernels import select; print(select._wanted)"
    assert subprocess.run([sys.executable, "-c", done], capture_output=True, text=True).stdout == "sdpa\n"


def test_auto_is_sdpa_on_cpu(monkeypatch) -> None:
    for name in ("flex", "flash", "triton"):
        monkeypatch.setattr(select.backend(name), "attend", broken)
    qkv, spec = inputs()
    assert torch.equal(kernels.attention(*qkv, spec), sdpa.attention(*qkv, spec))


@pytest.mark.parametrize(
    ("name", "kwargs", "sentence"),
    [
        ("flexx", {}, "unknown attention backend 'flexx': did you mean flex?"),
        ("xyzzy", {}, "unknown attention backend 'xyzzy': choose one of auto, sdpa, flex, flash, triton"),
        (
            "flash",
            {},
            "attention.backend=flash is not available: flash-attn cannot be imported: pip install flash-attn-4",
        ),
        (
            "triton",
            {"device": CPU},
            "attention.backend=triton does not support a mask that is plain causal, float32, head dimension 64, cpu, forward "
            "and backward: it runs on CUDA GPUs, not on cpu: use sdpa there; or set attention.backend=auto",
        ),
        ("flex", {"device": CPU}, "it has no backward pass on CPU: use sdpa there"),
    ],
)
def test_a_backend_requested_by_name_reports_why_it_cannot_be_used(name: str, kwargs: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        kernels.set_backend(name, **kwargs)
    assert select._wanted == "auto"


def test_a_backend_requested_by_name_that_does_not_support_the_mask(monkeypatch) -> None:
    kernels.set_backend("triton")
    qkv, spec = inputs()
    with pytest.raises(
        UserError, match="attention.backend=triton does not support a mask that is causal, column intervals"
    ):
        kernels.attention(*qkv, spec)
    one = flash.Interface(2, lambda: None, False)
    monkeypatch.setattr(flash, "interfaces", lambda: (one,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    assert flash.supports(MaskSpec(), torch.bfloat16, 64, cuda, True) is None
    reason = "no installed flash-attn supports the mask (causal, column intervals): use triton, flex or sdpa"
    assert flash.supports(spec, torch.bfloat16, 64, cuda, True) == reason
    assert "it supports bf16 and fp16, not torch.float32" in flash.supports(spec, torch.float32, 64, cuda, True)
    assert ours.supports(spec, torch.bfloat16, 100, cuda, True) is None
    assert "head dimension 160 is outside 16..128" in ours.supports(spec, torch.bfloat16, 160, cuda, True)


def test_auto_follows_the_table_of_check_gpu(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda", 0)
    path = table.table_path(cuda)
    assert path.parent == tmp_path / "megastar" and path.name.startswith("attention-nvidia-h100-80gb-hbm3-torch-2.")
    table.read_table.cache_clear()
    assert table.order(cuda, True, 64, 256) == ("sdpa",)
    assert table.order(cuda, False, 64, 256) == ("flex", "triton", "sdpa")
    path.parent.mkdir()
    rows = {"64": {"256": "triton", "1024": "flex"}, "128": {"256": "flash"}}
    path.write_text(json.dumps({"fastest": {"plain": {"64": {"256": "flash"}}, "masked": rows}}))
    table.read_table.cache_clear()
    assert table.order(cuda, True, 100, 576)[0] == "flash"
    assert [table.order(cuda, False, d, s)[0] for d, s in [(64, 256), (72, 900), (100, 256)]] == [
        "triton",
        "flex",
        "flash",
    ]
    path.write_text("{broken")
    table.read_table.cache_clear()
    assert table.order(cuda, False, 64, 256) == ("flex", "triton", "sdpa")
    assert "run megastar check-gpu to write it again" in caplog.messages[0]
    table.read_table.cache_clear()


# Packages that are not what their name says ------------------------------------------------------------------------
@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes files of a folder that comes first on sys.path; nothing of it stays imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("flash_attn", "flash_attn_interface", "apex")

    def forget() -> None:
        for name in [m for m in sys.modules if m.split(".")[0] in names]:
            del sys.modules[name]
        flash.interfaces.cache_clear()
        flash.missing.cache_clear()

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/") / "__init__.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        forget()

    forget()
    yield write
    forget()


def test_an_empty_flash_attn_is_not_flash_attn(packages, tmp_path) -> None:
    (tmp_path / "flash_attn" / "ops").mkdir(parents=True)  # no __init__: a namespace
    packages()
    __import__("flash_attn")
    assert flash.interfaces() == ()
    with pytest.raises(UserError, match=r"the installed package flash_attn has no flash_attn_func: remove it"):
        kernels.set_backend("flash")
    packages(flash_attn="", flash_attn__cute="import cutlass")
    assert flash.missing() == "flash-attn-4 needs the module cutlass, which is missing: pip install nvidia-cutlass-dsl"
    packages(flash_attn="raise OSError('undefined symbol: torch')", flash_attn__cute="")
    assert "flash-attn cannot be imported (OSError: undefined symbol: torch)" in flash.missing()


def test_flash_attn_is_what_it_can_do(packages) -> None:
    function = "def flash_attn_func(q, k, v, softmax_scale=None, causal=False{}): pass\n"
    packages(
        flash_attn=function.format(""),
        flash_attn__cute=function.format(", mask_mod=None, aux_tensors=None"),
        flash_attn_interface="flash_attn_func = None",
    )
    assert [(i.generation, i.masks) for i in flash.interfaces()] == [(4, True), (2, False)]
    assert flash.missing() is None


def test_flash_attn_is_called_in_its_layout(monkeypatch) -> None:
    """(B, S, H, d), d a multiple of 8, the scale of the real head dimension; some releases return a tuple."""

    def theirs(q, k, v, softmax_scale, causal):
        assert q.shape == (2, 48, 3, 104) and causal
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale).transpose(1, 2), None

    monkeypatch.setattr(flash, "_interface_for", lambda *_: flash.Interface(3, theirs, False))
    drawn = check.draw(2, 3, 48, 100, torch.float32, CPU)
    want = check.results(check.exact_attention, drawn, MaskSpec())
    got = check.results(flash.attention, drawn, MaskSpec())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=1e-5)
    widths: list[int] = []

    def fourth(q, k, v, softmax_scale, mask_mod, aux_tensors):
        widths.append(q.shape[-1])
        return q

    monkeypatch.setitem(sys.modules, "megastar.model.kernels.flash_cute", SimpleNamespace(visible=None))
    monkeypatch.setattr(flash, "_interface_for", lambda *_: flash.Interface(4, fourth, True))
    for d in (64, 100, 128):
        few = check.draw(2, 1, 16, d, torch.float32, CPU)[:3]
        assert flash.attention(*few, check.example("hidden", 2, 16)).shape[-1] == d
    assert widths == [64, 128, 128]  # the masked backward pass of version 4 supports nothing between 96 and 128
    seen: list[int] = []
    given = check.draw(2, 3, 48, 64, torch.float32, CPU)[:3]
    one = flash.Interface(3, lambda q, k, v, **_: seen.extend(t.data_ptr() for t in (q, k, v)) or q, False)
    monkeypatch.setattr(flash, "_interface_for", lambda *_: one)
    flash.attention(*given, MaskSpec())
    assert seen == [t.data_ptr() for t in given]  # no copies where nothing is appended
    start, end = flash.intervals(MaskSpec.sliding_window(6, 2), 2, 6, CPU)
    assert start.tolist() == [[0, 1, 2, 3, 4, 5]] * 2 and end.tolist() == [[2, 3, 4, 5, 6, 6]] * 2


def test_the_registrys_apex_is_not_nvidias(packages) -> None:
    packages(apex="")
    assert not has_nvidia_apex()
    packages(apex="raise RuntimeError('another package')")
    assert not has_nvidia_apex()
    packages(apex="", apex__optimizers="class FusedAdam: pass")
    assert has_nvidia_apex()
