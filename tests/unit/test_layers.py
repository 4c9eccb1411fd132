"""The rules of the layout: imports point down and in no circle, folders and files stay small, torch loads late."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from megastar.run_dir import layout

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megastar"
# A package imports only packages of a lower level. Deeper packages (data/storage) belong to their first one.
LEVEL = {
    "errors": -2,
    "utils": -1,
    "config": 0,
    "run_dir": 1,
    "parallel": 1,
    "encoders": 1,
    "model": 2,
    "tokenizer": 2,
    "objectives": 3,
    "teacher": 3,
    "data": 3,
    "checkpoint": 4,
    "sampling": 5,
    "evaluation": 6,
    "api": 7,
    "engine": 7,
    "diagnosis": 7,
    "report": 7,
    "experiments": 7,
    "cli": 8,
    "version": -2,
}
# Attributes in which DeepSpeed keeps partitions: reading or writing one is the business of engine/zero alone.
ZERO_ATTRIBUTES = {
    *(
        "ds_tensor",
        "ds_id",
        "ds_status",
        "ds_numel",
        "ds_shape",
        "ds_persist",
        "all_gather_coalesced",
        "partition_numel",
    ),
    *("bit16_groups_flat", "bit16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
    *("single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups", "params_in_partition"),
}
MOST_MODULES, MOST_LINES = 20, 400


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """The level that a module belongs to; the commands belong to the command line."""
    first = module.split(".")[1] if "." in module else "__init__"
    return "cli" if first in ("cli", "commands", "__main__") else first


def sources() -> dict[str, ast.Module]:
    return {module_of(p): ast.parse(p.read_text(), str(p)) for p in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, also those inside functions and below TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def edges(files: dict[str, ast.Module]) -> dict[str, dict[str, int]]:
    """module -> the project's modules that it imports, each with a line."""
    out: dict[str, dict[str, int]] = {}
    for module, tree in files.items():
        out[module] = {}
        for name, line in imports(tree):
            target = name if name in files else name.rpartition(".")[0]
            if target in files:
                out[module].setdefault(target, line)
    return out


def upward(graph: dict[str, dict[str, int]]) -> list[str]:
    found = []
    for module, targets in graph.items():
        mine = package_of(module)
        for target, line in targets.items():
            theirs = package_of(target)
            if "__init__" not in (mine, theirs) and mine != theirs and LEVEL[theirs] >= LEVEL[mine]:
                found.append(f"{module}:{line}: {mine} (level {LEVEL[mine]}) imports {theirs} (level {LEVEL[theirs]})")
    return found


def circles(graph: dict[str, dict[str, int]]) -> list[list[str]]:
    """Modules that import each other: what is left after modules without imports are removed again and again."""
    left = {m: set(t) for m, t in graph.items()}
    for direction in (left, {m: {n for n in left if m in left[n]} for m in left}):
        while done := [m for m, t in direction.items() if not t & direction.keys()]:
            for m in done:
                del direction[m]
        left = {m: t & direction.keys() for m, t in left.items() if m in direction}
    return [sorted(left)] if left else []


def test_every_package_has_a_level():
    assert {package_of(m) for m in sources()} - {"__init__"} == LEVEL.keys()


def test_imports_point_down_in_no_circle():
    graph = edges(sources())
    assert upward(graph) == []
    assert circles(graph) == []


def test_the_check_finds_what_it_looks_for():
    files = {
        "megastar": "",
        "megastar.engine.trainer": "import torch\nfrom megastar.engine.zero import setup",
        "megastar.engine.zero.setup": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from megastar.engine.trainer import Trainer",
        "megastar.teacher.ema": "from megastar import __version__\nfrom megastar.utils import files",
        "megastar.utils.files": "",
        "megastar.data.order": "def f():\n    import megastar.teacher.ema",
    }
    graph = edges({name: ast.parse(text) for name, text in files.items()})
    assert upward(graph) == ["megastar.data.order:2: data (level 3) imports teacher (level 3)"]
    assert circles(graph) == [["megastar.engine.trainer", "megastar.engine.zero.setup"]]


def test_folders_and_files_stay_small():
    folders = [PACKAGE, ROOT / "tests", ROOT / "tools", ROOT / "benchmarks"]
    files = [p for f in folders for p in f.rglob("*.py")]
    crowd = {str(p.parent.relative_to(ROOT)) for p in files if len(modules_in(p.parent)) > MOST_MODULES}
    assert not crowd
    assert not {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > MOST_LINES}


def modules_in(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*.py") if p.name != "__init__.py"]


def test_tests_mirror_the_package():
    unit = ROOT / "tests" / "unit"
    for test in unit.rglob("test_*.py"):
        folder = test.parent.relative_to(unit)
        assert folder.parts[:1] in ((), ("slurm",)) or (PACKAGE / folder).is_dir(), f"{test}: no such package"


@pytest.mark.parametrize(
    ("package", "owners"), [("deepspeed", ["megastar.engine.zero"]), ("argparse", ["megastar.commands"])]
)
def test_only_its_owner_imports(package, owners):
    users = {m for m, tree in sources().items() for name, _ in imports(tree) if name.split(".")[0] == package}
    assert users and not [m for m in users if not m.startswith(tuple(owners))]


def test_only_engine_zero_touches_partitions():
    found = [
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        if not module.startswith("megastar.engine.zero")
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ZERO_ATTRIBUTES)
        or (isinstance(node, ast.Constant) and node.value in ZERO_ATTRIBUTES)  # getattr(p, "ds_shape")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("model", "torch.distributed"),  # the network knows no ranks
        ("checkpoint", "torch.distributed"),
        ("checkpoint", "deepspeed"),
        ("config", "torch"),
        ("run_dir", "torch"),
        ("run_dir", "numpy"),
    ],
)
def test_packages_without_imports_of(package, forbidden):
    names = {
        (module, name)
        for module, tree in sources().items()
        if module.startswith(f"megastar.{package}.")
        for name, _ in imports(tree)
    }
    assert not [n for n in names if f"{n[1]}.".startswith(f"{forbidden}.")]


def test_only_the_layout_names_the_files_of_a_run_folder():
    names = {layout.CONFIG, layout.METRICS, layout.CHECKPOINTS, layout.ROLLBACKS, layout.LOST}
    found = {
        f"{module}:{node.lineno}"
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names and module != layout.__name__
    }
    assert not found


def test_image_files_are_opened_in_one_place():
    tools = {p.stem: ast.parse(p.read_text()) for p in (ROOT / "tools").glob("*.py")}
    found = {
        module
        for module, tree in (sources() | tools).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")
    }
    assert found == {"megastar.data.images.image_files"}


def test_a_public_class_name_exists_once():
    found: dict[str, list[str]] = {}
    for module, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert not {name: where for name, where in found.items() if len(where) > 1}


def test_every_command_defines_main():
    for path in modules_in(PACKAGE / "commands"):
        functions = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert path.name.startswith("_") or "main" in functions, path.name


def test_config_and_help_need_no_torch():
    code = (
        "import sys, megastar.config.load, megastar.config.help, megastar.cli\nmegastar.cli.main(['train', '--help'])\n"
    )
    script = f"try:\n    {code.replace(chr(10), chr(10) + '    ')}\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    """pytest leaves folders of some names out unless told otherwise, tests/dist among them."""
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {"unit", "dist", "integration"} <= folders
    assert not [f for f in folders if any(fnmatch(f, pattern) for pattern in passed_over)]
