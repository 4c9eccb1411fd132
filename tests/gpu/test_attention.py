"""Every backend on a GPU: `megastar check-gpu --tests`, or MEGASTAR_TEST_GPU=1 pytest -m gpu tests/gpu."""

from __future__ import annotations

import pytest
import torch

from megastar.model import fused, kernels
from megastar.model.kernels import check, select, timing
from megastar.model.masks import PATTERNS

pytestmark = pytest.mark.gpu
SIZES = (64, 176, 256)


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    assert torch.cuda.is_available(), "these tests need a CUDA GPU: leave them out with -m 'not gpu'"
    return torch.device("cuda", 0)


@pytest.mark.parametrize("head_dim", [64, 100, 128])
@pytest.mark.parametrize("which", PATTERNS)
@pytest.mark.parametrize("name", select.NAMES)
def test_every_backend_against_fp64(gpu, name: str, which: str, head_dim: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        shapes = [(2, 3, size, head_dim) for size in SIZES]
        for row in check.compare((name,), gpu, dtype, shapes, (which,)):
            # A backend that is left out has a reason, and only flash may be left out on a current GPU.
            assert row["ok"] or (row["ok"] is None and row["why"] and name == "flash"), row


@pytest.mark.parametrize("which", PATTERNS)
def test_triton_in_fp32_does_not_round_to_tf32(gpu, which: str) -> None:
    spec, drawn = check.example(which, 2, 176), check.draw(2, 3, 176, 64, torch.float32, gpu)
    exact = check.results(check.exact_attention, [t.double() for t in drawn], spec)
    assert max(check.errors(select.backend("triton").attention, drawn, spec, exact)) < 2e-5


def test_triton_gives_the_same_bits_each_time(gpu) -> None:
    spec, drawn = check.example("hidden", 8, 256), check.draw(8, 8, 256, 64, torch.bfloat16, gpu)
    attend = select.backend("triton").attention
    one, other = check.results(attend, drawn, spec), check.results(attend, drawn, spec)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_triton_supports_more_sequences_and_heads_than_a_grid_axis(gpu) -> None:
    spec, drawn = check.example("hidden", 4400, 16), check.draw(4400, 16, 16, 16, torch.bfloat16, gpu)  # 70,400
    want, got = (check.results(select.backend(name).attention, drawn, spec) for name in ("sdpa", "triton"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-2)


def test_liger_and_apex_agree_with_torch(gpu, caplog) -> None:
    """If they are installed; a wrong result logs a warning."""
    fused.set_fused(True)
    for dtype, shape in [(torch.bfloat16, (4, 256, 2048)), (torch.float32, (3, 7, 2816))]:
        a, b = (torch.randn(shape, device=gpu, dtype=dtype, requires_grad=True) for _ in range(2))
        (fused.swiglu(a, b) + fused.rms_norm(a, b[0, 0].detach().requires_grad_(), 1e-5)).sum().backward()
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["flex", "triton"])
def test_a_new_mask_compiles_nothing(gpu, name: str) -> None:
    assert timing.recompiles(name, (4, 4, 256, 64), gpu) == 0


@pytest.mark.parametrize("name", ["auto", "sdpa", "flex", "triton"])
def test_the_check_of_the_first_use_passes(gpu, caplog, name: str) -> None:
    kernels.set_backend(name, device=gpu, dtype=torch.bfloat16, masks=(check.example("hidden", 2, 256),))
    try:
        drawn = check.draw(4, 4, 256, 64, torch.bfloat16, gpu)
        for spec in (None, check.example("hidden", 4, 256), check.example("neighbourhood", 4, 256)):
            check.results(kernels.attention, drawn, spec)
        assert caplog.messages == []
    finally:
        kernels.set_backend("auto")
