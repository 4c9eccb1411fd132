"""An installation without a clone: what the wheel holds, and the commands in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]


def call(*words: object, cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git knows, as on another machine."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    wanted = ("megastar", "configs", "assets", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md")
    for name in filter(None, names.stdout.decode().split("\0")):
        if name.split("/")[0] in wanted and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    call("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, clone, cwd=out)
    (made,) = out.glob("megastar-*.whl")
    return made


def test_the_wheel_is_small_and_whole(wheel):
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert {f"megastar/shipped/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*") if p.is_file()} <= names
    assert "megastar/shipped/assets/weights/demo-nano.safetensors" in names and "megastar/report/web/live.js" in names
    assert not [n for n in names if n.startswith(("tests/", "tools/")) or "emoji64.tar" in n]
    for line in (
        "Name: megastar",
        "Requires-Python: >=3.11",
        "Requires-Dist: torch<2.16,>=2.11",
        "Provides-Extra: eval",
    ):
        assert line in metadata, metadata[:2000]


def test_commands_work_in_an_empty_folder(wheel, tmp_path):
    """Without a clone, a virtual environment or a prefix: only a folder on the path, as of pip install --target."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    call("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=empty)
    run = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    where = call("-c", "import megastar; print(megastar.__file__)", cwd=empty, **run)
    assert where.strip() == str(site / "megastar" / "__init__.py")
    assert "b: 110.9 M parameters" in call("-m", "megastar", "plan", "b", "--gpus", "8", cwd=empty, **run)
    printed = call("-m", "megastar", "train", "configs/run/demo.yaml", "--print-config", cwd=empty, **run)
    assert "name: nano" in printed
    told = call("-m", "megastar", "sample", "--per-class", "1", "--classes", "0,1", cwd=empty, **run)
    assert "2 images of 2 classes: samples.png" in told
    with Image.open(empty / "samples.png") as image:
        assert image.width >= 64
    assert [p.name for p in empty.iterdir()] == ["samples.png"]
