"""Levels, time and rank of log lines; progress where there is no terminal."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

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


def test_an_unknown_level_is_refused():
    with pytest.raises(UserError, match="MEGASTAR_LOG_LEVEL=LOUD: unknown log level; choose one of DEBUG, INFO"):
        configure_logging(environ={"MEGASTAR_LOG_LEVEL": "loud"})


def test_progress_is_logged_where_there_is_no_terminal(console, monkeypatch):
    configure_logging(console=console, environ={})
    monkeypatch.setattr(progress_bar, "LOG_EVERY", 0.0)
    with progress_bar.progress_bar(console, "features", 10, done=2) as bar:
        bar.advance(3, "5 images/s")
    assert console.file.getvalue().split("INFO ")[1].strip() == "features: 5 of 10, 5 images/s"
    configure_logging("WARNING", console=console)
    for quiet in (None, console):
        with progress_bar.progress_bar(quiet, "features", 10) as bar:
            bar.update(10)
    assert console.file.getvalue().count("features") == 1
