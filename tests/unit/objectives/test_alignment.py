"""The alignment loss against its equation in float64, and which position meets which patch."""

import pytest
import torch

from megastar.engine.student import Student
from megastar.objectives.alignment import alignment_loss, output_positions, target_patches
from tests.dist.reference import config

N, T, C = 3, 16, 12
REPA = {"repa": {"enabled": True, "projector_dim": 20, "width": C}}


def test_the_loss_is_its_equation():
    g = torch.Generator().manual_seed(0)
    projected = torch.randn(N, T, C, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(N, T, C, generator=g).half()
    loss, parts = alignment_loss(projected, targets)
    wanted, z, student = 0.0, targets.double(), projected.detach()
    for n in range(N):
        for t in range(T):
            wanted += 1 - float(student[n, t] @ z[n, t]) / float(student[n, t].norm() * z[n, t].norm())
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(wanted / (N * T), rel=1e-6)
    assert parts.keys() == {"loss_repa"} and not parts["loss_repa"].requires_grad
    fixed = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: alignment_loss(x, fixed)[0], projected)
    loss.backward()
    assert fixed.grad is None and projected.grad.abs().sum() > 0


def test_the_loss_is_in_fp32_and_does_not_depend_on_scale():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(N, T, C, generator=g).bfloat16(), torch.randn(N, T, C, generator=g).half()
    loss, _ = alignment_loss(a, b)
    assert loss.dtype == torch.float32
    assert alignment_loss(4 * a, b / 8)[0].item() == pytest.approx(loss.item(), abs=1e-6)
    assert alignment_loss(b, b)[0].item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(-b, b)[0].item() == pytest.approx(2, abs=1e-6)
    zero = torch.zeros(N, T, C)
    assert torch.isfinite(alignment_loss(a, zero)[0])  # an encoder that knows nothing of a patch


def test_the_loss_is_a_mean_over_images():
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, T, C, generator=g), torch.randn(4, T, C, generator=g)
    halves = [alignment_loss(a[i : i + 2], b[i : i + 2])[0].item() for i in (0, 2)]
    assert alignment_loss(a, b)[0].item() == pytest.approx(sum(halves) / 2, rel=1e-6)


@pytest.mark.parametrize("match", ["next", "input"])
def test_positions_meet_the_patch_of_their_output_or_of_their_input(match):
    """Position t of the student with tokens 0 .. t - 1 as inputs; patch p carries the number p."""
    positions = torch.arange(T).expand(N, T)[..., None]
    patches = torch.arange(T).expand(N, T)[..., None]
    outputs, targets = output_positions(positions, match), target_patches(patches, match)
    assert outputs.shape == targets.shape == (N, T if match == "next" else T - 1, 1)
    assert ((outputs - targets) == (0 if match == "next" else 1)).all()


@pytest.mark.parametrize(("block", "expected"), [(0, 1), (2, 2), (3, 3)])
def test_the_student_projects_the_output_of_the_block(block, expected):
    cfg = config(repa={**REPA["repa"], "block": block}, self_guided={"enabled": False})
    torch.manual_seed(0)
    student, seen = Student(cfg).eval(), {}
    for i, layer in enumerate(student.transformer.layers, 1):
        layer.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
    labels, tokens = torch.tensor([0, 1]), torch.randint(0, 32, (2, T))
    out = student(labels, tokens, align=True)
    assert torch.equal(out.aligned, student.repa_projector(seen[expected])) and out.aligned.shape == (2, T, C)
    assert student(labels, tokens).aligned is None and student(labels, tokens).loss == out.loss


@pytest.mark.parametrize(("n_layer", "block"), [(12, 4), (24, 8), (36, 12), (6, 2), (2, 1)])
def test_a_third_of_the_blocks_by_default(n_layer, block):
    assert config().repa.block_of(n_layer) == block


def test_the_other_weights_are_drawn_as_without_alignment():
    torch.manual_seed(0)
    plain = Student(config()).state_dict()
    torch.manual_seed(0)
    both = Student(config(**REPA)).state_dict()
    assert set(both) - set(plain) == {f"repa_projector.w{i}.{k}" for i in (1, 2, 3) for k in ("weight", "bias")}
    assert all(torch.equal(both[name], value) for name, value in plain.items())
