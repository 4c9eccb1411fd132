"""The command line: one sentence for a mistake, help for every command, launchers recognised."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megastar import cli
from megastar.commands import elastic, sample
from megastar.commands._shared import common
from megastar.commands._shared import launch as launching
from megastar.commands.demo import ends_of
from megastar.config.load import load_compare_config, load_config, load_tokenizer_config
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.version import __version__
from tests.unit.engine.tokenizer.test_batches import folder_of_pictures

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def trained(monkeypatch):
    """A stand-in for the engine, which would import DeepSpeed: remembers what it was asked to train."""
    calls: list[tuple[RunConfig, bool]] = []
    module = types.ModuleType("megastar.engine.trainer")
    module.train = lambda cfg, dry_run=False, stop=None: calls.append((cfg, dry_run))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megastar.engine.trainer", module)
    monkeypatch.setattr("megastar.commands.train.StopFlag", object)  # the handlers of these tests stay as they are
    return calls


def error(capsys, *words: str) -> str:
    assert cli.main(words) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("megastar: error: ")
    return out.err.removeprefix("megastar: error: ").rstrip("\n")


# Help and mistakes -------------------------------------------------------------------------------------------------
def test_overview(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert all(name in text for name in cli.COMMANDS) and "examples:" in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megastar {__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith(f"usage: megastar {command}") and f"examples:\n  megastar {command}" in text


def test_train_help_shows_the_fields(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for words in (
        "self_guided.teacher_decay",
        "0.9999",
        "EMA decay of the teacher [P]",
        "parallel: the split over GPUs",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["xyzzy"], "unknown command 'xyzzy': choose one of demo, train-tokenizer, pretokenize"),
        (
            ["train", "a.yaml", "b.yaml"],
            "two configurations, a.yaml and b.yaml: give one; write fields as section.field=value",
        ),
        (["train", "a.yaml"], "configuration a.yaml does not exist: check the path"),
        (["train"], "command line: data.shards is empty"),
        (
            ["train", "--nproc", "0"],
            "argument --nproc: '0' is not an integer from 1 to 1024; see megastar train --help",
        ),
        (["train", "--dry"], "unrecognized arguments: --dry; see megastar train --help"),
        (
            ["train", "configs/run/demo.yaml", "--nproc", "3"],
            "world size 3 does not divide train.global_batch 64: start 1, 2,",
        ),
        (["convert", "run"], "--to is missing: give --to FORMAT and --out, or --inspect; see megastar convert --help"),
        (["convert", "run", "--to", "llamagen"], "--out is missing: give --to FORMAT and --out, or --inspect"),
        (["convert", "run", "--inspect", "--out", "x"], "--inspect writes nothing: give either --inspect, or --to and"),
        (["convert", "run", "--to", "universal", "--out", "x", "--verify"], "--verify requires --inspect"),
        (
            ["convert", "run", "--to", "universal", "--out", "x", "--dtype", "bf16"],
            "--dtype applies to --to safetensors or llamagen or hf: leave it out with --to universal",
        ),
        (["convert", "run", "--to", "checkpoint", "--out", "x"], "--to checkpoint needs --data, the number of data"),
        (
            ["convert", "run", "--to", "checkpoint", "--out", "x", "--data", "0"],
            "'0' is not an integer from 1 to 100000",
        ),
        (["convert", "nowhere", "--inspect"], "no complete checkpoint in nowhere: name a run folder or a folder"),
        (["sample", "--like", "codes"], "--like sets the class frequencies of --count images: give --count too"),
        (["sample", "--plan", "random"], "--plan random draws the classes of --count images: give --count, and no"),
        (["sample", "--nproc", "2"], "several processes need a shared output: give --npz, --folder or"),
        (["sample", "no.safetensors"], "weights no.safetensors do not exist"),
        (["evaluate", "--real", "x"], "give either images to score or --tokenizer; see megastar evaluate --help"),
        (["evaluate", "a", "--tokenizer", "t", "--real", "x"], "give either images to score or --tokenizer"),
        (
            ["demo", "other.yaml"],
            "megastar demo trains configs/run/demo.yaml: use megastar train other.yaml",
        ),
        (
            ["pretokenize", "nowhere", "--tokenizer", "no.safetensors", "--out", "x"],
            "tokenizer no.safetensors does not exist",
        ),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert sentence in error(capsys, *words)


def test_demo_outside_a_clone(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megastar.commands.demo.REPOSITORY", tmp_path)
    assert "the demo needs a clone of the repository: assets/emoji64/emoji64.tar is neither in" in error(capsys, "demo")


@pytest.mark.parametrize(
    ("words", "load"),
    [
        (
            ["train", "configs/run/demo.yaml", "--nproc", "2", "optim.lr=0.5", "method=configs/method/ar.yaml"],
            load_config,
        ),
        (["compare", "configs/run/compare_emoji.yaml", "base.optim.lr=0.5", "seeds=[3]"], load_compare_config),
        (["train-tokenizer", "configs/tokenizer/emoji64.yaml", "lr=0.5"], load_tokenizer_config),
    ],
)
def test_print_config_prints_what_loads_again_as_the_same_configuration(words, load, tmp_path):
    script = "import sys\nsys.modules['torch'] = None\nfrom megastar import cli\nsys.exit(cli.main(sys.argv[1:]))\n"
    run = subprocess.run(
        [sys.executable, "-c", script, *words, "--print-config"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    (tmp_path / "whole.yaml").write_text(run.stdout)
    assert load(tmp_path / "whole.yaml") == load(words[1], [w for w in words if "=" in w])


# Log level ---------------------------------------------------------------------------------------------------------
def test_verbose_and_quiet_set_the_log_level(trained, monkeypatch, capsys):
    trainer = sys.modules["megastar.engine.trainer"]
    monkeypatch.setattr(trainer, "train", lambda *_, **__: [log(level, "text") for level in (10, 20, 30)])
    log = logging.getLogger("megastar.engine.trainer").log
    for options, levels in [([], "INFO WARNING"), (["-v"], "DEBUG INFO WARNING"), (["--quiet"], "WARNING")]:
        assert cli.main(["train", *options, "configs/run/demo.yaml"]) == 0
        assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == levels.split()
    assert "argument -q/--quiet: not allowed with argument -v/--verbose" in error(capsys, "status", "run", "-vq")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "-q", "configs/run/demo.yaml"]) == 0
    assert capsys.readouterr().out.endswith(" WARNING rank 1 text\n")
    monkeypatch.setenv("MEGASTAR_LOG_LEVEL", "loud")
    assert "MEGASTAR_LOG_LEVEL=LOUD: unknown log level" in error(capsys, "train", "configs/run/demo.yaml")


def test_json_is_not_mixed_with_log_lines(capsys):
    parser = common.Parser("x", "", "")
    parser.add_argument("--json", action="store_true")
    assert parser.parse(["--json"]).json
    logging.getLogger("megastar").warning("text")
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(" WARNING text\n")


# Launchers ---------------------------------------------------------------------------------------------------------
def test_train_gets_the_checked_configuration(trained):
    words = ["train", "--dry-run", "configs/run/demo.yaml", "train.steps=7", "--nproc", "1", "optim.lr=0.5"]
    assert cli.main(words) == 0
    ((cfg, dry_run),) = trained
    assert dry_run and (cfg.train.steps, cfg.optim.lr, cfg.model.name) == (7, 0.5, "nano")


def test_local_rank_of_the_deepspeed_launcher_is_accepted(trained):
    assert cli.main(["--local_rank=1", "train", "configs/run/demo.yaml"]) == 0
    assert cli.main(["train", "--local_rank=1", "configs/run/demo.yaml"]) == 0
    assert len(trained) == 2


def test_nproc_starts_processes_unless_a_launcher_did(trained, monkeypatch):
    started = []
    monkeypatch.setattr(launching, "launch", lambda n, words: started.append((n, words)) or 7)
    words = ["train", "configs/run/demo.yaml", "train.steps=3", "--nproc", "2", "--dry-run"]
    assert cli.main(words) == 7
    assert started == [(2, words)] and not trained
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words) == 0
    assert len(started) == 1 and len(trained) == 1


@pytest.mark.parametrize(
    ("environ", "launched", "main"),
    [
        ({}, False, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, True, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False, True),  # a batch script, before srun
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, True, False),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False, True),
    ],
)
def test_launchers_are_recognised(environ, launched, main):
    assert common.is_launched(environ) is launched
    assert (common.place_of(environ)[0] == 0) is main


def test_a_mistake_is_told_once(monkeypatch, tmp_path, capsys):
    file = tmp_path / "error.json"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    for rank, ours, printed in [("0", False, True), ("1", False, False), ("0", True, False), ("1", True, False)]:
        file.unlink(missing_ok=True)
        monkeypatch.setenv("RANK", rank)
        if ours:
            monkeypatch.setenv(common.LAUNCHED_BY_US, "1")
        assert cli.main(["trian"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == (
            "megastar: error: unknown command 'trian': did you mean train?\n" if printed else ""
        )
        assert file.exists() is not printed
    assert json.loads(file.read_text())["message"] == "unknown command 'trian': did you mean train?"


@pytest.mark.dist
def test_two_processes_say_a_mistake_once():
    code = (
        "import sys, megastar.cli\n"
        "from megastar.commands import train\n"
        "from megastar.commands._shared import launch as _launch\n"
        "_launch.FAILURE_GRACE = 60\n"  # however far apart the ranks end
        "train.main = lambda words: _launch.launch(2, ['probe', 'weights'])\n"
        "sys.exit(megastar.cli.main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    wanted = "megastar: error: the following arguments are required: --val-shards; see megastar probe --help\n"
    assert done.stderr == wanted and done.stdout == ""


# Small parts of commands -------------------------------------------------------------------------------------------
def test_classes_by_name_and_number():
    names = ["activities", "food", "travel"]
    assert sample.choose_labels(names, "travel, 0", 2, None, None, 0) == [2, 2, 0, 0]
    assert sample.choose_labels(names, None, 1, None, None, 0) == [0, 1, 2]
    assert sample.choose_labels(names, None, 1, 7, None, 0) == [0, 1, 2, 0, 1, 2, 0]
    assert sample.choose_labels([str(i) for i in range(1000)], None, 1, None, None, 0) == list(range(16))
    with pytest.raises(UserError, match="class 'fod' is unknown: did you mean food?"):
        sample.choose_labels(names, "fod", 1, None, None, 0)
    with pytest.raises(UserError, match=r"class 3 is outside 0..2, the classes of these weights"):
        sample.choose_labels(names, "3", 1, None, None, 0)
    for digit in "²", "١":  # no numbers in ASCII
        with pytest.raises(UserError, match=f"class '{digit}' is unknown"):
            sample.choose_labels(names, digit, 1, None, None, 0)
    with pytest.raises(UserError, match="class 9{80}... is outside 0..2"):
        sample.choose_labels(names, "9" * 5000, 1, None, None, 0)


@pytest.mark.parametrize("text", ["²:3", "١:٢", "3:2", "0:1", "1:" + "9" * 5000, "1"])
def test_numbers_of_nodes_are_ascii(text):
    assert elastic.nodes("2:3") == (2, 3)
    with pytest.raises(argparse.ArgumentTypeError, match="is not MIN:MAX"):
        elastic.nodes(text)


def test_count_follows_the_frequencies_of_like():
    like = [0] * 90 + [1] * 10
    drawn = sample.choose_labels(["a", "b"], None, 1, 100, like, 0)
    assert sorted(drawn) == like  # a whole pass takes each real label once
    assert drawn == sample.choose_labels(["a", "b"], None, 1, 100, like, 0) != like
    assert set(sample.choose_labels(["a", "b"], "b", 1, 30, like, 0)) == {1}
    with pytest.raises(UserError, match="--like holds no image of the classes c"):
        sample.choose_labels(["a", "b", "c"], "c", 1, 5, like, 0)


def test_ends_of_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert ends_of(path) == ({}, {})
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "val_loss_ar": 2}\n{"step": 5, "loss": 2}\n')
    assert [r["step"] for r in ends_of(path)] == [1, 5]


# The tokenizer's training ------------------------------------------------------------------------------------------
def test_train_tokenizer_with_too_few_pictures(tmp_path, capsys):
    words = [f"pictures={folder_of_pictures(tmp_path)}", f"out={tmp_path / 'run'}", "batch=64"]
    assert "holds 6 images, fewer than batch 64: lower batch" in error(capsys, "train-tokenizer", *words)
    wanted = (
        "batch = 64 images of a step do not divide among 3 ranks: start 2 or 4 ranks, or set batch to a multiple of 3"
    )
    assert wanted in error(capsys, "train-tokenizer", *words, "--nproc", "3")  # before processes are started
