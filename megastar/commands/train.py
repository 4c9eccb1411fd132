"""``megastar train``: train a model on token shards."""

from __future__ import annotations

import os
import sys
from typing import TextIO, cast

from megastar.commands._shared.common import (
    FaultTolerantStream,
    Parser,
    config_and_overrides,
    is_launched,
    print_run_folder,
    processes,
    terminal_width,
)
from megastar.commands._shared.outputs import check_outputs, run_folders
from megastar.utils.printable import one_line, say
from megastar.utils.process_exit import die_with_agent
from megastar.utils.signals import StopFlag

EXAMPLES = """
megastar train configs/run/demo.yaml --nproc 2                    two local processes
megastar train configs/run/demo.yaml train.steps=50 optim.lr=5e-4 override fields
megastar train configs/run/star_b_50ep.yaml model=configs/model/l.yaml run=runs/try --dry-run
megastar train configs/run/star_b_50ep.yaml method=configs/method/ar.yaml --print-config
torchrun --nproc-per-node 8 -m megastar train configs/run/star_b_50ep.yaml
deepspeed --num_gpus 8 --module megastar train configs/run/star_b_50ep.yaml
sbatch slurm/train_b.sh configs/run/star_b_50ep.yaml
Repeating a command resumes from the newest checkpoint in the run folder.
"""


def parser() -> Parser:
    from megastar.config.help import fields_text
    from megastar.config.schema import RunConfig

    p = Parser(
        "train",
        "Train a model on token shards, or resume an interrupted run.",
        EXAMPLES,
        fields_text(RunConfig, terminal_width()),
    )
    p.add_argument("items", nargs="*", metavar="CONFIG | section.field=value", help="a YAML file, fields to override")
    p.add_argument("--nproc", type=processes, default=1, help="local processes (default 1); ignored under a launcher")
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, run three steps on random codes, print memory and batch",
    )
    p.add_argument("--print-config", action="store_true", help="print every field as YAML and exit")
    p.add_argument("--print-run-folder", action="store_true", help="print the run folder's absolute path and exit")
    return p


def main(words: list[str]) -> int:
    # Ranks handle signals before the imports below, which take seconds: a signal must not kill one rank only.
    die_with_agent()
    stop = StopFlag() if is_launched(os.environ) or "SLURM_STEP_ID" in os.environ else None
    from megastar.config.load import config_yaml, load_config, resolve_batch

    args = parser().parse(words)
    path, overrides = config_and_overrides(args.items)
    cfg = load_config(path, overrides)
    if args.print_config:
        from megastar.data.shards.local_sizes import take_local_sizes

        if sizes := take_local_sizes(cfg):
            say(f"# {one_line(sizes)}")
        say(config_yaml(cfg).rstrip("\n"))
        return 0
    if args.print_run_folder:  # the batch scripts of slurm/ ask for it
        print_run_folder(cfg.run, "run")
        return 0
    if not args.dry_run and not is_launched(os.environ):  # launched ranks let rank 0 check: engine/run_folder.py
        check_outputs({}, folders=run_folders(cfg))
    if args.nproc > 1 and not is_launched(os.environ):
        from megastar.commands._shared.launch import launch

        resolve_batch(cfg.train, cfg.parallel.tensor_parallel, args.nproc)  # raises before processes are started
        return launch(args.nproc, ["train", *words])
    from megastar.engine.trainer import train

    if not isinstance(sys.stdout, FaultTolerantStream):  # the log may be on a full disk
        sys.stdout = cast("TextIO", FaultTolerantStream(sys.stdout))
        sys.stderr = cast("TextIO", FaultTolerantStream(sys.stderr))
    train(cfg, dry_run=args.dry_run, stop=stop)
    return 0
