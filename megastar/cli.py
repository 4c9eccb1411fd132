# PYTHON_ARGCOMPLETE_OK
"""``megastar COMMAND``. Each command is a module of megastar/commands, imported only when it runs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megastar.commands._shared import completion
from megastar.commands._shared.common import place_of, report_error
from megastar.errors import MissingRanks, UserError, as_user_error, nearest
from megastar.utils.hostname import shorten_dns_timeout
from megastar.utils.parent import end_with_launcher
from megastar.utils.printable import say, tolerate_any_text
from megastar.utils.process_exit import run_and_leave
from megastar.utils.signals import StopSignal, raise_stopped
from megastar.version import __version__

COMMANDS = {  # name -> (module of megastar.commands, description)
    "demo": ("demo", "run the whole pipeline on the included emoji, from images to scores"),
    "train-tokenizer": ("train_tokenizer", "train a VQ tokenizer on images"),
    "pretokenize": ("pretokenize", "encode images into token shards"),
    "data": ("data", "inspect, verify, count and index token shards"),
    "train": ("train", "train a model: ST-AR, REPA, both, or the AR baseline"),
    "elastic": ("elastic", "train on several nodes, and continue on the others if one is lost"),
    "convert": ("convert", "inspect a checkpoint, or convert it to weights or another format"),
    "sample": ("sample", "generate images from a run or a weights file"),
    "evaluate": ("evaluate", "score images against real images: FID, sFID, IS, precision/recall, KID, FD-EffLite0"),
    "probe": ("probe", "train a linear probe on a model's features"),
    "compare": ("compare", "train variants with several seeds; probe, sample and score each in the same way"),
    "plan": ("plan", "estimate memory, communication and time of a run on a machine"),
    "check-gpu": ("check_gpu", "check and time the attention kernels on this GPU"),
    "doctor": ("doctor", "diagnose this node, or all nodes of a job, and suggest fixes"),
    "report": ("report", "write an HTML report: curves, samples by step, attention, configuration"),
    "profile": ("profile", "print what train.profile recorded: phases, kernels, operators, host synchronizations"),
    "push": ("push", "publish a folder of convert --to hf on the Hugging Face Hub"),
    "status": ("status", "show the state of runs: step, loss, speed, checkpoint, restarts, health, time left"),
}
RESUMED = ("demo", "train-tokenizer", "pretokenize", "train", "sample", "compare")  # by the same command
EXAMPLES = """examples:
  megastar demo
  megastar train configs/run/demo.yaml --nproc 2
  megastar sample --classes food-drink --out food.png
  megastar train --help        every field with its default and meaning

See megastar COMMAND --help for the options of a command; all accept --verbose and --quiet."""


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{what}" for name, (_, what) in COMMANDS.items())
    return f"usage: megastar COMMAND ...\n\n{lines}\n\n{EXAMPLES}"


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``main`` and end the process."""
    if completion.VARIABLE in os.environ:
        completion.complete(COMMANDS)
    shorten_dns_timeout()
    tolerate_any_text()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        end_with_launcher()
    run_and_leave(lambda: main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 after a user error, which is reported in one sentence, or 128 plus
    the number of a stop signal."""
    words = list(sys.argv[1:] if argv is None else argv)
    with raise_stopped():
        return run_reporting(words)


def run_reporting(words: list[str]) -> int:
    """``run``, with errors and stop signals reported in one sentence."""
    try:
        return run(words)
    except UserError as error:
        # Rank 0 also reports what failed on another rank, which is silent there (report_error).
        if not error.reported or "TORCHELASTIC_ERROR_FILE" in os.environ or _is_main():
            report_error(str(error), os.environ)
        return 2
    except MissingRanks as error:
        from megastar.engine.exit_codes import RANK_FAILURE  # its package imports torch

        if str(error):
            report_error(str(error), os.environ)
        return RANK_FAILURE
    except BrokenPipeError:  # the reader closed the pipe: `megastar train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if (user_error := as_user_error(error)) is None:
            raise
        report_error(str(user_error), os.environ)
        return 2
    except KeyboardInterrupt as stop:
        stopped = stop if isinstance(stop, StopSignal) else StopSignal(signal.SIGINT)
        if place_of(os.environ)[0] == 0:
            kept = (
                "completed work is kept, the same command resumes"
                if words[0] in RESUMED
                else "incomplete files are removed"
            )
            say(f"megastar: stopped by {stopped}: {kept}", sys.stderr)
        return 128 + stopped.signal


def _is_main() -> bool:
    try:
        return place_of(os.environ)[0] == 0
    except UserError:  # the launcher's variables are what is wrong
        return True


def run(words: list[str]) -> int:
    # The deepspeed launcher adds --local_rank.
    words = [w for w in words if not w.startswith(("--local_rank=", "--local-rank="))]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"megastar {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: {nearest(name, COMMANDS)}")
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working directory was removed: change to another one") from error
    module = importlib.import_module(f"megastar.commands.{COMMANDS[name][0]}")
    return module.main(words[1:]) or 0
