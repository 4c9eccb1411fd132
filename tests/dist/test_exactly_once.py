"""Killed with 4 ranks, gone on with 2, with 1, with a tensor group: each step's samples are the uninterrupted run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megastar.run_dir import checkpoint_dir
from tests import forker
from tests.integration.conftest import environment
from tests.unit.data.shards.test_shards import T, V, write_set

SIZES = (
    7,
    0,
    5,
    1,
    8,
    5,
)  # 26 samples in five shards that hold any, two mixed: no batch ends with an epoch but the 13th
BATCH, STEPS = 8, 13


def write_config(folder: Path, run: str) -> Path:
    path = folder / f"{run}.yaml"
    path.write_text(f"""
run: {folder / run}
model: {{name: tiny, n_layer: 1, n_head: 2, dim: 16, multiple_of: 16, vocab_size: {V}, num_classes: 4, image_tokens: {T}}}
data: {{shards: {folder / "codes"}, window: 2}}
self_guided: {{contrastive_block: 1, projector_dim: 8}}
optim: {{scale_lr: false}}
parallel: {{deepspeed: zero1}}
train: {{global_batch: {BATCH}, micro_batch: 2, steps: {STEPS}, dtype: fp32, save_every: 2}}
""")
    return path


def run(folder: Path, name: str, config: Path, ranks: int, *overrides: str, die_at: int = -1) -> list[list[dict]]:
    """What each rank was handed, in order."""
    ids = folder / f"ids-{name}"
    ids.mkdir()
    words = ["tests/dist/workers/exactly_once_worker.py", str(ids), str(die_at), str(config), *overrides]
    done = forker.run(words, environment(), ranks)
    assert (done.returncode == 0) == (die_at < 0), done.stdout[-1000:] + done.stderr[-4000:]
    files = [ids / f"rank-{rank}.jsonl" for rank in range(ranks)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def by_step(ranks: list[list[dict]]) -> dict[int, list[tuple[int, int]]]:
    """Step -> (id, epoch) of its rows: micro-batch by micro-batch, rank by rank."""
    out: dict[int, list[tuple[int, int]]] = {}
    for micro in zip(*ranks, strict=False):
        assert len({row["step"] for row in micro}) == 1
        for row in micro:
            out.setdefault(row["step"], []).extend(zip(row["ids"], row["epochs"], strict=True))
    return out


@pytest.mark.dist
def test_every_sample_once_whatever_ranks_go_on(tmp_path):
    write_set(tmp_path / "codes", SIZES)
    straight = by_step(run(tmp_path, "straight", write_config(tmp_path, "straight"), 1))
    assert sorted(straight) == list(range(STEPS))

    config = write_config(tmp_path, "broken")
    killed = run(tmp_path, "killed", config, 4, die_at=5)
    assert all(rows[-1]["step"] == 5 for rows in killed)  # by SIGKILL, all four
    found = checkpoint_dir.latest(tmp_path / "broken/checkpoints")
    assert found is not None
    resumed = int(found.name.removeprefix("step-"))
    assert resumed in (2, 4)  # the second save may have been under way
    trained = {step: ids for step, ids in by_step(killed).items() if step < resumed}
    assert len(trained) == resumed

    tensor = "parallel.tensor_parallel=2"
    for name, ranks, until, words in (("two", 2, 7, []), ("one", 1, 9, []), ("tensor", 2, STEPS, [tensor])):
        handed = run(tmp_path, name, config, ranks, f"train.steps={until}", *words)
        if words:  # one data rank, two of a tensor group
            assert handed[0] == handed[1]
            handed = handed[:1]
        steps = by_step(handed)
        assert sorted(steps) == list(range(resumed, until))
        assert not trained.keys() & steps.keys()
        trained |= steps
        resumed = until
    assert trained == straight
    seen = [pair for step in range(STEPS) for pair in trained[step]]
    for epoch in range(STEPS * BATCH // sum(SIZES)):
        assert sorted(i for i, e in seen if e == epoch) == list(range(sum(SIZES)))
