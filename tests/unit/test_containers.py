"""The container definitions: linted, alike, and their installation run in an empty virtual environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "container"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
APPTAINER = (FOLDER / "apptainer.def").read_text()
INSTALL = "deploy/container/install.sh"


def test_the_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def copied() -> set[str]:
    """What the Dockerfile copies into /src."""
    words = [line.split()[1:] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    return {source for *sources, _ in words for source in sources}


def test_both_definitions_copy_the_same_files_which_exist():
    section = re.search(r"(?ms)^%files\n(.*?)\n\n", APPTAINER)[1]
    pairs = [line.split() for line in section.splitlines()]
    assert all(target == f"/src/{source}" for source, target in pairs)
    assert {source for source, _ in pairs} == copied()
    assert all((ROOT / source).exists() for source in copied())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied() and "*" in ignored


def test_the_image_is_not_root_and_has_a_health_check_and_both_devices():
    assert re.search(r"(?m)^USER 1000$", DOCKERFILE) and not re.search(r"(?m)^USER (root|0)$", DOCKERFILE)
    assert re.search(r'(?m)^HEALTHCHECK .*CMD \["megastar", "doctor", "--quiet"\]$', DOCKERFILE)
    stages = re.findall(r"(?m)^FROM (\S+) AS (\w+)$", DOCKERFILE)
    assert [name for _, name in stages] == ["cpu", "cuda", "megastar"] and stages[2][0] == "${DEVICE}"
    assert all(":" in image and not image.endswith(":latest") for image, _ in stages[:2])
    for image, _ in stages[:2]:
        assert image in APPTAINER
    assert DOCKERFILE.index("USER 1000") < DOCKERFILE.index("ENTRYPOINT") and "tini" in DOCKERFILE


def test_the_lines_for_slurm_are_those_of_its_settings():
    settings, page = (ROOT / "slurm" / "env.sh").read_text(), (ROOT / "docs" / "containers.md").read_text()
    for name in ("MEGASTAR_SRUN", "MEGASTAR_PREFIX"):
        line = re.search(rf"(?m)^# ({name}=\(.*\))$", settings)[1]
        assert line in page


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["gpu", "x"], "gpu is neither cpu nor cuda"),
        (["cpu", "x"], "set TORCH_INDEX to a package index of CPU builds"),
        (["cuda", "x"], "EXTRAS=eval,hubb: setup.py has no extra hubb"),
    ],
)
def test_bad_arguments_of_the_installation(words, problem):
    environ = {k: v for k, v in os.environ.items() if k not in ("TORCH_INDEX", "PIP_FIND_LINKS")}
    environ["EXTRAS"] = "eval,hubb"
    done = subprocess.run(["sh", INSTALL, *words], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and problem in done.stderr and not (ROOT / "x").exists()


def test_both_definitions_install_the_same_extras():
    extras = re.search(r"(?m)^extras=\$\{EXTRAS:-(.*)\}$", (ROOT / INSTALL).read_text())[1]
    assert f"ARG EXTRAS={extras}\n" in DOCKERFILE and f"    extras={extras}\n" in APPTAINER
    assert "hub" in extras.split(",")  # the error of hf:// without it names a command that cannot be run in the image


@pytest.mark.slow
def test_the_installation_in_an_empty_environment(tmp_path):
    """From the files that the images have; it needs the network and an index of CPU builds of torch."""
    source, venv, work = tmp_path / "src", tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    for name in copied():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHON": sys.executable}
    done = subprocess.run(["sh", INSTALL, "cpu", venv], cwd=source, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"(?m)^megastar \d", done.stdout), (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
    shutil.rmtree(source)
    words = [venv / "bin" / "megastar", "sample", "--per-class", "1", "--classes", "0", "--out", work / "a.png"]
    subprocess.run(words, cwd=work, env=environ, check=True, capture_output=True, timeout=300)
    assert (work / "a.png").is_file()
    subprocess.run([venv / "bin" / "python", "-c", "import huggingface_hub, argcomplete"], check=True)
    doctor = subprocess.run(
        [venv / "bin" / "megastar", "doctor", "-q"], cwd=work, env=environ, capture_output=True, text=True
    )
    assert "missing" not in doctor.stdout, doctor.stdout
