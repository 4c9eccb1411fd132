"""megastar compare: tables and figures, and the job queue."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from megastar.config.env_text import recorded
from megastar.config.load import load_compare_config, save_config
from megastar.errors import UserError
from megastar.evaluation.figure import mean_and_deviation, spaced
from megastar.experiments import tables
from megastar.experiments.comparison import redraw
from megastar.experiments.figures import draw_probe, draw_score
from megastar.experiments.job_queue import (
    Attempt,
    Job,
    JobQueue,
    QueueStopped,
    last_step,
    send_signal,
    tail,
)
from megastar.experiments.plan import baselines, changed_fields, plan_runs
from megastar.experiments.results import BEST, LAST, LOSS, spread
from megastar.utils.files import write_atomic

FD = "FD-EffLite0 (test)"


def test_means_and_spreads_are_numpys(results):
    values = [3.5, 1.25, 9.0]
    s = spread(values)
    assert (s["mean"], s["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-12)
    assert (s["n"], s["values"]) == (3, values)
    assert spread([2.0])["std"] is None
    summary, rows = results.summary(), results.rows
    accuracy = {n: 100 * np.array(r["weights"]["ema"]["probe"]["accuracy"]) for n, r in rows.items() if r["weights"]}
    last = [accuracy[f"ar-seed{s}"][-1] for s in range(3)]
    table = summary["weights"]["ema"]
    assert table[LAST]["ar"]["mean"] == pytest.approx(np.mean(last)) and table[LAST]["ar"]["n"] == 3
    assert table[LAST]["ar"]["std"] == pytest.approx(np.std(last, ddof=1))
    assert table[BEST]["ar2"]["values"] == pytest.approx([accuracy[f"ar2-seed{s}"].max() for s in range(3)])
    # An unfinished run does not count, nor does its loss so far.
    assert {q: table[q]["star"]["n"] for q in (LAST, BEST, FD, LOSS)} == dict.fromkeys((LAST, BEST, FD, LOSS), 2)
    pair = summary["differences"]["ema"]["star - ar2"][LAST]
    apart = [accuracy[f"star-seed{s}"][-1] - accuracy[f"ar2-seed{s}"][-1] for s in (0, 1)]
    assert pair["mean"] == pytest.approx(np.mean(apart)) and pair["std"] == pytest.approx(np.std(apart, ddof=1))


def test_each_variant_is_compared_with_each_baseline_once(results):
    assert results.baselines == ["ar", "ar2"]
    pairs = results.pairs()
    assert len(set(pairs)) == len(pairs) == 9 and ("ar2", "ar") in pairs and ("ar", "ar2") not in pairs
    assert results.summary()["differences"]["ema"]["mim - ar"][LAST]["n"] == 1
    for variant in results.cfg.variants.values():
        variant.overrides = []
    assert baselines(results.cfg, plan_runs(results.cfg, 0)) == ["ar"]  # all are guided: the first leads


def test_cost_is_relative_to_the_baselines(results):
    cost = results.summary()["cost"]
    assert cost["star"]["relative"] == {"ar": 2.0, "ar2": 1.0} and not cost["star"]["includes"]
    assert (cost["star"]["ms_per_image"], cost["star"]["cpu_ms_per_image"]) == (20.0, 20.0)
    for row in results.rows.values():  # as earlier versions wrote them
        row["cpu_ms_per_image"] = row.pop("step_cpu_ms_per_image") + 5
    cost = results.summary()["cost"]
    assert cost["star"]["includes"] == "validation and saving" and cost["star"]["relative"]["ar"] == 25 / 15
    assert tables.cost_table(results, results.summary())[0][5] == "CPU ms per image, with validation and saving"
    for row in results.rows.values():
        del row["cpu_ms_per_image"]
    cost = results.summary()["cost"]
    assert (
        cost["star"]["includes"].startswith("start-up")
        and cost["ar"]["cpu_ms_per_image"] == 1000 * 600 / results.runs[0].images
    )
    assert "with start-up" in tables.cost_table(results, results.summary())[0][5]
    results.gpus = 1
    assert results.summary()["cost"]["star"]["relative"] == {"ar": 2.0, "ar2": 1.0}  # by the clock


def test_tables_mark_single_seeds_and_name_the_split(results):
    summary = results.summary()
    text = tables.markdown(results, summary, "megastar compare x.yaml")
    mim = next(line for line in text.splitlines() if line.startswith("| MIM only |"))
    assert mim.count("(n=1)") == len(summary["weights"]["ema"]) and "| 1/1 |" in mim
    star = next(line for line in text.splitlines() if line.startswith("| ST-AR |"))
    assert "| 2/3 |" in star and "(n=1)" not in star and "±" in star
    for part in (
        "scored on test",
        FD + " ↓",
        LAST + " ↑",
        "`megastar compare x.yaml`",
        "n=1: one seed",
        "self_guided.baseline_views: 1 -> 2",
    ):
        assert part in text, part
    assert "| ST-AR − AR | 2 |" in text and "| ST-AR − AR, two crops | 2 |" in text


@pytest.mark.parametrize("width", [80, 200])
def test_the_console_shows_every_number_at_its_width(results, width):
    results.labels["star"] = "ST-AR [red]|x"
    out = io.StringIO()
    tables.show(results, results.summary(), Console(file=out, width=width))
    lines = out.getvalue().replace(tables.UNBROKEN, " ").splitlines()
    assert max(map(len, lines)) <= width
    assert sum("ST-AR [red]|x" in line and "±" in line for line in lines) >= 1
    numbers = sum(line.count("±") for line in lines if "standard" not in line and "deviation" not in line)
    cells = [
        c
        for q in (tables.quantities_table, tables.differences_table)
        for row in q(results, results.summary(), "ema")
        for c in row
    ]
    assert numbers == sum("±" in c for c in cells)
    assert "\\|x" in tables.markdown(results, results.summary(), "")


def test_columns_are_split_to_fit_the_width():
    rows = [["v", *("abcd" for _ in range(9))], ["xx", *("1234567" for _ in range(9))]]
    for width in (5, 20, 40, 95):
        split = tables.split_columns(rows, width)
        assert [i for table in split for i in table[1:]] == list(range(1, 10)) and all(t[0] == 0 for t in split)
        assert all(2 + 10 * (len(t) - 1) <= width - 2 or len(t) == 2 for t in split)


def test_both_figures_are_drawn_of_what_there_is(results, tmp_path):
    draw_probe(results, tmp_path / "probe.png", {"class": 0, "accuracy": 0.2})
    draw_score(results, tmp_path / "score.png")
    sizes = [(tmp_path / name).stat().st_size for name in ("probe.png", "score.png")]
    assert min(sizes) > 10_000
    for row in results.rows.values():
        row |= {"weights": {}, "curve": {}}
    draw_probe(results, tmp_path / "none" / "probe.png", None)
    draw_score(results, tmp_path / "none" / "score.png")
    assert not (tmp_path / "none").exists()


def test_a_band_leaves_out_what_was_not_measured():
    ys = np.array([[1.0, 2.0, 5.0], [2.0, np.nan, 1.0], [6.0, 4.0, np.nan]])
    mean, deviation = mean_and_deviation(ys)
    assert np.allclose(mean, np.nanmean(ys, 0)) and np.allclose(deviation, np.nanstd(ys, 0, ddof=1))
    assert mean_and_deviation(ys[:1, :1])[1].tolist() == [0.0]


def test_names_at_line_ends_do_not_overlap_and_stay_near():
    rng = np.random.default_rng(0)
    for _ in range(50):
        heights = sorted(rng.uniform(0, 3, 6))
        placed = spaced(heights, 0.5)
        assert np.diff(placed).min() >= 0.5 - 1e-9 and np.mean(placed) == pytest.approx(np.mean(heights))
    assert spaced([0.0, 1.0, 5.0], 0.5) == [0.0, 1.0, 5.0]


# Jobs ----------------------------------------------------------------------------------------------------------------
FAKE = """
import json, os, signal, sys, time
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "saves" in sys.argv: signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
print("said", *sys.argv[1:], flush=True)
if "fails" in sys.argv: sys.exit("this is why")
open(sys.argv[1], "w").write(json.dumps({"step": 1}) + "\\n")
while "ends" not in sys.argv: time.sleep(0.05)
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Makes queues with a fake command `megastar`, which ``-m`` finds in the working directory."""
    (tmp_path / "megastar").mkdir()
    (tmp_path / "megastar/__init__.py").touch()
    (tmp_path / "megastar/__main__.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    return lambda width: JobQueue([{"SLOT": str(i)} for i in range(width)], console)


def job(tmp_path, name: str, how: str, done=None) -> Job:
    file = tmp_path / f"{name}.jsonl"
    return Job(name, "train", [str(file), how], tmp_path / "logs" / f"{name}.log", 2, done or (lambda: last_step(file)))


def test_a_failed_job_does_not_stop_others(queue, tmp_path):
    ended: list[Attempt] = []

    def after(attempt: Attempt) -> list[Job]:
        ended.append(attempt)
        return [job(tmp_path, "more", "ends")] if attempt.job.run == "good" else []

    jobs = [job(tmp_path, "bad", "fails"), job(tmp_path, "good", "ends")]
    job_queue = queue(1)
    job_queue.run(jobs, after)
    assert [(a.job.run, a.status, a.interrupted) for a in ended] == [
        ("bad", 1, False),
        ("good", 0, False),
        ("more", 0, False),
    ]
    assert all(a.seconds > 0 and a.cpu_s > 0 for a in ended)
    assert (
        tail(ended[0].job.log) == f"$ megastar {tmp_path}/bad.jsonl fails\nsaid {tmp_path}/bad.jsonl fails\nthis is why"
    )
    out = job_queue.console.file.getvalue()
    assert out.splitlines() == ["bad: train ...", "good: train ...", "more: train ..."]  # no bars without a terminal


@pytest.mark.parametrize(("how", "signals", "status"), [("saves", 1, 85), ("stubborn", 2, -signal.SIGKILL)])
def test_a_signal_lets_jobs_save_and_a_second_one_kills_them(queue, tmp_path, how, signals, status):
    ended: list[Attempt] = []
    sent = 0

    def done() -> int:  # called between two polls, when a signal may arrive
        nonlocal sent
        step = last_step(tmp_path / "a.jsonl")
        if step and sent < signals:
            sent += 1
            os.kill(os.getpid(), signal.SIGINT)
        return step

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(QueueStopped) as stopped:
        queue(1).run([job(tmp_path, "a", how, done), job(tmp_path, "b", "ends")], lambda a: ended.append(a) or [])
    assert stopped.value.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) == before
    assert [(a.job.run, a.status, a.interrupted) for a in ended] == [("a", status, True)]  # b never began
    assert not (tmp_path / "b.jsonl").exists()


def test_the_steps_of_a_running_job(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert last_step(file) == 0
    file.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(2000)) + '{"step": 20')
    assert last_step(file) == 1999


def test_a_signal_does_not_take_the_status_of_a_job_that_has_ended():
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked for its status
    send_signal(process, signal.SIGTERM)
    _, status, _ = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 7


def test_a_cell_of_fewer_seeds_than_its_row_and_failed_runs_are_told(results):
    del results.rows["ar-seed2"]["weights"]["ema"]["score"]
    failed = {"ar-seed2": {"stage": "evaluate", "status": 1, "log": "x"}}
    text = tables.markdown(results, results.summary(), "megastar compare x.yaml", failed)
    ar = next(line for line in text.splitlines() if line.startswith("| AR |"))
    assert "| 3/3 |" in ar and ar.count("(n=2)") == 4  # FD and KD on two splits
    pair = next(line for line in text.splitlines() if line.startswith("| AR, two crops − AR |"))
    assert pair.split("|")[2].strip() == "2" and pair.count("(n=3)") == 3
    assert "Failed, and not part of the tables: ar-seed2 (evaluate)" in text


def test_a_redrawn_table_has_the_settings_of_its_numbers(results, tmp_path, capsys):
    """compare.yaml may be of a later start with other settings, which ended before it had results."""
    save_config(results.cfg, tmp_path / "compare.yaml")
    results.cfg.sample.cfg_scale = 2.0
    content = {"command": "megastar compare x.yaml", "runs": results.rows, "majority": {"accuracy": 0.2}}
    write_atomic(tmp_path / "results.json", json.dumps(content | {"config": recorded(asdict(results.cfg))}).encode())
    redraw(tmp_path, Console(file=io.StringIO()))
    assert "cfg_scale 2" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["variants.star.overrides=[eval.cfg_scale=3]"],
            "contains eval.cfg_scale=3: scores while training .* set base.eval",
        ),
        (["probe.fit_on=test"], "probe.fit_on and probe.score_on are both test"),
    ],
)
def test_unfair_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        plan_runs(load_compare_config("configs/run/compare_emoji.yaml", overrides), 0)


def test_skipped_steps_are_a_difference():
    cfg = load_compare_config(
        "configs/run/compare_emoji.yaml", ["variants.ar.overrides=[self_guided.enabled=false, faults.spike_sigma=0]"]
    )
    run = next(r for r in plan_runs(cfg, 0) if r.variant == "ar")
    assert "faults.spike_sigma: 6.0 -> 0.0" in changed_fields(cfg, run)
    run.cfg.faults.hang_timeout = 7.0
    assert not any("hang_timeout" in text for text in changed_fields(cfg, run))
