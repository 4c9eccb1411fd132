"""Token orders: what they are functions of, the share of permuted images, and those of the loader."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from megastar.config.schema import DataConfig, ModelConfig, RunConfig, SelfGuidedConfig, TrainConfig
from megastar.config.sections.token_order import TokenOrderConfig
from megastar.data.loader import TokenLoader, open_shards, validation_batches
from megastar.data.token_order import draw_orders, random_shares, schedule_change, validates_permuted, validation_orders
from tests.unit.data.shards.test_shards import T, V, write_set

IDS, EPOCHS = np.arange(400), np.arange(400) // 150
ROWS = np.arange(T, dtype=np.int32)


def is_permutation(orders: np.ndarray) -> bool:
    return bool((np.sort(orders, -1) == np.arange(orders.shape[-1])).all())


def test_an_order_is_a_function_of_seed_epoch_sample_and_view():
    whole = draw_orders(5, EPOCHS, IDS, 2, 16, 1.0)
    assert whole.shape == (400, 2, 16) and whole.dtype == np.int32 and is_permutation(whole)
    some = np.random.default_rng(0).permutation(400)[:30]
    assert (draw_orders(5, EPOCHS[some], IDS[some], 2, 16, 1.0) == whole[some]).all()
    assert (draw_orders(5, EPOCHS, IDS, 1, 16, 1.0) == whole[:, :1]).all()
    assert (draw_orders(6, EPOCHS, IDS, 2, 16, 1.0) != whole).any(-1).all()
    assert (draw_orders(5, EPOCHS + 1, IDS, 2, 16, 1.0) != whole).any(-1).all()
    assert (whole[:, 0] != whole[:, 1]).any(-1).all()  # the views do not share one


def test_every_position_comes_at_every_place_equally_often():
    orders = draw_orders(0, np.zeros(6400, np.int64), np.arange(6400), 1, 16, 1.0)[:, 0]
    counts = np.stack([np.bincount(orders[:, t], minlength=16) for t in range(16)])  # 400 each
    assert abs(counts - 400).max() < 5 * 20 and ((counts - 400) ** 2 / 400).sum() < 320  # chi-squared, 225 +- 21


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_a_share_of_the_samples_is_permuted_all_views_alike(share):
    all_permuted = draw_orders(2, EPOCHS, IDS, 2, 16, 1.0)
    orders = draw_orders(2, EPOCHS, IDS, 2, 16, share)
    raster = (orders == np.arange(16)).all(-1)  # (B, M)
    assert (raster[:, 0] == raster[:, 1]).all() and abs(raster.mean() - (1 - share)) < 0.08
    assert (orders[~raster] == all_permuted[~raster]).all()  # the decision changes no permutation
    less = draw_orders(2, EPOCHS, IDS, 2, 16, share / 2)
    assert ((less == np.arange(16)).all(-1) | ~raster).all()  # a smaller share permutes fewer of the same ones
    each = np.where(IDS < 200, share, 1.0)
    mixed = draw_orders(2, EPOCHS, IDS, 2, 16, each)
    assert (mixed[:200] == orders[:200]).all() and (mixed[200:] == all_permuted[200:]).all()


def test_annealing_is_linear_between_its_ends():
    rar = TokenOrderConfig(kind="random", anneal_start=0.5, anneal_end=0.75)
    shares = [rar.random_share(e, 400) for e in (0, 199.9, 200, 250, 299, 300, 399)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0.01, 0, 0])
    epochs = TokenOrderConfig(kind="random", anneal_start=200, anneal_end=300, anneal_unit="epochs")
    assert [epochs.random_share(e, 400) for e in (0, 200, 250, 300)] == pytest.approx([1, 1, 0.5, 0])
    at_once = TokenOrderConfig(kind="random", anneal_start=0.5, anneal_end=0.5)
    assert [at_once.random_share(e, 10) for e in (0, 4.99, 5, 9)] == [1, 1, 0, 0]
    assert TokenOrderConfig().random_share(0, 10) == 0
    pure = TokenOrderConfig(kind="random")
    assert pure.random_share(9.999, 10) == 1
    assert [o.anneals(400) for o in (rar, epochs, pure, TokenOrderConfig())] == [True, True, False, False]
    assert not epochs.anneals(200) and epochs.anneals(200.1)


# The loader --------------------------------------------------------------------------------------------------------
def run_of(folder, **order) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=V, num_classes=4, image_tokens=T, target_position="rotary"),
        data=DataConfig(shards=str(folder)),
        self_guided=SelfGuidedConfig(views=2),
        train=TrainConfig(seed=3, global_batch=8, steps=20),
        token_order=TokenOrderConfig(kind="random", **order),
    )


def batches(cfg: RunConfig, count: int, **place) -> list[dict]:
    loader = TokenLoader(open_shards(cfg.data.shards, cfg.data), cfg, **place)
    try:
        return list(islice(iter(loader), count))
    finally:
        loader.close()


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "s", (7, 6, 8, 5))


def test_the_loader_anneals_by_the_step_for_any_ranks_and_after_a_resume(folder):
    cfg = run_of(folder, anneal_start=0.25, anneal_end=0.75)  # steps 5 to 15
    whole = batches(cfg, 20)
    shares = random_shares(cfg, np.arange(20), 26)
    assert shares == pytest.approx([1.0] * 6 + [1 - k / 10 for k in range(1, 10)] + [0.0] * 5)
    for step, batch in enumerate(whole):
        wanted = draw_orders(3, batch["epochs"].numpy(), batch["ids"].numpy(), 2, T, shares[step])
        assert (batch["orders"].numpy() == wanted).all() and batch["orders"].shape == (8, 2, T)
    assert all((b["orders"].numpy() == ROWS).all() for b in whole[15:])
    resumed = batches(cfg, 6, start_step=7)
    assert all(torch.equal(a["orders"], b["orders"]) for a, b in zip(resumed, whole[7:13], strict=True))
    ranks = [batches(cfg, 12, rank=rank, world=2, accumulation=2) for rank in range(2)]
    for step in range(6):
        parts = [ranks[r][2 * step + micro]["orders"] for micro in range(2) for r in range(2)]
        assert torch.equal(torch.cat(parts), whole[step]["orders"])


def test_a_raster_run_has_no_orders_and_the_same_rest(folder):
    cfg = run_of(folder)
    permuted = batches(cfg, 3)
    cfg.token_order.kind = "raster"
    for one, other in zip(batches(cfg, 3), permuted, strict=True):
        assert "orders" not in one and other.pop("orders") is not None and one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


def test_validation_permutes_only_for_a_run_that_never_reads_rows(folder):
    cfg = run_of(folder)
    assert validates_permuted(cfg, 26)
    some = validation_batches(open_shards(folder, cfg.data), 12, 5, permuted=True)
    orders = torch.cat([b["orders"] for b in some])
    assert orders.shape == (12, 1, T) and is_permutation(orders.numpy())
    assert (orders.numpy() == validation_orders(np.arange(12), T)).all()  # of no seed
    assert "orders" not in validation_batches(open_shards(folder, cfg.data), 12, 5)[0]
    for order in ({"anneal_start": 0.9}, {"anneal_start": 2, "anneal_end": 3, "anneal_unit": "epochs"}):
        assert not validates_permuted(run_of(folder, **order), 26)
    late = run_of(folder, anneal_start=100, anneal_end=200, anneal_unit="epochs")  # the run ends before
    assert validates_permuted(late, 26)
    cfg.token_order.kind = "raster"
    assert not validates_permuted(cfg, 26)


@pytest.mark.parametrize(
    ("order", "steps", "sentences"),
    [
        (
            {"anneal_start": 0.5, "anneal_end": 0.75},
            200,
            ["at step 80 changes from 0% to 100%", "fractions of the run"],
        ),
        ({"anneal_start": 0.5, "anneal_end": 0.75}, 110, ["at step 80 changes from 0% to 9%"]),
        ({"anneal_start": 0.5, "anneal_end": 0.75}, 100, []),
        (
            {"anneal_start": 10.0, "anneal_end": 12.0, "anneal_unit": "epochs"},
            200,
            ["in random order and is now measured in raster"],
        ),
        ({"anneal_start": 2.0, "anneal_end": 4.0, "anneal_unit": "epochs"}, 200, []),
        ({}, 200, []),
    ],
)
def test_another_length_of_the_run_that_changes_the_orders_is_told(order, steps, sentences):
    """100 planned steps are ten passes over 80 images."""
    cfg = RunConfig(
        token_order=TokenOrderConfig(kind="random", **order), train=TrainConfig(global_batch=8, steps=steps)
    )
    told = schedule_change(cfg, 80, 80, 100)
    assert all(sentence in told for sentence in sentences) and bool(told) == bool(sentences)
    assert not told or told.startswith(f"the run has {steps} steps instead of 100: ")
