"""The warnings of a run: each message from rows that call for it, none from a healthy run."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest

from megastar.config.load import load_config, save_config
from megastar.config.schema import RunConfig
from megastar.engine.metrics.health_monitor import HealthMonitor
from megastar.engine.metrics.logger import MetricsLogger
from megastar.run_dir import training_checks
from megastar.run_dir.events import read_events
from megastar.run_dir.status import status_of
from megastar.teacher.schedule import decay_at
from tests.dist.reference import config, train

ROOT = Path(__file__).resolve().parents[3]
HEALTHY = {"loss_ar": 6.0, "loss_mim": 0.03, "acc_step": 0.7, "acc_view": 0.7, "spread_student": 0.9, "grad_norm": 0.5}
HEALTHY |= {"spread_teacher": 0.8, "teacher_distance": 0.1}
BEGINNING = HEALTHY | {"loss_ar": 7.6}


@cache
def demo(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs/run/demo.yaml", list(overrides))


def rows(count: int = 100, every: int = 10, **newest: float | list[float]) -> list[dict]:
    """``count`` rows of a run that learns; the last 60 with other values, a list's one by one."""
    out = [{"step": every * (i + 1), **(BEGINNING if i < training_checks.FIRST else HEALTHY)} for i in range(count)]
    for name, value in newest.items():
        for i, row in enumerate(out[-60:]):
            row[name] = value[i] if isinstance(value, list) else value
    return out


def found(cfg: RunConfig, some: list[dict], images: int = 64) -> dict[str, str]:
    return training_checks.find_problems(cfg, images, some)


CASES = {
    "accuracy_at_chance": (
        {"acc_view": 0.02},
        "contrastive accuracy is at chance level: acc_view 0.02 over 10 rows, guessing gives 0.016 (1 of 64 images): check that",
    ),
    "collapse": (
        {"spread_student": 0.03},
        "features collapse: spread_student 0.03 over 10 rows, spread-out features have about 1: restart from",
    ),
    "far_teacher": (
        {"teacher_distance": 0.7},
        "the teacher does not keep up: teacher_distance is 0.7 over 10 rows, so the student's targets come from a "
        "different network: lower self_guided.teacher_decay (now 0.999) if the losses fall, else optim.lr",
    ),
    "trivial_mim": (
        {"loss_mim": 1e-6},
        "the MIM loss is trivially small: 1e-06 over 10 rows, student and teacher compute the same features: raise "
        "self_guided.mask_ratio (now 0.25) or teacher_decay (now 0.999), or set alpha=0",
    ),
    "always_clipped": (
        {"grad_norm": 3.0},
        "every gradient is clipped: grad_norm was 3 to 3 in 50 rows, optim.grad_clip is 1: harmless while the loss falls",
    ),
    "not_learning": (
        {"loss_ar": 7.7},
        "the next-token loss does not fall: loss_ar is 7.70 over 10 rows, the first 10 rows had 7.60: check that optim.lr",
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_problem_has_its_message(kind):
    newest, sentence = CASES[kind]
    some = found(demo(), rows(**newest))
    assert list(some) == [kind] and some[kind].startswith(sentence)
    assert "\n" not in some[kind] and not some[kind].endswith(".")


def test_remedies_do_not_contradict_each_other():
    """What a run at a hundred times its learning rate really showed: chance, collapse, and a loss above guessing."""
    wild = {"loss_ar": 7.77, "acc_step": 0.016, "acc_view": 0.017, "spread_student": 0.0037}
    some = found(demo(), rows(**wild))
    assert list(some) == ["collapse", "not_learning"] and "raise optim.lr" not in str(some)
    assert "change optim.lr (now 0.0015) first, the next-token loss does not fall either" in some["collapse"]
    some = found(demo(), rows(**wild | {"spread_student": 0.5}))
    assert some["accuracy_at_chance"].endswith("then change optim.lr: the next-token loss does not fall either")


def test_a_teacher_that_falls_behind():
    away = [0.1 * 1.01**i for i in range(60)]
    cfg = demo()
    late = rows(700, teacher_distance=away)
    assert list(found(cfg, late)) == ["growing_teacher"]
    assert "teacher_distance grew from 0.12 to 0.17 within 50 rows" in found(cfg, late)["growing_teacher"]
    assert found(cfg, rows(200, teacher_distance=away)) == {}  # it is still to come to rest
    assert found(cfg, rows(700, teacher_distance=0.0)) == {}  # a copy
    assert found(cfg, rows(700, teacher_distance=[0.1 + 0.05 * (i % 7) for i in range(60)])) == {}  # it moves about


def test_a_loss_at_the_level_of_guessing():
    guess = math.log(2048)
    some = rows(loss_ar=guess - 0.01)
    for row in some[: training_checks.FIRST]:
        row["loss_ar"] = guess + 0.02
    assert "guessing gives ln 2048 = 7.62" in found(demo(), some)["not_learning"]
    tuned = rows(loss_ar=5.0)
    for row in tuned[: training_checks.FIRST]:
        row["loss_ar"] = 5.0
    assert found(demo("train.init=w.safetensors"), tuned) == {} and list(found(demo(), tuned)) == ["not_learning"]


def test_no_warning_too_early_or_without_values():
    for newest, _ in CASES.values():
        assert found(demo(), rows(9, **newest)) == {}
    bad = {k: v for newest, _ in CASES.values() for k, v in newest.items()}
    early = set(found(demo(), rows(15, **bad)))  # steps 60 to 150, of which 50 are warm-up
    assert early == {"far_teacher", "trivial_mim"}
    assert found(demo(), rows(acc_step=0.2, acc_view=0.2), images=4) == {}  # guessing is right a quarter of the time
    assert found(demo("optim.grad_clip=0"), rows(grad_norm=3.0)) == {}
    assert found(demo(), [{"step": r["step"], "loss_ar": 6.0} for r in rows()]) != {}  # the loss alone does not fall
    assert found(demo(), rows(loss_mim="nan", grad_norm="inf")) == {}  # `megastar status` reports those
    assert found(demo(), [{"step": 3, "val_loss_ar": 1.0}, {"loss_ar": 1.0}]) == {}


@pytest.mark.parametrize(
    ("decay", "warmup", "steps"), [(0.99, False, 300), (0.9, True, 50), (0.999, True, 40), (1.0, True, 20)]
)
def test_the_share_of_the_initial_weights(decay, warmup, steps):
    guided = demo(f"self_guided.teacher_decay={decay}", f"self_guided.teacher_warmup={warmup}").self_guided
    product = math.prod(decay_at(t, guided) for t in range(steps))
    assert training_checks.initial_weight_share(guided, steps) == pytest.approx(product, rel=1e-9)


def test_a_decay_too_slow_for_the_run_is_reported_at_the_start():
    def message(steps: int, *overrides: str) -> str:
        cfg = load_config(ROOT / "configs/run/star_b_50ep.yaml", list(overrides))
        return training_checks.slow_teacher(cfg.self_guided, cfg.train.init, steps)

    assert message(3000) == (
        "the teacher hardly moves: with self_guided.teacher_decay 0.9999 it follows in about 10,000 steps, the run has "
        "3,000, and 74% of the last teacher are still the random initial weights: set self_guided.teacher_warmup=true, or "
        "teacher_decay to 0.997 or less"
    )
    assert "it never moves, the run has 3,000, and 100%" in message(3000, "self_guided.teacher_decay=1")
    assert message(3000, "self_guided.teacher_warmup=true") == message(3000, "self_guided.teacher_decay=0.997") == ""
    assert message(250_200) == message(3000, "train.init=w.safetensors") == message(50) == ""
    assert (
        message(3000, "self_guided.enabled=false") == message(3000, "self_guided.alpha=0", "self_guided.beta=0") == ""
    )


def test_few_negatives_are_reported_at_the_start():
    def message(images: int, *overrides: str) -> str:
        cfg = demo(*overrides)
        return training_checks.few_negatives(cfg.self_guided, cfg.train, images, 300)

    one_pass = "self_guided.negatives=micro_batch"
    assert message(2, "train.global_batch=2") == (
        "the contrastive terms have few negatives: each anchor distinguishes its image from 1 other (train.global_batch 2): "
        "raise it, or set self_guided.beta=0"
    )
    assert message(2, "train.global_batch=2", one_pass) == (
        "the contrastive terms have few negatives: each anchor distinguishes its image from 1 other (a forward pass of all data "
        "ranks; train.global_batch 2, train.micro_batch 0): raise them or use more ranks, since accumulated micro-batches "
        "do not add negatives, or set self_guided.beta=0"
    )
    assert "from 3 others (a forward" in message(
        4, "train.micro_batch=4", one_pass
    ) and "from no other, so nothing" in message(1)
    assert message(8) == message(2, "self_guided.beta=0") == message(2, "self_guided.enabled=false") == ""
    assert message(2, "self_guided.step_loss=false", "self_guided.view_loss=false") == ""
    assert training_checks.few_negatives(demo().self_guided, demo().train, 2, 50) == ""  # a trial


def test_images_to_choose_from():
    def images(*overrides: str, ranks: int = 4) -> int:
        return training_checks.contrastive_images(demo(*overrides), ranks)

    assert images(ranks=2) == images("train.micro_batch=8") == 64  # of the step
    one_pass = ("train.micro_batch=8", "self_guided.negatives=micro_batch")
    assert images(*one_pass) == 32 and images("parallel.tensor_parallel=2", *one_pass) == 16


def test_the_papers_runs_and_the_demo_start_without_a_warning():
    for path in ("demo.yaml", "ar_b_50ep.yaml", "star_b_50ep.yaml", "star_3b.yaml"):
        cfg = load_config(ROOT / "configs/run" / path)
        steps = cfg.train.steps or round(cfg.train.epochs * 5004)
        assert training_checks.slow_teacher(cfg.self_guided, cfg.train.init, steps) == "", path


def test_a_healthy_run_is_not_warned():
    """Rows that `megastar train configs/run/demo.yaml` really wrote, each checked when it was the newest: 400 steps with a row
    every five, before there were spread and distance, and the first steps with a row every two."""
    for name, step in (("demo_400", 400), ("demo_start", 62)):
        some = [json.loads(line) for line in (ROOT / f"tests/data/{name}.jsonl").read_text().splitlines()]
        assert some[-1]["step"] == step
        assert [found(demo(), some[: n + 1]) for n in range(len(some))] == [{}] * len(some)
    assert {"spread_student", "spread_teacher", "teacher_distance", "memory_gib"} <= some[-1].keys()


def test_real_training_differs_from_a_teacher_that_equals_the_student():
    """Eight steps of the tests' tiny network, written the plain way."""

    def mim(**guided) -> float:
        return max(row["loss_mim"] for row in train(config(self_guided=guided), 1)["history"])

    assert mim(mask_ratio=0.0, teacher_decay=0.0, teacher_warmup=False) < training_checks.TRIVIAL / 10
    assert mim() > 10 * training_checks.TRIVIAL


# The run's part ----------------------------------------------------------------------------------------------------
def warnings(run: Path) -> list[tuple[int, str]]:
    return [(e["step"], e["about"]) for e in read_events(run) if e["event"] == "warning"]


def feed(cfg: RunConfig, some: list[dict], done: int = 0) -> None:
    metrics = MetricsLogger(Path(cfg.run), done, 1000, 10, True)
    watch = HealthMonitor(cfg, 1, 1000, metrics)
    for row in some:
        row = dict(row)
        step = row.pop("step")
        metrics.step(step, 64, row)
        watch.update(step, row)
        watch.update(step + 1, {})  # a step without a row
    metrics.close()


def test_a_warning_comes_once_and_again_after_it_was_over(tmp_path, caplog):
    cfg = demo(f"run={tmp_path / 'run'}")
    save_config(cfg, tmp_path / "run" / "config.yaml")
    sick, well = rows(100, loss_mim=1e-6)[40:], rows(100)[40:]
    back = [r | {"step": r["step"] + 1000} for r in rows(100, loss_mim=1e-6)[40:]]
    feed(cfg, rows(40) + sick[:30] + well[30:] + back[:15])
    assert warnings(tmp_path / "run") == [(500, "trivial_mim"), (1500, "trivial_mim")]
    assert caplog.text.count("the MIM loss is trivially small") == 2
    assert [h for h in status_of(tmp_path / "run").health if "MIM" in h]  # as long as it is so


def test_a_run_that_goes_on_remembers_its_rows_and_one_that_went_back_forgets(tmp_path):
    cfg = demo(f"run={tmp_path / 'run'}")
    bad = rows(100, loss_mim=1e-6)
    feed(cfg, bad[:48])
    assert warnings(tmp_path / "run") == []  # eight rows
    feed(cfg, bad[48:52], done=480)
    assert warnings(tmp_path / "run") == [(500, "trivial_mim")]
    feed(demo(f"run={tmp_path / 'other'}"), bad[:49] + rows(100)[42:60])
    assert warnings(tmp_path / "other") == []


def test_only_the_rows_that_count_are_held(tmp_path):
    some = [{"step": s, "loss_ar": 6.0} for s in range(1, 3001)]
    lines = [json.dumps(r) for r in some]
    lines[500:500] = [
        json.dumps({"step": 500, "val_loss_ar": 5.5}),
        "[1, 2]",
        "not json",
        '{"step": 500, "save_blocked_s": 1}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3001, "loss_a')
    held = training_checks.read_rows(tmp_path)
    assert [r["step"] for r in training_checks.training_rows(held)] == [*range(1, 11), *range(2951, 3001)]
    assert [r for r in held if "loss_ar" not in r] == [
        {"step": 500, "val_loss_ar": 5.5},
        {"step": 500, "save_blocked_s": 1},
    ]
    assert [r["step"] for r in held] == sorted(r["step"] for r in held)
    assert training_checks.read_rows(tmp_path / "nowhere") == []


def test_warnings_at_the_start_come_from_the_main_rank_only(tmp_path):
    cfg = demo(f"run={tmp_path / 'run'}", "self_guided.teacher_decay=0.9999", "self_guided.teacher_warmup=false")
    metrics = MetricsLogger(tmp_path / "run", 0, 300, 10, False)
    HealthMonitor(cfg, 1, 300, metrics).update(10, dict(HEALTHY))
    assert not (tmp_path / "run").exists()
    metrics = MetricsLogger(tmp_path / "run", 0, 300, 10, True)
    HealthMonitor(cfg, 1, 300, metrics)
    metrics.close()
    assert warnings(tmp_path / "run") == [(0, "slow_teacher")]
    save_config(cfg, tmp_path / "run" / "config.yaml")
    assert status_of(tmp_path / "run").health[0].startswith("the teacher hardly moves")
