"""Variants of random token order: their validation loss is that of other conditional distributions."""

from __future__ import annotations

import io
from copy import deepcopy

import pytest
from rich.console import Console

from megastar.config.load import load_compare_config
from megastar.experiments import tables
from megastar.experiments.plan import baselines, plan_runs
from megastar.experiments.results import LAST, LOSS, Results, validation_order
from tests.unit.data.shards.test_shards import write_set
from tests.unit.experiments.test_compare import replace_shards, small

NEVER, HALF = (
    "token_order.kind=random",
    "token_order.kind=random,token_order.anneal_start=0.25,token_order.anneal_end=0.5",
)
AR = "self_guided.enabled=false"


def compared(results, **variants: str) -> Results:
    """The rows of ``results`` for these variants, name -> fields besides those of AR."""
    words = [f"variants={{{', '.join(f'{n}: {{label: {n}, overrides: [{o}]}}' for n, o in variants.items())}}}"]
    cfg = load_compare_config("configs/run/compare_emoji.yaml", ["weights=[ema]", "score.against=[test,train]", *words])
    runs = plan_runs(cfg, 0)
    rows = {run.name: deepcopy(results.rows[f"ar-seed{run.seed}"]) | {"variant": run.variant} for run in runs}
    return Results(cfg, runs, rows, 0)


def test_losses_of_different_orders_are_not_subtracted(results):
    found = compared(results, ar=AR, random=f"{AR},{NEVER}", rar=f"{AR},{HALF}", star="")
    assert found.validated == {"ar": "raster", "random": "random", "rar": "raster", "star": "raster"}
    summary = found.summary()
    differences = {pair: LOSS in quantities for pair, quantities in summary["differences"]["ema"].items()}
    assert differences == {"random - ar": False, "rar - ar": True, "star - ar": True}
    assert LAST in summary["differences"]["ema"]["random - ar"] and summary["weights"]["ema"][LOSS]["random"]["n"] == 3
    text = tables.markdown(found, summary, "x")
    own = {line.split("|")[1].strip(): line.split("|")[-2] for line in text.splitlines() if line.startswith("|")}
    assert own["random"] != own["ar"]
    rows = {row[0]: row[-1] for row in tables.quantities_table(found, summary, "ema")}
    assert rows["random"] == rows["ar"] + " (random order)" and "order" not in rows["rar"] + rows["star"]
    apart = {row[0]: row[-1] for row in tables.differences_table(found, summary, "ema")}
    assert apart["random − ar"] == "" and apart["star − ar"]
    assert "in random order for random, not comparable with the other losses" in text
    out = io.StringIO()
    tables.show(found, summary, Console(file=out, width=80))
    assert "not comparable with the other losses" in " ".join(out.getvalue().split())


def test_a_random_order_is_no_baseline_of_raster_variants(results):
    found = compared(
        results, ar=AR, ar2=f"{AR},self_guided.baseline_views=2", random=f"{AR},{NEVER}", rar=f"{AR},{HALF}"
    )
    assert found.baselines == ["ar", "ar2"]
    assert found.pairs() == [("ar2", "ar"), ("random", "ar"), ("rar", "ar"), ("random", "ar2"), ("rar", "ar2")]
    assert tables.cost_table(found, found.summary())[0][-2:] == ["× ar", "× ar2"]


def test_variants_that_are_all_of_random_order_are_compared(results):
    found = compared(results, random=f"{AR},{NEVER}", star=NEVER)
    assert found.baselines == ["random"]
    assert LOSS in found.summary()["differences"]["ema"]["star - random"]
    assert "student weights, tokens in random order. ↑" in tables.description(found)
    assert "(random order)" not in str(tables.quantities_table(found, found.summary(), "ema"))
    assert compared(results, random=NEVER, star="").baselines == ["random"]  # all are guided: the first


def test_the_shipped_comparison_of_methods_is_relative_to_raster_order():
    cfg = load_compare_config("configs/compare/methods_emoji.yaml")
    assert baselines(cfg, plan_runs(cfg, 0)) == ["ar", "ar2"]


def test_tables_of_raster_order_are_those_of_before(results):
    assert "student weights. ↑" in tables.description(results)
    assert "random order" not in tables.markdown(results, results.summary(), "x")


@pytest.mark.parametrize(("start", "order"), [(1.0, "raster"), (2.5, "random")])
def test_an_annealing_that_counts_epochs_needs_the_number_of_images(tmp_path, start, order):
    """32 images of 13: 2.46 epochs. The rows record it, so that tables can be drawn again without the codes."""
    fields = f"{NEVER},token_order.anneal_unit=epochs,token_order.anneal_start={start},token_order.anneal_end=9"
    cfg = small(tmp_path, f"variants.random.overrides=[{AR},{fields}]")
    runs = plan_runs(cfg, 0)
    run = next(r for r in runs if r.variant == "random")
    assert validation_order(run) == "random"  # no codes
    assert validation_order(replace_shards(run, write_set(tmp_path / "s", (7, 6)))) == order
    assert Results(cfg, runs, {run.name: {"validation_order": order}}, 0).validated["random"] == order
