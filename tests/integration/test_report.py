"""`megastar report` of runs with checkpoints, and its page in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar import cli
from megastar.config.load import load_config, save_config
from megastar.report.read_run import read_provenance
from megastar.run_dir.events import append_event
from tests.browser import Browser
from tests.checkpoints import write_checkpoint

STEPS = 400
SEEN = {"ar": {"self_guided.enabled=false", "optim.lr=0.001"}, "st-ar": set()}


def write_run(world, folder: Path, name: str) -> None:
    """A run of two kept checkpoints, with rows, events, and a grid of an earlier step without metadata."""
    run = folder / name
    config = world.write_config(folder / f"{name}.yaml", run, steps=STEPS)
    cfg = load_config(config, sorted(SEEN[name]))
    save_config(cfg, run / "config.yaml")
    append_event(run, "started", 0, "begun", steps=STEPS, ranks=2, command=f"megastar train {name}.yaml")
    for step in (200, 400):
        write_checkpoint(run, cfg, 1, 1, step=step)
        append_event(run, "saved", step, "saved", checkpoint=f"step-{step:08d}")
    append_event(run, "resumed", 200, "resumed <b>step-00000200</b>", steps=STEPS, ranks=2)
    append_event(run, "warning", 300, "a warning with a remedy")
    with (run / "metrics.jsonl").open("w") as f:
        for step in range(1, STEPS + 1):
            row = {
                "step": step,
                "loss": 6 + 3 * math.exp(-step / 80) + 0.1 * math.sin(step),
                "loss_ar": 5 + math.exp(-step / 80),
            }
            row |= {"grad_norm": "inf" if step == 250 else 1.0, "lr": 1e-3, "images_per_s": 40.0, "step_s": 0.2}
            row |= {"memory_gib": 1.5, "mfu": 0.3}
            if cfg.self_guided.enabled:
                row |= {"acc_step": step / STEPS, "spread_student": 0.9, "spread_teacher": 0.8, "teacher_distance": 0.1}
            f.write(json.dumps(row) + "\n")
            if step % 100 == 0:
                f.write(json.dumps({"step": step, "val_loss_ar": 5.2}) + "\n")
        f.write('{"step": 401, "lo')
    (run / "samples").mkdir()
    Image.new("RGB", (80, 60), "red").save(run / "samples" / "step-00000100.png")


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "runs"
    folder.mkdir()
    for name in SEEN:
        write_run(world, folder, name)
    return folder


@pytest.fixture(scope="module")
def page(runs) -> Path:
    """The page of both runs."""
    assert cli.main(["report", str(runs.parent), "--per-class", "2", "--device", "cpu"]) == 0
    return runs.parent / "report.html"


def data_of(page: Path) -> dict:
    text = page.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_contents_of_the_page(page, runs):
    ar, star = data_of(page)["runs"]
    assert (ar["name"], star["name"]) == ("ar", "st-ar")
    assert [g["step"] for g in star["grids"]] == [100, 200, 400]
    assert [g["caption"] for g in star["grids"]] == ["", *["averaged weights, guidance 3, temperature 0.9"] * 2]
    assert star["values"]["grad_norm"]["bad"] == [250] and star["values"]["loss"]["x"][-1] == STEPS
    assert star["chance"] == 1 / 8 and ar["chance"] is None
    assert star["attention"]["blocks"] == [1, 2] and len(star["attention"]["hidden"]) == round(0.25 * 15)
    assert np.shape(star["distances"]["heads"]) == (2, 2) and "val" in star["distances"]["caption"]
    assert "as in training" in star["attention"]["caption"] and "all keys visible" in ar["attention"]["caption"]
    text = page.read_text()
    assert "Differences from ar" in text and "self_guided.enabled" in text and "a warning with a remedy" in text
    assert "<b>step-00000200</b>" not in text


def test_grids_are_drawn_once_and_alike(page, runs, capsys, monkeypatch):
    folder = runs / "st-ar" / "samples"
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    assert sorted(before) == ["step-00000100.png", "step-00000200.png", "step-00000400.png"]
    provenance = read_provenance(folder / "step-00000200.png")
    assert (
        provenance["per_class"] == 2 and provenance["seed"] == 0 and read_provenance(folder / "step-00000100.png") == {}
    )
    # Both checkpoints have the same weights, so their samples are equal.
    grids = [np.asarray(Image.open(folder / f"step-{s:08d}.png")) for s in (200, 400)]
    assert np.array_equal(*grids)
    words = ["report", str(runs / "st-ar"), "--out", str(runs / "again.html"), "--device", "cpu", "--no-attention"]
    capsys.readouterr()
    assert cli.main([*words, "--per-class", "2"]) == 0
    assert "samples of step" not in capsys.readouterr().out
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before
    assert data_of(runs / "again.html")["runs"][0]["attention"] is None


def test_problems_are_notes(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "st-ar", run, ignore=shutil.ignore_patterns("samples", "weights"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(tokenizer|shards|val_shards): /.*", r"\1: gone/away", text))
    assert cli.main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "samples: the tokenizer gone/away does not exist: give its location with --tokenizer" in out
    assert "attention: the token shards gone/away and gone/away do not exist: give a location with --shards" in out
    assert cli.main(["report", str(run), "--no-samples", "--no-attention"]) == 0
    assert "gone" not in capsys.readouterr().out
    (run / "config.yaml").unlink()
    os.truncate(run / "checkpoints" / "step-00000400" / "megastar.json", 5)
    assert cli.main(["report", str(run)]) == 0
    assert "config.yaml is missing" in capsys.readouterr().out


# In a browser ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def opened(browser, page):
    browser.problems.clear()
    browser.view(1280)
    browser.open(page)
    yield browser
    assert browser.problems == []


@pytest.mark.browser
def test_every_chart_is_drawn(opened):
    charts = opened.run(
        "[...document.querySelectorAll('#charts .chart, #distances .chart')].map(c => [c.querySelector('h4').textContent,"
        " [...c.querySelectorAll('.series')].map(s => s.dataset.run).sort().join(),"
        " [...c.querySelectorAll('.series path')].every(p => p.getAttribute('d').length > 8 && !p.getAttribute('d').includes('NaN'))])"
    )
    both, one = "0,1", "1"
    drawn = {title: runs for title, runs, _ in charts}
    assert all(fine for *_, fine in charts)
    assert drawn == {
        "Total loss": both, "Next-token loss": both, "Validation loss": both, "Contrastive accuracy, positions": one, "Feature spread": "1,1",
        "Teacher-student distance": one, "Learning rate": both, "Gradient norm": both, "Throughput": both, "MFU": both,
        "Memory": both, "Step time": both, "Attention distance per block": both,
    }  # fmt: skip
    assert opened.run("document.querySelectorAll('#charts .mark').length") > 20
    assert opened.run("[...document.querySelectorAll('.chart')].filter(c => c.querySelector('.nan')).length") == 1
    assert "NaN" not in opened.run("document.body.innerText")


@pytest.mark.browser
def test_the_slider_changes_the_image(opened):
    images = "JSON.stringify([...document.querySelectorAll('#grids img')].map(i => [i.src.length, i.naturalWidth > 0, i.alt]))"
    newest = opened.run(images)
    assert json.loads(newest)[1][2] == "Sample grid of st-ar at step 400" and all(
        seen for _, seen, _ in json.loads(newest)
    )
    opened.run("document.getElementById('grid-step').focus()")
    opened.press("Home")
    earliest = opened.run(images)
    assert (
        json.loads(earliest)[1][2] == "Sample grid of st-ar at step 100"
        and json.loads(earliest)[1][0] != json.loads(newest)[1][0]
    )
    opened.press("ArrowRight")
    assert (
        "step 200" in opened.run(images)
        and opened.run("document.getElementById('grid-now').textContent") == "200 (2 of 3)"
    )


@pytest.mark.browser
def test_pointer_and_keys_show_values(opened):
    x, y = opened.centre("#charts .chart svg")
    opened.move(x, y)
    tip = opened.run("document.querySelector('#charts .chart .tip').innerText")
    step = int(re.search(r"step ([\d,]+)", tip)[1].replace(",", ""))
    assert 150 < step < 280 and tip.count("5.") == 2 and "ar" in tip and "st-ar" in tip
    lines = opened.run(
        "[...document.querySelectorAll('#charts .cross')].filter(c => c.getAttribute('visibility') === 'visible').length"
    )
    assert lines == 12  # all charts show the same step
    opened.move(5, 5)
    assert opened.run("document.querySelector('#charts .chart .tip').hidden")
    opened.run("document.querySelector('#charts .chart svg').focus()")
    opened.press("End")
    assert "step 400" in opened.run("document.querySelector('#charts .chart .tip').innerText")
    opened.press("ArrowLeft")
    assert "saved" in opened.run("document.querySelector('#charts .chart .tip').innerText")


@pytest.mark.browser
def test_controls(opened):
    path = "document.querySelector('#charts .series[data-run=\"1\"] .line').getAttribute('d')"
    texts = (
        "[...document.querySelector('#charts .chart').querySelectorAll('svg text')].map(t => t.textContent).join(' ')"
    )
    before = opened.run(path)
    opened.run(
        "(() => { const s = document.getElementById('smooth'); s.value = 90; s.dispatchEvent(new Event('input')); })()"
    )
    opened.settle()
    smooth = opened.run(path)
    opened.click("#axis [data-x=images]")
    assert smooth != before and "images" in opened.run(texts) and "2000" in opened.run(texts)
    opened.click("#axis [data-x=hours]")
    assert "hours" in opened.run(texts) and "0.02" in opened.run(texts)  # 400 steps of 0.2 s
    opened.click("#charts .chart .log")
    assert (
        opened.run(path) != smooth
        and opened.run("document.querySelector('.log').getAttribute('aria-pressed')") == "true"
    )
    opened.click("#marks")
    assert opened.run("document.querySelectorAll('#charts .mark').length") == 0
    opened.click("#legend [data-run='0']")
    assert opened.run("document.querySelectorAll('.series[data-run=\"0\"]').length") == 0
    assert opened.run("document.querySelectorAll('.series[data-run=\"1\"]').length") > 10
    assert opened.run("document.querySelector('#grids figure').hidden")
    opened.click("#legend [data-run='0']")
    assert opened.run("document.querySelectorAll('.series[data-run=\"0\"]').length") > 5


@pytest.mark.browser
def test_maps_respond_to_the_query(opened):
    pixels = (
        "['plain-image', 'masked-image', 'plain-map', 'masked-map'].map(n => document.getElementById(n).toDataURL())"
    )
    first = opened.run(pixels)
    assert len(set(first)) == 4
    opened.run("document.getElementById('map-query').focus()")
    opened.press("Home")
    second = opened.run(pixels)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert opened.run("document.getElementById('map-now').textContent") == "the class, predicts token 0"
    assert opened.run("document.getElementById('plain-class').textContent") == "on the class: 100%"
    opened.click("#masked-image")  # the middle of 4 x 4 tokens
    assert re.match("token (5|6|9|10),", opened.run("document.getElementById('map-now').textContent"))
    opened.run(
        "(() => { const s = document.getElementById('map-run'); s.value = 1; s.dispatchEvent(new Event('change')); })()"
    )
    opened.settle()
    assert "as in training" in opened.run("document.getElementById('map-caption').textContent")


@pytest.mark.browser
def test_dark_light_and_print(opened):
    colours = "['body', '.card', '#charts .series .line'].map(s => { const c = getComputedStyle(document.querySelector(s)); return [c.backgroundColor, c.color, c.stroke]; }).flat()"
    light = opened.run(colours)
    opened.view(1280, dark=True)
    dark = opened.run(colours)
    brightness = [sum(map(float, re.findall(r"[\d.]+", c)[:3])) for c in (light[0], dark[0], light[1], dark[1])]
    assert brightness[0] > 600 > 200 > brightness[1] and brightness[2] < 200 < 600 < brightness[3]
    assert light[8] != dark[8]
    opened.click("#theme")  # dark
    opened.click("#theme")  # light, independent of the system
    assert opened.run(colours) == light and opened.run("document.getElementById('theme').textContent") == "Theme: light"
    opened.click("#theme")
    assert opened.run(colours) == dark
    opened.call("Emulation.setEmulatedMedia", media="print")
    opened.settle()
    assert opened.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.run("getComputedStyle(document.getElementById('axis')).display") == "none"
    opened.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 320, 768])
def test_nothing_is_wider_than_the_screen(opened, page, width):
    opened.view(width, 844, mobile=width < 700)
    opened.open(page)
    opened.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    opened.settle()
    assert opened.run("document.documentElement.scrollWidth") <= width
    # Only scrollable elements may be wider than their container.
    wide = opened.run(
        f"[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > {width} + 1 && "
        "!e.closest('.scroll, pre, .chips, svg')).map(e => e.tagName + '.' + e.className)"
    )
    assert wide == []
