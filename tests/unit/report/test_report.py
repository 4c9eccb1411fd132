"""The parts of `megastar report`: reading, downsampling, differences, the text of the page."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from PIL import Image

from megastar import cli
from megastar.config.load import load_config, save_config
from megastar.errors import UserError
from megastar.report.charts import charts_for
from megastar.report.differences import ABSENT, differences
from megastar.report.page import MAX_EVENTS, Grid, ReportRun, as_json, embedded, page, shown_events
from megastar.report.read_run import chance_accuracy, find_runs, read_config, read_run, run_names
from megastar.report.render_samples import CLASSES, evenly_spaced
from megastar.report.series import Column, best, read_columns, thin, training_hours
from megastar.run_dir.events import append_event

NASTY = """<script>alert("1")</script>'&\u2028</title>"""
SHOWN = NASTY.replace("\u2028", r"\u2028")


def column(values, every=1):
    found = Column()
    for i, value in enumerate(values, 1):
        found.append(i * every, value)
    return found


# metrics.jsonl ------------------------------------------------------------------------------------------------------
def test_damaged_rows_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 3.5, "on": true, "text": "x", "list": [1]}\n\n[1]\nnull\n{"loss": 1}\n{"step": "2", "loss": 1}\n'
        b'{"step": -1, "loss": 1}\n{"step": 2, "loss": "nan", "lr": "1e-3", "grad_norm": "inf"}\n\xff\xfe{\n'
        b'{"step": 3, "loss": NaN, "val_loss_ar": 2}\n' + b"[" * 100_000 + b'\n{"step": 4, "lo'
    )
    found = read_columns(path)
    assert {name: list(c.steps) for name, c in found.items()} == {
        "loss": [1, 2, 3],
        "grad_norm": [2],
        "val_loss_ar": [3],
    }
    assert (
        found["loss"].values[0] == 3.5 and math.isnan(found["loss"].values[1]) and math.isnan(found["loss"].values[2])
    )
    assert found["grad_norm"].values[0] == math.inf
    assert thin(found["loss"]) == {"x": [1], "y": [3.5], "bad": [2, 3]}
    assert read_columns(tmp_path / "none.jsonl") == {}


def test_repeated_steps_replace_the_earlier_ones(tmp_path):
    rows = [{"step": s, "loss": s} for s in range(1, 9)] + [{"step": 8, "val_loss_ar": 1.0}]
    rows += [{"step": 5, "loss": 50}, {"step": 5, "val_loss_ar": 0.5}, {"step": 6, "loss": 60}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_columns(path)
    assert dict(zip(found["loss"].steps, found["loss"].values, strict=True)) == {1: 1, 2: 2, 3: 3, 4: 4, 5: 50, 6: 60}
    assert list(found["val_loss_ar"].steps) == [5] and best(found["val_loss_ar"]) == (0.5, 5)
    assert best(None) is None and best(column([math.nan])) is None


def test_thinning_keeps_ends_and_spikes():
    rng = random.Random(0)
    values = [5 + rng.random() for _ in range(25_000)]
    values[12_345], values[7_777], values[20_000] = 900.0, -3.0, math.nan
    found = thin(column(values, every=10), 1000)
    assert len(found["x"]) <= 1000 and found["x"] == sorted(set(found["x"])) and found["bad"] == [200_010]
    assert (found["x"][0], found["x"][-1]) == (10, 250_000)
    there = dict(zip(found["x"], found["y"], strict=True))
    assert there[123_460] == 900.0 and there[77_780] == -3.0
    # Every interval keeps its minimum and maximum.
    for low in range(0, 25_000, 1000):
        part = [v for v in values[low : low + 1000] if math.isfinite(v)]
        shown = [y for x, y in there.items() if low < x / 10 <= low + 1000]
        assert max(shown) == pytest.approx(max(part), rel=1e-4) and min(shown) == pytest.approx(min(part), rel=1e-4)
    few = thin(column([1.0, 2.0, 3.0]), 1000)
    assert few == {"x": [1, 2, 3], "y": [1.0, 2.0, 3.0], "bad": []}


def test_training_hours_count_the_steps_between_rows():
    steps = Column()
    for step, seconds in ((10, 3.6), (20, 7.2), (40, 1.8)):  # means over 10, 10 and 20 steps
        steps.append(step, seconds)
    assert training_hours({"step_s": steps}) == {"x": [0.0, 10, 20, 40], "y": [0.0, 0.01, 0.03, 0.04]}
    assert training_hours({}) == {"x": [], "y": []}
    late = Column()
    for step in (1000, 1010):
        late.append(step, 3.6)
    assert training_hours({"step_s": late}) == {"x": [990.0, 1000, 1010], "y": [0.0, 0.01, 0.02]}
    long = training_hours({"step_s": column([1.0] * 100_000)})
    assert len(long["x"]) <= 201 and long["y"][-1] == pytest.approx(100_000 / 3600, rel=1e-5)


def test_a_value_without_a_chart_gets_its_own():
    groups = charts_for({"loss_ar", "val_loss_ar", "some_value", "slowest_rank"})
    assert [g["title"] for g in groups] == ["Losses", "Other values"]
    assert [c["title"] for g in groups for c in g["charts"]] == ["Next-token loss", "Validation loss", "some_value"]


# The page -----------------------------------------------------------------------------------------------------------
class Reader(HTMLParser):
    """Tags, and the text outside of script and style."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.addresses, self.inside = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag if tag in ("script", "style") else self.inside
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]
    return reader, json.loads(data)


def nasty_run():
    event = {"time": NASTY, "host": NASTY, "event": "warning", "step": 1, "text": NASTY}
    return ReportRun(
        NASTY, NASTY, NASTY, [(NASTY, NASTY)], [(NASTY, NASTY)], [NASTY], [NASTY], {NASTY: column([1.0, 2.0])}, 4, 0.5,
        [event], {NASTY: 1}, NASTY, [Grid(1, "data:,", NASTY)], None, {"means": [1.0], "heads": [[1.0]], "uniform": 1.0, "caption": NASTY},
    )  # fmt: skip


def test_texts_of_a_run_stay_texts():
    plain, _ = read(page([ReportRun("a")], "none", [], title="a", made="now"))
    html = page([nasty_run()], NASTY, differences({NASTY: NASTY}, [{NASTY: 1}]), title=NASTY, made=NASTY)
    reader, data = read(html)
    assert reader.tags.count("script") == plain.tags.count("script") == 2 and "alert" not in "".join(reader.tags)
    assert "".join(reader.text).count(SHOWN) >= 12 and "\u2028" not in html
    assert data["runs"][0]["name"] == SHOWN and list(data["runs"][0]["values"]) == [SHOWN]


def test_nothing_is_loaded_from_elsewhere():
    html = page([nasty_run()], "none", [], title="a", made="now")
    reader, _ = read(html)
    assert all(a.startswith(("#", "data:")) for a in reader.addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html) and "default-src 'none'" in html


def test_json_in_a_script_is_strict():
    assert as_json({"a": "</script><!--&\u2029"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2029"}'
    with pytest.raises(ValueError):
        as_json(math.nan)


def test_a_long_run_makes_a_small_page():
    rng = random.Random(0)
    columns = {f"value_{i}": column([rng.random() for _ in range(25_000)], every=10) for i in range(3)}
    events = [{"event": "saved", "step": i, "text": "x" * 999} for i in range(5000)]
    events += [{"event": "skipped", "step": i, "text": "y"} for i in range(5000)]
    html = page([ReportRun("a", columns=columns, events=events)], "none", [], title="a", made="now")
    assert len(html) < 300_000
    assert len(shown_events(events)) == MAX_EVENTS and {e["event"] for e in shown_events(events)} == {"skipped"}
    assert shown_events([{"event": "saved", "step": "x"}, {"event": "saved"}]) == []
    many = [ReportRun(str(i), columns=columns) for i in range(40)]
    _, data = read(page(many, "none", [], title="a", made="now"))
    assert all(len(r["values"]["value_0"]["x"]) <= 400 for r in data["runs"])


def test_images_are_embedded_and_bounded():
    assert embedded(Image.new("RGB", (10, 10))).startswith("data:image/webp;base64,")
    assert len(embedded(Image.effect_noise((4000, 400), 50))) < 400_000


# Configurations -----------------------------------------------------------------------------------------------------
def test_differences():
    base = {"optim": {"lr": 1e-4, "eps": 1e-8}, "on": True, "name": "", "same": 1}
    other = {"optim": {"lr": 2e-4, "eps": 1e-8, "new": 3}, "on": False, "name": "x", "same": 1}
    assert differences(base, [base, None]) == []
    rows = {r.name: (r.baseline, r.values, r.changed) for r in differences(base, [base, other, None])}
    assert rows == {
        "optim.lr": ("0.0001", ["0.0001", "0.0002", ""], [False, True, False]),
        "on": ("true", ["true", "false", ""], [False, True, False]),
        "name": ('""', ['""', "x", ""], [False, True, False]),
        "optim.new": (ABSENT, [ABSENT, "3", ""], [False, True, False]),
    }


# Folders ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def cfg(tmp_path):
    words = f"run={tmp_path / 'run'} data.shards=none train.steps=8 train.global_batch=8 train.micro_batch=2"
    found = load_config(None, words.split())
    save_config(found, tmp_path / "run" / "config.yaml")
    return found


def test_run_names_are_unique(tmp_path):
    a, b, c = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"
    assert run_names([a], None) == ["run"] and run_names([b, c], None) == ["run", "other"]
    assert run_names([a, b], None) == ["x/run", "y/run"] and run_names([a, b], "A, B") == ["A", "B"]
    for given in ("A", "A,A", "A,"):
        with pytest.raises(UserError, match=f"--names {given}: give 2 different names for 2 runs"):
            run_names([a, b], given)
    with pytest.raises(UserError, match="a run is named twice"):
        run_names([a, a], None)


def test_a_comparison_is_its_runs(tmp_path, cfg):
    for name in ("b", "a"):
        save_config(cfg, tmp_path / "out" / "runs" / name / "config.yaml")
    (tmp_path / "out" / "runs" / "empty").mkdir()
    assert [p.name for p in find_runs(tmp_path / "out")] == ["a", "b"]
    assert find_runs(tmp_path / "run") == [tmp_path / "run"]


def test_chance_is_one_over_the_images_that_are_compared(cfg):
    assert chance_accuracy(cfg, []) == 1 / 8  # the global batch, on any number of ranks
    cfg.self_guided.negatives = "micro_batch"
    assert chance_accuracy(cfg, []) is None  # the number of ranks is unknown
    assert chance_accuracy(cfg, [{"ranks": 2}]) == 1 / 4  # two ranks of two images
    assert chance_accuracy(cfg, [{"ranks": 3}]) is None  # 8 images cannot be divided among them
    cfg.train.micro_batch = 0
    assert chance_accuracy(cfg, []) == 1 / 8
    cfg.self_guided.enabled = False
    assert chance_accuracy(cfg, []) is None


def test_a_run_without_a_configuration_is_shown(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n{"step": 6, "los')
    found, cfg = read_run(run, "run")
    assert (
        cfg is None and found.config is None and found.state == "unknown" and dict(found.facts)["last loss"] == "2.5000"
    )
    assert found.notes == [f"configuration: {run / 'config.yaml'} is missing"]
    (run / "config.yaml").write_text("train: {stepps: 4}")
    cfg, fields, problem = read_config(run)
    assert cfg is None and fields == {"train": {"stepps": 4}} and "stepps" in problem


def test_the_card_of_a_run(tmp_path, cfg):
    run = tmp_path / "run"
    fields = {
        "steps": 8,
        "ranks": 2,
        "command": "megastar train x.yaml",
        "packages": {"torch": "2.13.0"},
        "device": "H100",
    }
    append_event(run, "started", 0, "begun", **fields)
    append_event(run, "warning", 2, "mind the gap")
    append_event(run, "warning", 4, "mind the gap")
    rows = [{"step": s, "loss": 9.0 - s, "step_s": 1800.0, "images_per_s": 4.0} for s in range(1, 5)]
    rows.append({"step": 4, "val_loss_ar": 3.25})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found, _ = read_run(run, "run")
    facts, origin = dict(found.facts), dict(found.origin)
    assert facts["step"] == "4 of 8 (50%)" and facts["best validation loss"] == "3.2500 at step 4"
    assert facts["images seen"] == "32" and facts["training time"] == "2 h" and facts["throughput"] == "4 images/s"
    assert origin["command"] == "megastar train x.yaml" and origin["packages"] == "torch 2.13.0"
    assert origin["hosts"].endswith("2 rank(s), H100") and found.state in ("running", "starting")
    assert [line for line in found.health if "gap" in line] == ["step 4: mind the gap"] and found.config == asdict(cfg)


def test_user_errors_are_one_sentence(tmp_path, cfg, capsys):
    def error(*words):
        assert cli.main(["report", *map(str, words)]) == 2
        out = capsys.readouterr()
        assert out.out == ""
        return out.err.strip().removeprefix("megastar: error: ")

    empty = tmp_path / "empty"
    empty.mkdir()
    run, bare = tmp_path / "run", ("--no-samples", "--no-attention")
    assert error(tmp_path / "none").endswith("is not a folder: name a run folder, the `run` of its configuration")
    assert "is not a run folder: it contains neither config.yaml nor metrics.jsonl, and no runs/*" in error(empty)
    assert "--baseline" in error(run, *bare, "--baseline", empty) and "name a run folder" in error(
        run, *bare, "--baseline", empty
    )
    assert error(run, *bare, "--out", empty) == f"--out {empty} is a folder: name the file to write"
    assert "required: RUN" in error()


def test_an_empty_run_has_a_page(tmp_path, cfg, capsys):
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out.replace("\n", "")
    reader, data = read((tmp_path / "run" / "report.html").read_text())
    assert data["groups"] == [] and "no events" in "".join(reader.text)


def test_evenly_spaced():
    assert evenly_spaced([1, 2, 3], 3) == [1, 2, 3] and evenly_spaced(list(range(100)), 4) == [0, 33, 66, 99]
    classes = evenly_spaced(list(range(1000)), CLASSES)
    assert classes[::11] == [0, 999] and len(classes) == 12
