"""The supported versions of Python and torch are the same wherever they are written; make names what to install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_all_files_name_the_same_versions():
    setup = read("setup.py")
    assert tuple(re.findall(r"Python :: (3\.\d+)\"", setup)) == VERSIONS
    assert f"oldest={VERSIONS[0]} newest={VERSIONS[-1]}" in read("tools/check_python.sh")
    assert f"for wanted in {' '.join(VERSIONS)};" in read("tools/other_pythons.sh")
    pyproject = tomllib.loads(read("pyproject.toml"))
    assert pyproject["project"]["requires-python"] == f">={VERSIONS[0]}"
    tools = pyproject["tool"]
    assert tools["ruff"]["target-version"] == "py311" and tools["mypy"]["python_version"] == VERSIONS[0]
    span = f"{VERSIONS[0]} to {VERSIONS[-1]}"
    assert f"Python {span}" in read("README.md") and f"({span})" in read("Makefile")
    assert "python_version" not in read("constraints.txt")  # one list for all of them


def test_the_torch_range_holds_the_pinned_and_the_oldest_tested_one():
    low, high = re.search(r'"torch>=([\d.]+),<([\d.]+)"', read("setup.py")).groups()
    numbers = lambda text: tuple(map(int, text.split(".")))  # noqa: E731
    pinned = re.search(r"(?m)^torch==([\d.]+)", read("constraints.txt"))[1]
    oldest = re.search(r"NULLGPU_TORCH \?= ([\d.]+)", read("Makefile"))[1]
    assert numbers(low) <= numbers(oldest)[:2] <= numbers(pinned) < numbers(high)
    assert f"torch {low}" in read("README.md")


def fake(folder: Path, version: str, *, venv: bool = True) -> Path:
    """An interpreter that tells this version."""
    path = folder / "fakepython"
    path.write_text(
        f"#!/bin/sh\ncase $2 in *version_info*) echo {version} ;; *ensurepip*) exit {int(not venv)} ;; esac\n"
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", VERSIONS)
def test_supported_interpreters_pass(version, tmp_path):
    assert check(fake(tmp_path, version)) == (0, "")


def check(python: object) -> tuple[int, str]:
    done = subprocess.run(["sh", "tools/check_python.sh", str(python)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10", "3.15", "4.0"])
def test_others_get_one_sentence_that_says_what_to_install(version, tmp_path):
    status, told = check(fake(tmp_path, version))
    assert status == 1 and told.count("\n") == 1
    assert told.startswith(f"Python {version} is not supported: install Python 3.11 to 3.14 (Debian: apt-get install")
    assert told.endswith("and run make PYTHON=python3.13\n")


def test_what_is_no_interpreter_or_has_no_venv(tmp_path):
    assert check(tmp_path / "none")[1].startswith(f"{tmp_path}/none is not installed: install Python 3.11 to 3.14")
    assert "is not a Python interpreter: install Python" in check("false")[1]
    status, told = check(fake(tmp_path, "3.12", venv=False))
    assert status == 1 and "install its venv package (Debian: apt-get install python3.12-venv)" in told
    assert check(sys.executable) == (0, "")


def test_make_stops_at_an_unsupported_interpreter(tmp_path):
    words = ["make", "install", f"PYTHON={fake(tmp_path, '3.10')}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MAKEFLAGS": ""})
    assert done.returncode != 0 and "Python 3.10 is not supported: install Python 3.11 to 3.14" in done.stderr
    assert not (tmp_path / "venv").exists()
