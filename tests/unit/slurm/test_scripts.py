"""The batch scripts without SLURM: what they ask sbatch for, what they would run. tests/slurm runs them for real."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(p for p in (ROOT / "slurm").glob("*.sh") if p.name not in ("env.sh", "common.sh", "bad_hosts.sh"))
TRAIN = [p for p in SCRIPTS if p.name.startswith("train_")]


def directives(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M)
    return {name: value or "" for name, value in found}


def shell(*words: object, **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "MEGASTAR"))}
    return subprocess.run([str(w) for w in words], cwd=ROOT, env=kept | env, capture_output=True, text=True)


def command(*words: object, **env: str) -> list[str]:
    """The last line of a dry run: the command."""
    done = shell("bash", *words, MEGASTAR_DRY_RUN="1", **env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def test_scripts_ask_for_what_keeps_a_run_alive():
    assert [p.stem for p in SCRIPTS] == [
        "pretokenize", "probe", "sample_fid", "train_3b", "train_b", "train_l", "train_tokenizer",
        "train_xl", "train_xxl",
    ]  # fmt: skip
    for script in SCRIPTS:
        asked = directives(script)
        assert {"requeue", "signal", "time", "nodes", "ntasks-per-node", "gpus-per-node"} <= asked.keys(), script
        assert asked["open-mode"] == "append" and asked["output"].startswith("%x-%")
        assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # a task a GPU
        assert "source slurm/common.sh || exit 2" in script.read_text()
    own = ("job-name", "nodes", "time")
    first, *others = [{k: v for k, v in directives(p).items() if k not in own} for p in TRAIN]
    assert first["signal"] == "USR1@180" and all(x == first for x in others)
    assert {directives(p)["job-name"] for p in TRAIN} == {f"megastar-{p.stem[6:]}" for p in TRAIN}


@pytest.mark.parametrize("script", TRAIN, ids=lambda p: p.stem)
def test_a_training_script_without_words_trains_its_own_configuration(script):
    words = command(script)
    wanted = "train-tokenizer" if script.stem == "train_tokenizer" else "train"
    assert words[0] == "srun" and words[-3:-1] == ["megastar", wanted] and (ROOT / words[-1]).is_file()


def test_words_reach_the_command():
    config = "configs/run/ar_xl_50ep.yaml"
    train = ROOT / "slurm/train_xl.sh"
    assert command(train, "train.steps=5", "run=a b")[-3:] == [
        "configs/run/star_xl_50ep.yaml",
        "train.steps=5",
        "run=a b",
    ]
    assert command(train, config, "train.steps=5")[-2:] == [config, "train.steps=5"]
    assert command(train, "--dry-run")[-2:] == ["configs/run/star_xl_50ep.yaml", "--dry-run"]
    assert command(train, MEGASTAR_SCRATCH="/scratch")[-1] == "data.cache=/scratch/megastar"
    assert command(train, "data.cache=/x", MEGASTAR_SCRATCH="/scratch")[-1] == "data.cache=/x"
    tokenizer = ROOT / "slurm/train_tokenizer.sh"
    emoji = "configs/tokenizer/emoji64.yaml"
    scratch = command(tokenizer, emoji, "out=a b", MEGASTAR_SCRATCH="/scratch")  # data.cache is no field of a tokenizer
    assert scratch[2:] == ["--label", "--wait=120", "megastar", "train-tokenizer", emoji, "out=a b"]
    words = ["megastar", "pretokenize", "a folder", "--out", "x"]
    assert command(ROOT / "slurm/pretokenize.sh", *words[2:]) == ["srun", "--kill-on-bad-exit=0", *words]
    assert command(ROOT / "slurm/sample_fid.sh", "w")[2:] == ["python", "tools/sample_fid.py", "w"]
    scoring = command(ROOT / "slurm/sample_fid.sh", "w", "--score", "s.json")  # one process group: all end with one
    assert scoring == [
        "srun",
        *[f"--kill-on-bad-exit={n}" for n in (0, 1)],
        "python",
        "tools/sample_fid.py",
        "w",
        "--score",
        "s.json",
    ]
    assert command(ROOT / "slurm/probe.sh", "w")[2:] == ["megastar", "probe", "w"]


def test_a_dry_run_tells_what_sbatch_and_the_site_ask_for():
    done = shell("bash", "slurm/train_l.sh", "run=runs/x", MEGASTAR_DRY_RUN="1", SBATCH_PARTITION="gpu")
    asked, folder, _ = done.stdout.splitlines()
    assert asked.startswith("sbatch --job-name=megastar-l --nodes=1 ") and asked.endswith(" SBATCH_PARTITION=gpu")
    assert folder == f"megastar: run folder {ROOT / 'runs/x'}, last checkpoint none"


def test_a_tokenizers_folder_and_checkpoint(tmp_path):
    """The time of its one checkpoint changes with each save; the names of the run folder and of its field are its own."""
    words = ("slurm/train_tokenizer.sh", "configs/tokenizer/emoji64.yaml", f"out={tmp_path}")
    lines = shell("bash", *words, MEGASTAR_DRY_RUN="1").stdout.splitlines()
    assert lines[1] == f"megastar: run folder {tmp_path}, last checkpoint none"
    (tmp_path / "last.pt").write_bytes(b"")
    os.utime(tmp_path / "last.pt", (86400, 86400))
    lines = shell("bash", *words, MEGASTAR_DRY_RUN="1", TZ="UTC").stdout.splitlines()
    assert lines[1] == f"megastar: run folder {tmp_path}, last checkpoint last.pt-1970-01-02T00:00:00"


def test_the_settings_of_a_site(tmp_path):
    site = tmp_path / "site.sh"
    site.write_text(
        (ROOT / "slurm/env.sh").read_text()
        + "MEGASTAR_SRUN=(--container-image=/i.sqsh --container-workdir='a b')\nMEGASTAR_PREFIX=(apptainer exec)\n"
    )
    words = command("slurm/train_b.sh", MEGASTAR_ENV=str(site))
    assert words[2:4] == ["--container-image=/i.sqsh", "--container-workdir=a b"]
    assert words[words.index("megastar") - 2 :][:2] == ["apptainer", "exec"]
    # A login shell sources it too: it must not end it, nor change its options.
    done = shell("bash", "-c", f"before=$-; source {site} && echo $- $before $MEGASTAR_MAX_REQUEUES $undefined")
    options, before, limit = done.stdout.split()
    assert options == before and limit == "50" and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("slurm/train_b.sh",), "not in a SLURM job: submit with sbatch slurm/train_b.sh"),
        (("slurm/train_b.sh", "nothing.yaml"), f"nothing.yaml cannot be read in {ROOT}: run sbatch in the repository"),
        (("slurm/train_tokenizer.sh", "no.yaml"), f"no.yaml cannot be read in {ROOT}: run sbatch in the repository"),
        (("slurm/probe.sh",), "usage: sbatch slurm/probe.sh RUN"),
        (("slurm/pretokenize.sh",), "usage: sbatch slurm/pretokenize.sh SOURCE"),
        (("slurm/sample_fid.sh",), "usage: sbatch slurm/sample_fid.sh RUN"),
    ],
)
def test_mistakes(words, message):
    dry = {} if "submit" in message else {"MEGASTAR_DRY_RUN": "1"}
    done = shell("bash", *words, **dry)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


SLURM = ("slurmctld", "slurmd", "munged", "munge", "sbatch", "srun", "scontrol", "scancel", "sinfo")


STAGES = {"test", "test-long", "test-fuzz", "test-slurm", "test-browser", "lint"}


def ci(folder: Path, there: tuple[str, ...], make: str) -> subprocess.CompletedProcess:
    """``.ci/run`` where these programs are installed and `make` runs this line of shell."""
    programs = {"apt-get": "exit 100", "sudo": 'shift 2; exec "$@"', "make": make} | dict.fromkeys(there, "")
    for name, what in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{what}\n")
        (folder / name).chmod(0o755)
    for name in ("bash", "env", "dirname", "id", "mktemp", "rm", "nice", "cat"):
        (folder / name).symlink_to(shutil.which(name))
    return shell("bash", ".ci/run", PATH=str(folder), TMPDIR=str(folder))


@pytest.mark.parametrize(
    ("there", "missing"), [((), "on a real SLURM"), (SLURM, "in a browser"), ((*SLURM, "chromium"), "")]
)
def test_ci_fails_where_packages_cannot_be_installed(tmp_path, there, missing):
    """It is told before anything else runs; nothing is skipped."""
    done = ci(tmp_path, there, f'echo "$1" >>{tmp_path}/made')
    if missing:
        told = f"cannot run the tests {missing}: their packages could not be installed; run as root"
        assert done.returncode == 1 and told in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "made").exists()
    else:
        made = (tmp_path / "made").read_text().split()
        assert done.returncode == 0 and made[0] == "test" and set(made) == STAGES and len(made) == len(STAGES)


@pytest.mark.parametrize("failing", ["test-slurm", "lint", "test-slurm test-fuzz", "test"])
def test_ci_runs_the_stages_beside_slurm_and_names_those_that_fail(tmp_path, failing):
    """The output of test-slurm comes whole, behind the others'; where the tests fail, nothing else runs."""
    make = f'echo "$1 a"; echo "$1 b"; [[ " {failing} " != *" $1 "* ]]'
    done = ci(tmp_path, (*SLURM, "chromium"), make)
    ran = ["test"] if failing == "test" else ["test", "test-long", "test-fuzz", "test-browser", "lint", "test-slurm"]
    assert done.stdout.splitlines() == [f"{stage} {part}" for stage in ran for part in "ab"]
    assert done.returncode == 1
    if failing != "test":
        named = done.stderr.strip().removeprefix(".ci/run: error: failed: ").split()
        assert set(named) == set(failing.split())
    assert not list(tmp_path.glob("tmp.*")), "the file of its output is removed"


def test_a_missing_settings_file():
    done = shell("bash", "slurm/train_b.sh", MEGASTAR_ENV="/nothing.sh", MEGASTAR_DRY_RUN="1")
    assert done.returncode == 2 and "megastar: error: /nothing.sh cannot be read" in done.stderr
