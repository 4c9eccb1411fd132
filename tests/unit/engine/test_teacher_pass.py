"""The micro-batches of a step with what the teacher computed first: order of rows, what is kept, spreads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megastar.config.load import as_run_config
from megastar.engine.context import Context
from megastar.engine.teacher_pass import StepTargets, teacher_first
from megastar.model.transformer import Output
from megastar.objectives.spread import feature_spread

CTX = Context(0, 1, torch.device("cpu"), torch.float32)


def config(**sections):
    model = {"n_layer": 3, "n_head": 2, "dim": 8, "image_tokens": 16, "vocab_size": 32, "num_classes": 5}
    guided = {"contrastive_block": 2, **sections.pop("self_guided", {})}
    return as_run_config(
        {
            "data": {"shards": "x"},
            "model": model,
            "self_guided": guided,
            "train": {"global_batch": 6, "steps": 1},
            **sections,
        }
    )


class Teacher:
    """Features that name their sequence: the first code of each; records how deep it ran."""

    def __init__(self):
        self.blocks: list[int | None] = []

    def __call__(self, labels, inputs, features_at, last_block, need_logits, placement):
        assert placement is None  # raster order
        self.blocks.append(last_block)
        named = inputs[:, :1, None].float().expand(-1, 16, 8) + torch.linspace(0, 0.5, 8)
        return Output(None, named, named)


def batches() -> list[dict]:
    codes = torch.arange(12).view(6, 2, 1).expand(-1, -1, 16)
    labels = torch.zeros(6, dtype=torch.int64)
    return [
        {"codes": codes[i : i + 2], "labels": labels[:2], "true_labels": labels[:2], "step": 0} for i in range(0, 6, 2)
    ]


def engines(count: int = 3) -> SimpleNamespace:
    return SimpleNamespace(accumulation=count, teacher=Teacher())


def test_each_micro_batch_gets_the_targets_of_the_step_in_their_order():
    run = engines()
    found = list(teacher_first(config(), run, CTX, batches(), 0))
    assert run.teacher.blocks == [None] * 3  # to the end, once
    seen = [batch["teacher"] for batch in found]
    assert [(s.index, s.count) for s in seen] == [(0, 3), (1, 3), (2, 3)]
    for i, s in enumerate(seen):
        assert s.targets.shape == (6, 2, 4, 8) and s.targets[:, :, 0, 0].flatten().tolist() == list(range(12))
        assert s.last is not None and s.last[:, 0, 0].tolist() == list(range(4 * i, 4 * i + 4))
    assert "teacher" not in batches()[0] and found[1]["codes"] is not found[0]["codes"]


@pytest.mark.parametrize("field", [{"parallel": {"teacher_features": "recompute"}}, {"self_guided": {"alpha": 0.0}}])
def test_without_kept_features_the_first_pass_ends_at_the_contrastive_block(field):
    run = engines()
    found = list(teacher_first(config(**field), run, CTX, batches(), 0))
    assert run.teacher.blocks == [2] * 3 and all(batch["teacher"].last is None for batch in found)


@pytest.mark.parametrize(
    ("field", "count"),
    [
        ({}, 1),
        ({"negatives": "micro_batch"}, 3),
        ({"enabled": False}, 3),
        ({"step_loss": False, "view_loss": False}, 3),
    ],
)
def test_otherwise_batches_pass_one_by_one(field, count):
    run, taken = engines(count), []

    def source():
        for batch in batches():
            taken.append(batch)
            yield batch

    for number, batch in enumerate(teacher_first(config(self_guided=field), run, CTX, source(), 0), 1):
        assert batch is taken[-1] and len(taken) == number
    assert run.teacher.blocks == []


def test_the_spread_is_that_of_the_whole_step():
    g = torch.Generator().manual_seed(0)
    anchors, targets = torch.randn(6, 2, 4, 8, generator=g), torch.randn(6, 2, 4, 8, generator=g)
    shared: list[torch.Tensor] = []
    steps = [StepTargets(None, targets, i, 3, shared).spreads(anchors[2 * i : 2 * i + 2], CTX) for i in range(3)]
    assert steps[:2] == [{}, {}]
    assert steps[2] == {"spread_student": feature_spread(anchors), "spread_teacher": feature_spread(targets)}
