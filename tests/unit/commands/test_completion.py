"""Completion in a shell: argcomplete asks the program as bash does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megastar import cli
from megastar.commands._shared.completion import FIELDS, parser_of

ROOT = Path(__file__).resolve().parents[3]


def completions(line: str, tmp_path: Path, *, python: tuple[str, ...] = ()) -> list[str]:
    """What bash would offer at the end of ``line``."""
    out = tmp_path / "completions"
    environ = os.environ | {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:", "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    out.unlink(missing_ok=True)
    words = [sys.executable, *python, "-m", "megastar"]
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout == "", done
    return [word.rstrip() for word in out.read_text().split("\n") if word] if out.exists() else []


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("megastar tr", ["train-tokenizer", "train"]),
        ("megastar sample --cfg-s", ["--cfg-scale", "--cfg-schedule"]),
        ("megastar sample --cfg-schedule ", ["constant", "linear", "cosine"]),
        ("megastar data ", ["inspect", "verify", "stats", "index"]),
        ("megastar data stats --per", ["--per-class"]),
        ("megastar train optim.grad_c", ["optim.grad_clip="]),
        ("megastar train configs/run/demo.yaml optim.name=a", ["adamw"]),
        ("megastar train configs/run/dem", ["configs/run/demo.yaml"]),
        ("megastar train-tokenizer tokenizer.codebook_s", ["tokenizer.codebook_size="]),
        ("megastar compare probe.scor", ["probe.score_on="]),
        ("megastar compare probe.score_on=", ["train", "val", "test"]),
        ("megastar plan b train.deterministic=", ["true", "false"]),
        ("megastar nonsense --", ["--version"]),
    ],
)
def test_what_is_offered(line, offered, tmp_path):
    assert set(completions(line, tmp_path)) - {"--help", "-h"} == set(offered)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_completes_its_own_options(command):
    """The parser for completion takes the same options, and imports no torch (which would take seconds)."""
    module = __import__(f"megastar.commands.{cli.COMMANDS[command][0]}", fromlist=["parser"])
    own = module.parser("inspect") if command == "data" else module.parser()
    words = [command, "inspect"] if command == "data" else [command]
    below = parser_of(cli.COMMANDS, command)
    for word in words:
        below = next(a for a in below._actions if hasattr(a, "_name_parser_map"))._name_parser_map[word]
    assert {o for a in own._actions for o in a.option_strings} == {o for a in below._actions for o in a.option_strings}
    assert command not in FIELDS or any(getattr(a, "completer", None) for a in below._actions)


def test_completion_imports_no_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = sys.modules['numpy'] = None\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sitecustomize, runpy; runpy.run_module('megastar', run_name='__main__')"
    assert "--npz" in completions("megastar sample --n", tmp_path, python=("-c", code))


def test_without_argcomplete_the_program_runs_as_ever(tmp_path):
    code = "import sys; sys.modules['argcomplete'] = None; from megastar.cli import program; program(['--version'])"
    environ = os.environ | {"_ARGCOMPLETE": "1", "COMP_LINE": "megastar ", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("megastar ")


def test_the_marker_is_where_argcomplete_looks():
    assert b"PYTHON_ARGCOMPLETE_OK" in (ROOT / "megastar/cli.py").read_bytes()[:1024]
