"""Every loss against a slow loop over the paper's indices: images b, views m, positions i, j."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megastar.config.schema import SelfGuidedConfig
from megastar.objectives.contrastive import step_loss, view_loss
from megastar.objectives.masked_image import masked_image_loss
from megastar.objectives.next_token import next_token_loss
from megastar.objectives.self_guided import at_positions, draw_positions, total
from megastar.objectives.spread import feature_spread

TAU = 0.2
LOSSES = pytest.mark.parametrize("loss", [step_loss, view_loss])


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def info_nce(anchor: torch.Tensor, candidates: list[torch.Tensor], positive: int) -> tuple[float, bool]:
    logits = [cosine(anchor, c) / TAU for c in candidates]
    value = -logits[positive] + math.log(sum(math.exp(x) for x in logits))
    return value, max(range(len(logits)), key=logits.__getitem__) == positive


def slow_step(anchors: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    images, views, positions, _ = anchors.shape
    terms = []
    for b in range(images):
        for m in range(views):
            for i in range(positions):
                for j in range(positions):
                    if i != j:
                        terms.append(info_nce(anchors[b, m, i], [targets[c, m, j] for c in range(len(targets))], b))
    return sum(t for t, _ in terms) / len(terms), sum(a for _, a in terms) / len(terms)


def slow_view(anchors: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    images, student_views, positions, _ = anchors.shape
    terms = []
    for b in range(images):
        for i in range(student_views):
            for j in range(targets.shape[1]):
                for k in range(positions):
                    if i != j:
                        terms.append(info_nce(anchors[b, i, k], [targets[c, j, k] for c in range(len(targets))], b))
    return sum(t for t, _ in terms) / len(terms), sum(a for _, a in terms) / len(terms)


@pytest.mark.parametrize("student_views", [1, 2])
@pytest.mark.parametrize("views", [2, 3])
def test_contrastive_losses_match_the_loops(student_views: int, views: int) -> None:
    targets = features(5, views, 4, 6)
    anchors = targets[:, :student_views] + features(5, student_views, 4, 6, seed=1)
    for fast, slow in ((step_loss, slow_step), (view_loss, slow_view)):
        loss, metrics = fast(anchors, targets, TAU)
        value, accuracy = slow(anchors, targets)
        assert loss.item() == pytest.approx(value, rel=1e-12)
        assert metrics["accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
        assert 0 < accuracy < 1


def test_next_token_loss_matches_the_loop() -> None:
    logits, tokens = features(3, 7, 11), torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
    terms = []
    for n in range(3):
        for t in range(7):
            row = logits[n, t].tolist()
            terms.append(math.log(sum(map(math.exp, row))) - row[tokens[n, t]])
    loss, metrics = next_token_loss(logits, tokens)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert metrics["loss_ar"] == loss and not metrics["loss_ar"].requires_grad


def test_masked_image_loss_matches_the_loop() -> None:
    student, teacher = features(3, 7, 5), features(3, 7, 5, seed=1)
    want = sum(1 - cosine(student[n, t], teacher[n, t]) for n in range(3) for t in range(7)) / 21
    assert masked_image_loss(student, teacher)[0].item() == pytest.approx(want, rel=1e-12)
    assert masked_image_loss(student, 3 * student)[0].item() == pytest.approx(0, abs=1e-12)
    assert masked_image_loss(student, -student)[0].item() == pytest.approx(2)


def test_gradients() -> None:
    tokens = torch.randint(0, 5, (2, 3))
    check = torch.autograd.gradcheck
    assert check(lambda x: next_token_loss(x, tokens)[0], features(2, 3, 5).requires_grad_())
    teacher = features(2, 3, 4, seed=1)
    assert check(lambda x: masked_image_loss(x, teacher)[0], features(2, 3, 4).requires_grad_())
    targets = features(3, 2, 3, 4, seed=2)
    for student_views in (1, 2):
        anchors = features(3, student_views, 3, 4).requires_grad_()
        assert check(lambda x: step_loss(x, targets, TAU)[0], anchors)
        assert check(lambda x: view_loss(x, targets, TAU)[0], anchors)


def test_nothing_flows_to_the_teacher() -> None:
    student, teacher = features(2, 3, 4).requires_grad_(), features(2, 3, 4, seed=1).requires_grad_()
    masked_image_loss(student, teacher)[0].backward()
    assert teacher.grad is None and student.grad is not None
    for loss in (step_loss, view_loss):
        anchors, targets = features(3, 2, 3, 4).requires_grad_(), features(3, 2, 3, 4, seed=1).requires_grad_()
        loss(anchors, targets, TAU)[0].backward()
        assert targets.grad is None and anchors.grad is not None


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_arithmetic_is_fp32(loss, dtype: torch.dtype) -> None:
    anchors, targets = features(4, 2, 3, 8, dtype=dtype), features(4, 2, 3, 8, seed=1, dtype=dtype)
    got, _ = loss(anchors, targets, TAU)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(loss(anchors.double(), targets.double(), TAU)[0].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_losses_are_fp32_too(dtype: torch.dtype) -> None:
    x, y, tokens = features(2, 9, 50, dtype=dtype), features(2, 9, 50, seed=1, dtype=dtype), torch.arange(18).view(2, 9)
    for got, want in (
        (next_token_loss(x, tokens), next_token_loss(x.double(), tokens)),
        (masked_image_loss(x, y), masked_image_loss(x.double(), y.double())),
    ):
        assert got[0].dtype == torch.float32
        assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5)


@LOSSES
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gathered_parts_equal_the_whole_batch(loss, ranks: int) -> None:
    anchors, targets = features(8, 2, 4, 6), features(8, 2, 4, 6, seed=1)
    whole_anchors = anchors.clone().requires_grad_()
    whole, metrics = loss(whole_anchors, targets, TAU)
    whole.backward()
    values, accuracies, gradients = [], [], []
    for rank in range(ranks):
        own = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        part = anchors[own].clone().requires_grad_()

        def gather(x: torch.Tensor, own: slice = own) -> torch.Tensor:
            assert torch.equal(x, targets[own]) and not x.requires_grad
            return targets

        value, m = loss(part, targets[own], TAU, gather, rank)
        (value / ranks).backward()  # data-parallel ranks average their gradients
        values.append(value)
        accuracies.append(m["accuracy"])
        gradients.append(part.grad)
    torch.testing.assert_close(torch.stack(values).mean(), whole)
    torch.testing.assert_close(torch.stack(accuracies).mean(), metrics["accuracy"])
    torch.testing.assert_close(torch.cat(gradients), whole_anchors.grad)


def test_chance_level_and_perfect_agreement() -> None:
    same = torch.ones(6, 2, 3, 4)
    for loss in (step_loss, view_loss):
        assert loss(same, same, TAU)[0].item() == pytest.approx(math.log(6), rel=1e-6)
        apart = torch.eye(6).view(6, 1, 1, 6).expand(6, 2, 3, 6)
        value, metrics = loss(apart, apart, TAU)
        assert value.item() == pytest.approx(math.log(1 + 5 * math.exp(-1 / TAU)), rel=1e-5)
        assert metrics["accuracy"] == 1


def parts(student_views: int = 2) -> dict[str, torch.Tensor]:
    n = 3 * student_views
    return {
        "loss_ar": features(1).square().sum(),
        "student_last": features(n, 9, 6, seed=1),
        "teacher_last": features(n, 9, 6, seed=2),
        "anchors": features(3, student_views, 4, 6, seed=3),
        "targets": features(3, 2, 4, 6, seed=4),
    }


@pytest.mark.parametrize("student_views", [1, 2])
def test_total_is_the_weighted_sum(student_views: int) -> None:
    p = parts(student_views)
    cfg = SelfGuidedConfig(alpha=0.7, beta=0.3, temperature=TAU, student_views=student_views)
    loss, metrics = total(cfg, **p)
    mim = masked_image_loss(p["student_last"], p["teacher_last"])[0]
    step, steps = step_loss(p["anchors"], p["targets"], TAU)
    view, views = view_loss(p["anchors"], p["targets"], TAU)
    torch.testing.assert_close(loss, p["loss_ar"] + 0.7 * mim + 0.3 * (step + view) / 2)
    want = {"loss": loss, "loss_ar": p["loss_ar"], "loss_mim": mim, "loss_step": step, "loss_view": view}
    want |= {"acc_step": steps["accuracy"], "acc_view": views["accuracy"]}
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(metrics[name], value)
        assert metrics[name].ndim == 0 and not metrics[name].requires_grad


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"enabled": False}, {"loss", "loss_ar"}),
        ({"alpha": 0.0}, {"loss", "loss_ar", "loss_step", "acc_step", "loss_view", "acc_view"}),
        ({"beta": 0.0}, {"loss", "loss_ar", "loss_mim"}),
        ({"step_loss": False}, {"loss", "loss_ar", "loss_mim", "loss_view", "acc_view"}),
        ({"view_loss": False}, {"loss", "loss_ar", "loss_mim", "loss_step", "acc_step"}),
        ({"step_loss": False, "view_loss": False}, {"loss", "loss_ar", "loss_mim"}),
    ],
)
def test_terms_that_are_off(change: dict, names: set[str]) -> None:
    cfg = replace(SelfGuidedConfig(), **change)
    p = parts()
    whole = total(SelfGuidedConfig(), **p)[1]
    loss, metrics = total(cfg, **p)
    assert metrics.keys() == names
    weights = {"loss_ar": 1.0, "loss_mim": cfg.alpha, "loss_step": cfg.beta / 2, "loss_view": cfg.beta / 2}
    torch.testing.assert_close(loss, sum(weights[k] * whole[k] for k in names & weights.keys()))
    if not cfg.enabled:
        assert torch.equal(total(cfg, loss_ar=p["loss_ar"])[0], loss)


def test_targets_are_gathered_once() -> None:
    p, calls = parts(), []

    def gather(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return torch.cat([features(3, 2, 4, 6, seed=9), x])

    loss, _ = total(SelfGuidedConfig(), **p, gather=gather, rank_offset=1)
    assert len(calls) == 1
    both = [f(p["anchors"], p["targets"], TAU, gather, 1)[0] for f in (step_loss, view_loss)]
    base = total(replace(SelfGuidedConfig(), beta=0.0), **p)[0]
    torch.testing.assert_close(loss, base + 0.5 * sum(both) / 2)


# Spread --------------------------------------------------------------------------------------------------------------
def test_spread_matches_the_loop() -> None:
    f = features(7, 2, 3, 5)
    values = []
    for m in range(2):
        for k in range(3):
            unit = [f[b, m, k] / f[b, m, k].norm() for b in range(7)]
            for d in range(5):
                column = [float(u[d]) for u in unit]
                mean = sum(column) / 7
                values.append((sum((x - mean) ** 2 for x in column) / 6) ** 0.5)
    assert feature_spread(f).item() == pytest.approx(sum(values) / len(values) * 5**0.5, rel=1e-12)
    assert feature_spread(f.bfloat16()).dtype == torch.float32


def test_spread_is_about_one_or_zero() -> None:
    assert feature_spread(features(256, 1, 2, 64)).item() == pytest.approx(1, abs=0.02)
    one = features(1, 2, 3, 64)
    assert feature_spread(one.expand(8, 2, 3, 64) * torch.arange(1, 9).view(8, 1, 1, 1)).item() < 1e-12  # lengths aside
    # Images alike, positions apart: collapsed. A mean cosine of 0.99 is a spread of about a tenth.
    near = one + 0.1 * features(64, 2, 3, 64, seed=1)
    assert feature_spread(near).item() == pytest.approx(0.1, abs=0.02)
    few = [feature_spread(features(n, 100, 1, 64)).item() for n in (2, 8)]
    assert few == [pytest.approx(0.80, abs=0.01), pytest.approx(0.97, abs=0.01)]  # as the docstring says


def test_spreads_are_metrics_where_asked_for() -> None:
    p = parts(1)
    p["anchors"].requires_grad_()
    loss, metrics = total(SelfGuidedConfig(student_views=1), **p, spreads=True)
    plain, others = total(SelfGuidedConfig(student_views=1), **p)
    assert torch.equal(loss, plain) and metrics.keys() - others.keys() == {"spread_student", "spread_teacher"}
    assert metrics["spread_student"] == feature_spread(p["anchors"]) and not metrics["spread_student"].requires_grad
    assert metrics["spread_teacher"] == feature_spread(p["targets"])
    twice = total(
        SelfGuidedConfig(student_views=1), **p, spreads=True, gather=lambda x: torch.cat([-x, x]), rank_offset=1
    )[1]
    for name in ("anchors", "targets"):  # of all ranks' images
        both = feature_spread(torch.cat([-p[name], p[name]]))
        assert twice["spread_student" if name == "anchors" else "spread_teacher"] == both
    alone = p | {k: p[k][:1] for k in ("anchors", "targets")}
    assert "spread_student" not in total(SelfGuidedConfig(student_views=1), **alone, spreads=True)[1]
    assert "spread_student" not in total(replace(SelfGuidedConfig(), beta=0.0), **parts(), spreads=True)[1]


def test_positions_are_a_function_of_seed_and_step() -> None:
    drawn = [draw_positions(0, step, 64, 4) for step in range(200)]
    for step, positions in enumerate(drawn):
        assert positions.dtype == torch.int64 and positions.shape == (4,)
        assert (positions.diff() > 0).all() and positions[0] >= 1 and positions[-1] < 64
        assert torch.equal(positions, draw_positions(0, step, 64, 4))
    assert len({tuple(p.tolist()) for p in drawn}) > 190
    assert not torch.equal(draw_positions(1, 0, 64, 4), drawn[0])
    counts = torch.bincount(torch.cat([draw_positions(0, s, 16, 4) for s in range(4000)]), minlength=16) / 4000
    expected = 4 / 15  # of position 1 to 15
    assert counts[0] == 0 and (counts[1:] - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5
    assert draw_positions(0, 0, 6, 5).tolist() == [1, 2, 3, 4, 5]  # never 0, the class


def test_at_positions_keeps_images_views_and_positions_apart() -> None:
    images, views, size = 3, 2, 5
    f = torch.arange(images * views * size).view(images * views, size, 1)  # row b * M + m
    got = at_positions(f, torch.tensor([1, 4]), views)
    assert got.shape == (3, 2, 2, 1)
    for b in range(images):
        for m in range(views):
            assert got[b, m, :, 0].tolist() == [(b * views + m) * size + k for k in (1, 4)]
