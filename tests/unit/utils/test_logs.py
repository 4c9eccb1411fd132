"""Levels, time and rank of log lines; progress where there is no terminal."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest
from rich.console import Console

from megastar.commands._shared.common import Parser
from megastar.errors import UserError
from megastar.utils import progress_bar
from megastar.utils.logs import configure_logging, shared_console


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=60)


def test_lines_have_time_level_and_rank(console):
    configure_logging(console=console, rank=3, environ={})
    logging.getLogger("megastar.engine.trainer").info("saved [red]%s[/]", "x" * 80)
    logging.getLogger("megastar.engine").debug("not shown")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO rank 3 saved \[red\]x{80}\[/\]\n", console.file.getvalue()
    )
    assert shared_console() is console


@pytest.mark.parametrize(
    ("level", "environ", "shown"),
    [
        ("", {"MEGASTAR_LOG_LEVEL": "warning"}, ["WARNING"]),
        ("DEBUG", {"MEGASTAR_LOG_LEVEL": "error"}, ["DEBUG", "INFO", "WARNING"]),
        ("", {}, ["INFO", "WARNING"]),
    ],
)
def test_the_level_comes_from_the_option_then_the_variable(console, level, environ, shown):
    configure_logging(level, console=console, environ=environ)
    configure_logging(level, console=console, environ=environ)  # replaces the first handler
    for name in ("debug", "info", "warning"):
        getattr(logging.getLogger("megastar.data"), name)("text")
    assert [line.split()[2] for line in console.file.getvalue().splitlines()] == shown


@pytest.mark.parametrize(
    ("rank", "words", "environ", "level"),
    [
        ("0", [], {}, "INFO"),
        ("1", [], {}, "WARNING"),
        ("1", ["--verbose"], {}, "DEBUG"),
        ("1", [], {"MEGASTAR_LOG_LEVEL": "info"}, "INFO"),
        ("", [], {}, "INFO"),
    ],
)
def test_ranks_other_than_0_report_problems_only(monkeypatch, rank, words, environ, level):
    monkeypatch.delenv("MEGASTAR_LOG_LEVEL", raising=False)
    for name, value in environ.items() | ({"RANK": rank, "WORLD_SIZE": "2"}.items() if rank else set()):
        monkeypatch.setenv(name, value)
    Parser("sample", "", "").parse(words)
    assert logging.getLevelName(logging.getLogger("megastar").level) == level
    Parser("elastic", "", "").parse(words, every_rank=True)  # an agent on each node, started by srun
    assert logging.getLevelName(logging.getLogger("megastar").level) == (level if words else "INFO")


def test_an_unknown_level_is_refused():
    with pytest.raises(UserError, match="MEGASTAR_LOG_LEVEL=LOUD: unknown log level; choose one of DEBUG, INFO"):
        configure_logging(environ={"MEGASTAR_LOG_LEVEL": "loud"})


def test_progress_is_logged_where_there_is_no_terminal(console, monkeypatch):
    configure_logging(console=console, environ={})
    monkeypatch.setattr(progress_bar, "LOG_EVERY", 0.0)
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: now[0])
    with progress_bar.progress_bar(console, "features", 10, done=2) as bar:
        now[0] += 4.2
        bar.advance(3, "5 images/s")
    assert console.file.getvalue().split("INFO ")[1].strip() == "features: 5 of 10, 7 s left, 5 images/s"
    configure_logging("WARNING", console=console)
    for quiet in (None, console):
        with progress_bar.progress_bar(quiet, "features", 10) as bar:
            bar.update(10)
    assert console.file.getvalue().count("features") == 1


def test_progress_lines_are_ten_seconds_apart(console, monkeypatch):
    configure_logging(console=console, environ={})
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: now[0])
    with progress_bar.progress_bar(console, "checking", 10**10, bytes=True) as bar:
        for _ in range(250):
            now[0] += 0.1
            bar.advance(10**7)
    lines = [line.split("INFO ")[1] for line in console.file.getvalue().splitlines() if "INFO" in line]
    assert lines == ["checking: 1.0 GB of 10.0 GB, 1 min 30 s left", "checking: 2.0 GB of 10.0 GB, 1 min 20 s left"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_the_step_and_the_time_left(width, monkeypatch):
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    text = "loss 6.123  ar 5.123  acc_step 0.0123  acc_view 0.123  l2 0.12  images/s 1.2e+03"
    with progress_bar.progress_bar(terminal, "train", 500_000) as bar:
        begun, passed = time.monotonic(), [0]
        monkeypatch.setattr(bar.bar, "get_time", lambda: begun + passed[0])
        for i in range(5):
            passed[0] = 5 * i
            bar.update(50_000 * i, text)
            bar.bar.refresh()
    last = [line for line in re.split(r"[\r\n]+", terminal.file.getvalue()) if "train" in line][-1]
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
    assert re.match(r"train 200000/500000 0:00:3[01] ", seen) and len(seen) <= width, seen
    assert "loss 6.1" in seen, seen


def test_a_count_is_shown_on_a_terminal_and_logged_elsewhere(console, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_bar.time, "perf_counter", lambda: now[0])
    configure_logging(console=console, environ={})
    with progress_bar.progress_count(console, "listing images") as report:
        for number in range(1, 31):
            now[0] += 1
            report(1000 * number)
    lines = [line.split("INFO ")[1] for line in console.file.getvalue().splitlines()]
    assert [line.strip() for line in lines] == [f"listing images: {n}000" for n in (10, 20, 30)]
    terminal = Console(file=io.StringIO(), width=60, force_terminal=True)
    configure_logging(console=terminal, environ={})
    with progress_bar.progress_count(terminal, "listing images") as report:
        report(7)
    assert "listing images" in terminal.file.getvalue() and "INFO" not in terminal.file.getvalue()
    before = terminal.file.getvalue()
    configure_logging("WARNING", console=terminal)
    with progress_bar.progress_count(terminal, "listing images") as report:
        report(7)
    assert terminal.file.getvalue() == before
