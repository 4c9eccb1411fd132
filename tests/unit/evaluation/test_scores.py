"""The arithmetic of every score against closed forms, brute force, and slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megastar.errors import UserError
from megastar.evaluation.frechet import Statistics, finite_sample_floor, frechet_distance
from megastar.evaluation.inception_score import inception_score
from megastar.evaluation.kid import kernel_distance, mmd2
from megastar.evaluation.prdc import manifold_radii, precision_recall


# Frechet distance ----------------------------------------------------------------------------------------------
def random_statistics(rng: np.random.Generator, f: int, n: int) -> Statistics:
    return Statistics().update(rng.normal(size=(n, f)) @ rng.normal(size=(f, f)) + rng.normal(size=f))


def test_diagonal_covariances_have_a_closed_form():
    rng = np.random.default_rng(0)
    m, n, a, b = rng.normal(size=(4, 7))
    expected = ((m - n) ** 2).sum() + ((np.abs(a) - np.abs(b)) ** 2).sum()
    got = frechet_distance(Statistics.given(m, np.diag(a**2)), Statistics.given(n, np.diag(b**2)))
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["mean", "covariance"])
def test_a_distance_that_is_not_finite_is_refused(value, place):
    rng = np.random.default_rng(4)
    good = random_statistics(rng, 6, 50)
    mean, covariance = good.mean.copy(), good.covariance.copy()
    {"mean": mean, "covariance": covariance}[place].flat[0] = value
    bad = Statistics.given(mean, covariance)
    for pair in (good, bad), (bad, good), (bad, bad):
        with pytest.raises(UserError, match=r"set [12] of a Frechet distance contain NaN or infinity: check"):
            frechet_distance(*pair)
    large = Statistics.given(good.mean * 1e200, good.covariance)
    with pytest.raises(UserError, match="is inf, because its features are too large"):
        frechet_distance(good, large)
    with pytest.raises(UserError, match="a Frechet distance"):
        frechet_distance(good, Statistics.given(good.mean, good.covariance * 1e307))


def test_identical_sets_score_zero_and_statistics_are_numpys():
    x = np.random.default_rng(3).normal(size=(50, 9)).astype(np.float32)
    s = Statistics().update(x)
    np.testing.assert_allclose(s.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)
    assert 0 <= frechet_distance(s, s) < 1e-9
    with pytest.raises(UserError, match="at least 2"):
        _ = Statistics().update(x[:1]).covariance
    x[3, 3] = np.nan
    with pytest.raises(UserError, match="NaN"):
        Statistics().update(x)


def test_floor_is_of_disjoint_halves():
    x = np.random.default_rng(4).normal(size=(401, 6))
    floor, half = finite_sample_floor(x, seed=1)
    order = np.random.default_rng(1).permutation(401)
    assert half == 200 and floor > 0
    assert floor == frechet_distance(Statistics().update(x[order[:200]]), Statistics().update(x[order[200:400]]))
    assert floor != finite_sample_floor(x, seed=2)[0]


@pytest.mark.parametrize("offset", [0.0, 1e4])  # an offset kills sums of squares in float32, not the pairwise update
def test_statistics_do_not_depend_on_how_they_were_gathered(offset):
    x = np.random.default_rng(5).normal(size=(500, 7)) @ np.random.default_rng(6).normal(size=(7, 7)) + offset
    parts = [Statistics() for _ in range(3)]
    for i, rows in enumerate(np.array_split(x, [1, 3, 100, 101, 350])):
        parts[i % 3].update(rows)
    joined = Statistics().merge(parts[0]).merge(Statistics()).merge(parts[1]).merge(parts[2])
    assert joined.count == 500
    np.testing.assert_allclose(joined.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(joined.covariance, np.cov(x, rowvar=False), rtol=1e-9)


# Precision and recall ------------------------------------------------------------------------------------------
def brute_force(real: np.ndarray, made: np.ndarray, k: int) -> tuple[float, float]:
    def radius(x: np.ndarray, i: int) -> float:
        return sorted(((x[i] - x[j]) ** 2).sum() for j in range(len(x)) if j != i)[k - 1]

    def share(inside: np.ndarray, of: np.ndarray) -> float:
        radii = [radius(of, i) for i in range(len(of))]
        return np.mean([any(((p - q) ** 2).sum() <= r for q, r in zip(of, radii, strict=True)) for p in inside])

    return float(share(made, real)), float(share(real, made))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_precision_and_recall_are_brute_forces(rows, monkeypatch):
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(40, 3)), rng.normal(size=(31, 3)) * 0.8 + 1.2
    monkeypatch.setattr("megastar.evaluation.prdc.BYTES", rows * 31 * 8)
    got = precision_recall(torch.from_numpy(real), torch.from_numpy(made), k=3)
    assert got == pytest.approx(brute_force(real, made, 3)) and 0 < got[1] < got[0] < 1


def test_precision_and_recall_of_equal_and_of_distant_sets():
    x = (
        torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + 1e3
    )  # far out: rounding must not lose neighbours
    assert precision_recall(x, x.clone()) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    radii = manifold_radii(x.double(), 3)
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").kthvalue(4).values ** 2
    torch.testing.assert_close(radii, expected, rtol=1e-6, atol=1e-8)


# Kernel distance -----------------------------------------------------------------------------------------------
def test_kernel_distance_is_the_direct_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 5)) + 0.5

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = sum(k(v[i], v[j]) for v in (x, y) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    between = sum(k(a, b) for a in x for b in y) / 81
    assert mmd2(x, y) == pytest.approx(within - 2 * between, rel=1e-12)
    mean, std = kernel_distance(x, y, subsets=4, size=9)  # the whole sets each time
    assert mean == pytest.approx(mmd2(x, y)) and std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_subsets_is_unbiased_and_repeats():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(300, 4)).astype(np.float32), rng.normal(size=(200, 4)).astype(np.float32)
    mean, std = kernel_distance(x, y, subsets=200, size=40, seed=3)
    assert (mean, std) == kernel_distance(x, y, subsets=200, size=40, seed=3)
    assert (mean, std) != kernel_distance(x, y, subsets=200, size=40, seed=4)
    assert abs(mean) < std < 0.2 and kernel_distance(x, y + 1, subsets=20, size=40)[0] > 10 * abs(mean)


# Inception Score -----------------------------------------------------------------------------------------------
def test_inception_score_is_the_direct_formula():
    logits = np.random.default_rng(0).normal(size=(25, 6)) * 3
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):  # the last one is shorter
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    mean, std = inception_score(torch.from_numpy(logits).float(), split=10)
    assert mean == pytest.approx(np.mean(scores), rel=1e-6) and std == pytest.approx(np.std(scores), rel=1e-5)


def test_inception_score_has_its_bounds():
    sure = torch.eye(4).repeat(5, 1) * 1e4  # probabilities of 0 and 1: logarithms must not be NaN
    assert inception_score(sure, split=20) == (pytest.approx(4), 0)
    assert inception_score(torch.zeros(20, 4), split=20) == (pytest.approx(1), 0)
