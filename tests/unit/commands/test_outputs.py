"""Every output path of every command is checked before the work, in the same words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megastar import cli
from megastar.commands import data
from megastar.commands.elastic import write_status
from megastar.engine.metrics.trackers import packages
from tests.disks import with_disks

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = "assets/tokenizer/emoji64-vq.safetensors"
ELASTIC = ("elastic", "--nodes", "1:1", "--hosts", "127.0.0.1", "--index", "0")
# option of the sentence -> words before the path; inputs are missing, so that what comes first is the output.
FILES = {
    "sample --out": ("sample", "no.safetensors", "--out"),
    "sample --npz": ("sample", "no.safetensors", "--npz"),
    "sample --score": ("sample", "no.safetensors", "--real", "nowhere", "--score"),
    "evaluate --out": ("evaluate", "nowhere", "--real", "nowhere", "--out"),
    "probe --out": ("probe", "no.safetensors", "--val-shards", "nowhere", "--out"),
    "probe --figure": ("probe", "no.safetensors", "--val-shards", "nowhere", "--figure"),
    "report --out": ("report", "nowhere", "--out"),
    "convert --out": ("convert", "nowhere", "--to", "safetensors", "--out"),
    "data --sheet": ("data", "stats", "nowhere", "--tokenizer", "no", "--sheet"),
    "check-gpu --out": ("check-gpu", "--device", "cpu", "--out"),
    "elastic --status-file": (*ELASTIC, "nowhere.yaml", "--status-file"),
}
FOLDERS = {
    "sample --folder": ("sample", "no.safetensors", "--folder"),
    "pretokenize --out": ("pretokenize", "nowhere", "--tokenizer", "no", "--out"),
    "probe --cache": ("probe", "no.safetensors", "--val-shards", "nowhere", "--cache"),
    "convert --out": ("convert", "nowhere", "--to", "universal", "--out"),
    "data --cache": ("data", "inspect", "s3://nowhere/x", "--cache"),
    "train run =": ("train", "configs/run/demo.yaml", "data.shards=nowhere", "run="),
    "train-tokenizer out =": ("train-tokenizer", "configs/tokenizer/emoji64.yaml", "pictures=nowhere", "out="),
    "compare out =": ("compare", "configs/run/compare_emoji.yaml", "pictures=nowhere", "out="),
    "demo run =": ("demo", "run="),
    "demo data.shards =": ("demo", "run=/tmp/megastar-none/run", "data.shards="),
    "elastic run =": (*ELASTIC, "configs/run/demo.yaml", "run="),
}
NO_OUTPUT = {"status", "plan", "doctor", "profile", "push"}


def command(words: tuple[str, ...], path: str) -> list[str]:
    *start, last = words
    return [*start, last + path] if last.endswith("=") else [*start, last, path]


def sentence(capsys, words: tuple[str, ...], path: Path) -> str:
    assert cli.main(command(words, str(path))) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and out.err.startswith("megastar: error: ")
    return out.err


def test_every_command_is_in_the_table():
    tested = {words[0] for words in (*FILES.values(), *FOLDERS.values())}
    assert tested | NO_OUTPUT == set(cli.COMMANDS)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "place")
    return tmp_path


@pytest.mark.parametrize("option", FILES)
def test_files_are_checked_first(folder, capsys, option):
    words, name = FILES[option], option.partition(" ")[2]
    png = ".png" if name == "--figure" else ""
    if not png:
        assert f"{name} {folder} is a folder: name the file to write" in sentence(capsys, words, folder)
    told = sentence(capsys, words, folder / "file" / f"x{png}")
    assert f"{name} {folder}/file/x{png}: {folder}/file is not a folder: name another place" in told
    told = sentence(capsys, words, folder / "link" / f"x{png}")
    assert f"{folder}/link is a symbolic link to {folder}/gone/place, which does not exist: name another place" in told
    told = sentence(capsys, words, folder / f"{'x' * 250}{png}")
    assert f"{name} {folder}/xxx" in told and "cannot be written (File name too long): give another name" in told
    told = sentence(capsys, words, folder / ("y" * 300) / f"x{png}")
    assert "cannot be written (File name too long): give another name" in told
    told = sentence(capsys, words, Path(f"/proc/self/x{png}"))
    assert f"{name} /proc/self/x{png} cannot be written (" in told
    assert sorted(p.name for p in folder.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("option", FOLDERS)
def test_folders_are_checked_first(folder, capsys, option):
    words, name = FOLDERS[option], option.partition(" ")[2]
    assert f"{name} {folder}/file is not a folder: name another place" in sentence(capsys, words, folder / "file")
    told = sentence(capsys, words, folder / "file" / "x" / "y")
    assert f"{name} {folder}/file/x/y: {folder}/file is not a folder: name another place" in told
    told = sentence(capsys, words, folder / "link")
    assert f"{folder}/link is a symbolic link to {folder}/gone/place, which does not exist: name another place" in told
    told = sentence(capsys, words, folder / ("y" * 300) / "x")
    assert f"{name} {folder}/yyy" in told and "cannot be written (File name too long): give another name" in told
    assert f"{name} /proc/self/x cannot be written (" in sentence(capsys, words, Path("/proc/self/x"))
    assert sorted(p.name for p in folder.iterdir()) == ["file", "link"]


def test_full_read_only_and_forbidden_disks(tmp_path):
    """ENOSPC, EROFS and EACCES, on real disks, for every command; in one process, which only the table is given."""
    disk = tmp_path / "disk"
    code = f"""
import contextlib, io, os, sys
from pathlib import Path
from megastar import cli
from tests.disks import fill, remount
from tests.unit.commands.test_outputs import FILES, FOLDERS, command

disk = Path({str(disk)!r})
def check(reason):
    for name, words in (FILES | FOLDERS).items():
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()) as out:
            status = cli.main(command(words, str(disk / "new" / "x.png")))
        told = err.getvalue()
        wanted = f"{{name.partition(' ')[2]}} {{disk}}/new/x.png cannot be written ({{reason}}"
        assert status == 2 and out.getvalue() == "" and told.count("\\n") == 1 and wanted in told, (name, status, told)
fill(disk)
check("No space left on device): free space or name another place")
remount(disk, "ro")
check("Read-only file system): change its permissions or name another place")
assert not (disk / "new").exists()
"""
    with_disks({disk: "1m"}, "-c", code, timeout=300)


def test_a_folder_without_write_permission(tmp_path):
    """As another user, because root may write anywhere."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    words = ["unshare", "--user", sys.executable, "-m", "megastar", *command(FILES["report --out"], str(closed / "x"))]
    if os.geteuid():
        words = words[2:]
    else:
        os.chown(closed, 12345, 12345)
        os.chmod(closed, 0o555)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    wanted = f"--out {closed}/x cannot be written (Permission denied): change its permissions or name another place\n"
    assert done.returncode == 2 and done.stdout == "" and done.stderr == f"megastar: error: {wanted}"


def test_missing_parents_are_made(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "a" / "b" / "page.html"
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert cli.main(["report", str(run), "--no-samples", "--no-attention", "--out", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")


def test_a_working_directory_that_was_removed(tmp_path):
    code = f"import os, sys; from megastar import cli; os.rmdir({str(tmp_path / 'gone')!r}); sys.exit(cli.main(sys.argv[1:]))"
    (tmp_path / "gone").mkdir()
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    for words in (["plan", "b"], ["status", "x"], ["sample"]):
        (tmp_path / "gone").mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path / "gone", env=environ, capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr == "megastar: error: the working directory was removed: change to another one\n"


def test_the_two_files_of_one_name_and_an_input(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    same = tmp_path / "x.png"
    words = ("probe", "no.safetensors", "--val-shards", "x", "--out", str(same), "--figure")
    assert f"--out and --figure both name {same}: give two files" in sentence(capsys, words, same)
    assert "--out . would overwrite the input .: name another file" in sentence(capsys, ("pretokenize", ".", "--tokenizer", "x", "--out"), Path("."))  # fmt: skip
    (tmp_path / "run.yaml").write_text("run: x\n")
    words = (*ELASTIC, str(tmp_path / "run.yaml"), "--status-file")
    assert "would overwrite the input" in sentence(capsys, words, tmp_path / "run.yaml")


def unchanged(capsys, words: tuple[str, ...], path: Path) -> None:
    """The command refuses ``path``, which is one of its inputs, and leaves it as it is."""
    before = path.read_bytes()
    assert f"{path} would overwrite the input {path}: name another file" in sentence(capsys, words, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "events.jsonl"])
def test_the_files_of_a_run_are_not_replaced(tmp_path, capsys, name):
    run = tmp_path / "out" / "runs" / "a"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / name).touch()
    unchanged(capsys, ("report", str(run), "--out"), run / name)
    unchanged(capsys, ("report", str(tmp_path / "out"), "--out"), run / name)  # of a comparison
    unchanged(capsys, ("sample", str(run), "--out"), run / name)
    unchanged(capsys, ("probe", str(run), "--val-shards", "x", "--out"), run / name)


def test_a_report_does_not_replace_its_baseline_or_a_comparisons_results(tmp_path, capsys):
    run, baseline = tmp_path / "out" / "runs" / "a", tmp_path / "mine.yaml"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    baseline.write_text("run: x\n")
    (tmp_path / "out" / "results.json").write_text("{}")
    (tmp_path / "out" / "compare.yaml").write_text("{}")
    unchanged(capsys, ("report", str(run), "--baseline", str(baseline), "--out"), baseline)
    unchanged(capsys, ("report", str(tmp_path / "out"), "--out"), tmp_path / "out" / "results.json")
    words = ["report", str(run), "--no-samples", "--no-attention"]
    assert cli.main(words) == cli.main(words) == 0  # an earlier page is replaced


def test_scores_do_not_replace_what_they_are_made_from(tmp_path, capsys):
    record, file, codes = tmp_path / "x.npz.json", tmp_path / "file", tmp_path / "codes"
    record.write_text("{}")
    file.touch()
    codes.mkdir()
    (codes / "manifest.json").write_text("{}")
    scored = ("evaluate", str(tmp_path / "x.npz"), "--real", str(codes))
    unchanged(capsys, (*scored, "--out"), record)
    unchanged(capsys, (*scored, "--out"), codes / "manifest.json")
    unchanged(capsys, (*scored, "--real-tokenizer", str(file), "--out"), file)
    for option in ("--inception", "--dinov2", "--real-tokenizer"):
        unchanged(capsys, ("sample", "no.safetensors", "--real", str(codes), option, str(file), "--score"), file)
    unchanged(
        capsys, ("sample", "no.safetensors", "--like", str(codes), "--count", "4", "--npz"), codes / "manifest.json"
    )


LATE = {  # what is written last -> words before it, whose folder is given, and what is in its way: a folder or a file
    "the record of --npz": (("sample", "no.safetensors", "--npz"), "x.npz", "x.npz.json", True),
    "the parts of --npz": (("sample", "no.safetensors", "--npz"), "x.npz", "x.npz.parts", False),
    "the checkpoints of run =": (("train", "configs/run/demo.yaml", "run="), "", "checkpoints", False),
    "elastic: the checkpoints of run =": ((*ELASTIC, "configs/run/demo.yaml", "run="), "", "checkpoints", False),
    "demo: the checkpoints of run =": (("demo", "run="), "run", "run/checkpoints", False),
    "the demo's scores": (("demo", "run="), "run", "scores.json", True),
    "the demo's grid": (("demo", "run="), "run", "grid.png", True),
    "the demo's samples": (("demo", "run="), "run", "samples", False),
    "the table.md of out =": (("compare", "configs/run/compare_emoji.yaml", "out="), "", "table.md", True),
    "the folder logs of out =": (("compare", "configs/run/compare_emoji.yaml", "out="), "", "logs", False),
    "the probe.png of --redraw": (("compare", "--redraw"), "", "probe.png", True),
    "the last.pt of out =": (("train-tokenizer", "configs/tokenizer/emoji64.yaml", "out="), "", "last.pt", True),
    "the scores.json of out =": (
        ("train-tokenizer", "configs/tokenizer/emoji64.yaml", "out="),
        "",
        "scores.json",
        True,
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_what_is_written_last_is_checked_first(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(ROOT)
    words, place, blocked, folder = LATE[case]
    path = tmp_path / blocked
    path.mkdir(parents=True) if folder else (path.parent.mkdir(exist_ok=True), path.touch())
    what = f"{case.rpartition(': ')[2]} {path} is " + (
        "a folder: name" if folder else "not a folder: name another place"
    )
    assert what in sentence(capsys, words, tmp_path / place)
    assert path.is_dir() is folder


def test_a_figure_needs_matplotlib_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    probe = ("probe", "no.safetensors", "--val-shards", "nowhere", "--figure")
    assert "a figure needs matplotlib" in sentence(capsys, probe, tmp_path / "x.png")
    compare = ("compare", "configs/run/compare_emoji.yaml", "pictures=nowhere", "out=")
    assert "a figure needs matplotlib" in sentence(capsys, compare, tmp_path)


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_a_comparison_checks_what_would_end_each_of_its_runs(tmp_path, capsys, monkeypatch, how):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(packages, "MODULES", {"wandb": ("no_module_of_this_name",)})
    compare = ("compare", "configs/run/compare_emoji.yaml", *how, "seeds=[0]")
    told = sentence(capsys, (*compare, "base.train.trackers=[wandb]", "out="), tmp_path)
    assert "-seed0: train.trackers names wandb, whose package no_module_of_this_name is not installed" in told
    ranks = ("base.train.profile.steps=1", "base.train.profile.ranks=[3]")
    told = sentence(capsys, (*compare, *ranks, "nproc=2", "out="), tmp_path)
    assert "train.profile.ranks = [3]: rank 3 does not exist, this run has the ranks 0 to 1" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, False),
        ({"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "n2"}, True),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "n2"}, False),
    ],
)
def test_ranks_of_srun_report_once_for_each_node(tmp_path, capsys, monkeypatch, environ, shown):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", **environ}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["sample", "--npz", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert bool(told) is shown and ("(on n2)" in told) is (shown and "SLURMD_NODENAME" in environ)


def test_the_status_is_written_or_reported(tmp_path, capsys):
    write_status(tmp_path / "new" / "status", 86)
    assert (tmp_path / "new" / "status").read_text() == "86\n"
    (tmp_path / "file").touch()
    write_status(tmp_path / "file" / "status", 86)  # the folder was replaced while the run went on
    said = capsys.readouterr().err
    assert "cannot be written" in said and "the exit status is 86" in said


def test_folders_that_are_written_in_place_are_checked(tmp_path, capsys):
    folder = Path("/proc/self")  # nobody can write there
    assert cli.main(["compare", "--redraw", str(folder)]) == 2
    assert f"--redraw {folder} cannot be written" in capsys.readouterr().err
    assert cli.main(["data", "index", str(folder), "--codebook-size", "8"]) == 2
    assert f"SET {folder} cannot be written" in capsys.readouterr().err
    assert set(data.ACTIONS) == {"inspect", "verify", "stats", "index"}
