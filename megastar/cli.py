"""``megastar <command>``. Each command is a module of megastar/commands, imported only when it runs."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from megastar.commands._common import tell
from megastar.errors import UserError, nearest
from megastar.utils.hostname import shorten_dns_timeout
from megastar.utils.process_exit import run_and_leave
from megastar.version import __version__

COMMANDS = {  # name -> (module of megastar.commands, what it does)
    "demo": ("demo", "pictures to scores on the embedded emoji, in one command"),
    "train-tokenizer": ("train_tokenizer", "train the VQ tokenizer on pictures"),
    "pretokenize": ("pretokenize", "turn pictures into token shards"),
    "data": ("data", "look into token shards: inspect, verify, stats, index"),
    "train": ("train", "train a model: ST-AR or the AR baseline"),
    "convert": ("convert", "look into a checkpoint, or turn it into weights or another format"),
    "sample": ("sample", "draw pictures from a run or a weights file"),
    "evaluate": ("evaluate", "score pictures against real ones: FID and its kin, FD-EffLite0"),
    "probe": ("probe", "linear probe of a model's features"),
    "compare": ("compare", "train variants with several seeds; probe, sample and score them alike"),
    "plan": ("plan", "memory, communication and time of a run on a machine"),
    "check-gpu": ("check_gpu", "are the kernels right and fast on this GPU; what auto picks"),
    "doctor": ("doctor", "what is wrong with this node, or with all nodes, and the remedy"),
    "report": ("report", "one HTML page of runs: curves, samples by step, attention, configuration"),
    "status": ("status", "where runs are: step, loss, speed, checkpoint, restarts, health, time left"),
}
EXAMPLES = """examples:
  megastar demo
  megastar train configs/run/demo.yaml --nproc 2
  megastar sample --classes food-drink --out food.png
  megastar train --help        every field with its default and meaning"""


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: megastar COMMAND ...", "", *lines, "", EXAMPLES, "", "megastar COMMAND --help tells more."]
    )


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """``main`` as a program."""
    shorten_dns_timeout()
    run_and_leave(lambda: main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 after a mistake the user can mend, told in one sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(words)
    except UserError as error:
        tell(str(error), os.environ)
        return 2
    except BrokenPipeError:  # the reader of a pipe is gone, `megastar train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EISDIR):
            raise
        where = f" {error.filename}" if error.filename else ""
        print(
            f"megastar: error: cannot write{where} ({error.strerror}): free space or name another place",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def run(words: list[str]) -> int:
    words = [w for w in words if not w.startswith(("--local_rank=", "--local-rank="))]  # the deepspeed launcher's
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"megastar {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: {nearest(name, COMMANDS)}")
    module = importlib.import_module(f"megastar.commands.{COMMANDS[name][0]}")
    return module.main(words[1:]) or 0


if __name__ == "__main__":
    program()
