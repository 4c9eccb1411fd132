"""Imports point down, packages of one level do not know each other, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megastar"
LEVEL = {
    "errors": 0,
    "host": 0,
    "leaving": 0,
    "stop": 0,
    "config": 0,
    "device": 1,
    "matmul": 1,
    "parallel": 1,
    "model": 2,
    "tokenizer": 2,
    "objectives": 3,
    "teacher": 3,
    "data": 3,
    "sampling": 4,
    "evaluation": 5,
    "engine": 6,
    "diagnosis": 6,
    "report": 6,
    "cli": 7,
}
EVERYWHERE = {
    "errors",
    "host",
    "device",
    "matmul",
}  # no packages: an exception, a name, a question to the hardware, a product
FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    """The layer a file belongs to; the commands are the cli's."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if first in ("cli", "commands", "__main__") else first


def imports(path: Path) -> list[tuple[str, int]]:
    """(dotted module, line) of every import, also those inside functions."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            out.append((node.module or "", node.lineno))
            if node.module == "megastar":
                out += [(f"megastar.{alias.name}", node.lineno) for alias in node.names]
    return out


def violations(path: Path) -> list[str]:
    mine, found = owner(path), []
    for module, line in imports(path):
        top, _, rest = module.partition(".")
        if top != "megastar" or not rest:
            continue
        theirs = rest.split(".")[0]
        theirs = "cli" if theirs == "commands" else theirs
        if theirs not in LEVEL:  # megastar.__version__
            continue
        if theirs != mine and theirs not in EVERYWHERE and LEVEL[theirs] >= LEVEL[mine]:
            found.append(
                f"{path.relative_to(ROOT)}:{line}: {mine} (L{LEVEL[mine]}) imports {theirs} (L{LEVEL[theirs]})"
            )
    return found


def test_every_package_has_a_level():
    assert {owner(p) for p in FILES} - {"__init__"} <= LEVEL.keys()


def test_imports_point_down():
    assert [v for p in FILES if owner(p) != "__init__" for v in violations(p)] == []


def test_the_check_finds_what_it_looks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, text, expected in [
        (
            "model/a.py",
            "def f():\n    from megastar.engine.loop import train",
            "model/a.py:2: model (L2) imports engine (L6)",
        ),
        ("data/a.py", "import megastar.teacher.ema", "data/a.py:1: data (L3) imports teacher (L3)"),
        ("data/b.py", "from megastar import sampling", "data/b.py:1: data (L3) imports sampling (L4)"),
    ]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        assert violations(path) == [expected]
    (tmp_path / "engine").mkdir()
    fine = tmp_path / "engine" / "a.py"
    fine.write_text("from megastar.config.load import load_config\nimport torch\nfrom megastar import __version__")
    assert violations(fine) == []


@pytest.mark.parametrize(("package", "owners"), [("deepspeed", {"engine"}), ("argparse", {"cli"})])
def test_only_its_owner_imports(package, owners):
    users = {owner(p) for p in FILES for module, _ in imports(p) if module.split(".")[0] == package}
    assert users == owners


def test_model_knows_no_ranks():
    modules = {m for p in (PACKAGE / "model").rglob("*.py") for m, _ in imports(p)}
    assert not [m for m in modules if m.startswith("torch.distributed")]


def test_config_and_help_need_no_torch():
    code = (
        "import sys, megastar.config.load, megastar.config.help, megastar.cli\nmegastar.cli.main(['train', '--help'])\n"
    )
    script = f"try:\n    {code.replace(chr(10), chr(10) + '    ')}\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_no_file_is_over_400_lines():
    folders = [PACKAGE, ROOT / "tests", ROOT / "tools", ROOT / "benchmarks"]
    long = {str(p.relative_to(ROOT)): n for f in folders for p in f.rglob("*.py") if (n := lines(p)) > 400}
    assert not long


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    """pytest leaves folders of some names out unless told otherwise, tests/dist among them."""
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {"unit", "dist", "integration"} <= folders
    assert not [f for f in folders if any(fnmatch(f, pattern) for pattern in passed_over)]
