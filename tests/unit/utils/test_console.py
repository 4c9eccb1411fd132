"""What is printed is data: no markup, no control characters, in any encoding; an error cannot be forged by a value."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from megastar.cli import main
from megastar.utils import progress_bar
from megastar.utils.console import PlainConsole
from megastar.utils.logs import configure_logging
from megastar.utils.printable import one_entry, one_line, printable, say

HOSTILE = "x[/y] [red]z[/] \x1b[31m \x9b1m \u202e\u2066 \x07 \u200b \udcff :smile:"
SHOWN = r"x[/y] [red]z[/] \x1b[31m \x9b1m \u202e\u2066 \x07 \u200b \udcff :smile:"


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def content(file: io.TextIOWrapper) -> str:
    return file.buffer.getvalue().decode(file.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_hostile_names_in_every_renderable_and_encoding(encoding):
    file = stream(encoding)
    console = PlainConsole(file=file, width=200)
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(printable(HOSTILE), "red"))
    for thing in (HOSTILE, Text(HOSTILE), table, "ü ✓ 字"):
        console.print(thing)
    console.rule(HOSTILE)
    text = content(file)
    assert text.count(SHOWN) == 6
    assert printable(text) == text
    assert ("✓" in text) == (encoding == "utf-8") and ("\\u2713" in text) == (encoding != "utf-8")
    assert text.isascii() or encoding == "utf-8" or text.replace("ü", "").isascii()


def test_styles_stay(monkeypatch):
    file = io.StringIO()
    PlainConsole(file=file, force_terminal=True, width=80, color_system="standard").print(Text("a\x1b[2J", "red"))
    assert file.getvalue() == "\x1b[31ma\\x1b[2J\x1b[0m\n"


def test_a_bar_shows_names_as_they_are():
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=200, color_system=None)
    configure_logging(console=console, environ={})
    with progress_bar.progress_bar(console, "[/x] \x1b]0;t", 3) as bar:
        bar.update(3, "[/red] \u202e")
    assert r"[/x] \x1b]0;t" in file.getvalue() and r"[/red] \u202e" in file.getvalue()


def test_a_value_cannot_begin_a_line(capsys):
    file = io.StringIO()
    configure_logging(console=PlainConsole(file=file, width=300), environ={})
    logging.getLogger("megastar.test").info("saved %s", "x\n2026-01-01 00:00:00 ERROR forged\r\rover")
    assert file.getvalue().count("\n") == 1 and r"saved x\n2026-01-01 00:00:00 ERROR forged\r\rover" in file.getvalue()
    assert main(["train", "x\nmegastar: error: forged\x1b[2K.yaml"]) == 2
    assert capsys.readouterr().err == (
        r"megastar: error: configuration x\nmegastar: error: forged\x1b[2K.yaml does not exist: check the path" + "\n"
    )
    assert one_entry("two problems\n  - a\n  - b\nc") == "two problems\n  - a\n  - b\\nc"
    assert one_line("a\n\tb") == r"a\n\tb"


def test_a_printed_value_has_no_line_of_its_own():
    file = io.StringIO()
    PlainConsole(file=file, width=80).print("run x\ny\n  - more", style="bold")
    assert file.getvalue() == "run x\\ny\n  - more\n"


def test_plain_output_in_ascii():
    file = stream("ascii")
    say("ü\x1b[1m\udcff", file)
    assert content(file) == "\\xfc\\x1b[1m\\udcff\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "utf-16"},
    ],
)
def test_a_locale_without_unicode_ends_no_command(tmp_path, variables):
    file = tmp_path / "ü字.yaml"
    file.write_text("run: ü字\ntrain: {stepz: 5}\n", encoding="utf-8")
    run = [sys.executable, "-m", "megastar", "train"]
    for words, status in (([str(file)], 2), (["data.shards=ü字", "train.steps=5", "--print-config"], 0)):
        done = subprocess.run([*run, *words], env=os.environ | variables, capture_output=True, timeout=100)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
