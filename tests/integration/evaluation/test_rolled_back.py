"""A rollback that crosses evaluated steps: the scores that remain are those of the weights that were kept."""

from __future__ import annotations

import json

import pytest

from megastar.run_dir.evaluations import read_evaluations
from megastar.run_dir.jsonl import read_jsonl
from tests.integration.conftest import megastar
from tests.integration.evaluation.test_scheduled import EVALUATED, scores
from tests.integration.test_faults import FAULTS, inject

pytestmark = [pytest.mark.dist, pytest.mark.long]
# Step 10 is evaluated; three bad batches send the run back to step 8, and steps 9 and 10 are trained on other data.
BAD = {"nan": {"10": 1, "11": 1, "12": 1}}
STEPS, STOP = 14, 13  # the first batch after the rollback


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A run that repeats its evaluations, and one that goes on with evaluations of other steps."""
    folder = tmp_path_factory.mktemp("back")
    same, other = (world.write_config(folder / f"{n}.yaml", folder / n, steps=STEPS) for n in ("same", "other"))
    inject(
        (BAD, [same, *FAULTS, *EVALUATED]),
        (BAD | {"signal": STOP}, [other, *FAULTS, *EVALUATED]),
        ({}, [other, *FAULTS, *EVALUATED, "eval.every=6"]),
    )
    for name in ("same", "other"):
        (back,) = read_jsonl(folder / name / "rollbacks.jsonl")
        assert (back["step"], back["to"]) == (12, "step-00000008")
    return folder


@pytest.mark.parametrize(
    ("name", "lines", "steps"), [("same", [5, 10, 10, 14], [5, 10, 14]), ("other", [5, 10, 12, 14], [5, 12, 14])]
)
def test_the_scores_of_discarded_weights_count_no_more(runs, name, lines, steps):
    run = runs / name
    written = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(r["step"], r["rollbacks"]) for r in written] == list(zip(lines, [0, 0, 1, 1], strict=True))
    found = read_evaluations(run)
    assert [r["step"] for r in found] == steps
    assert {r["step"]: r["value"] for r in found} == {s: r["eval_fd"] for s, r in scores(run).items()}
    left = written[1]
    assert left["value"] not in [r["value"] for r in found] and left["key"] not in [r["key"] for r in found]
    status = json.loads(megastar("status", run, "--json").stdout)
    assert status["epochs_to"] == {"1e+09": found[0]["epoch"], "1e-09": None}
