"""``megastar train``."""

from __future__ import annotations

import os
import sys

from megastar.commands._common import (
    FaultTolerantStream,
    Parser,
    config_and_overrides,
    is_launched,
    positive,
    terminal_width,
)
from megastar.utils.signals import StopFlag

EXAMPLES = """
megastar train configs/run/demo.yaml --nproc 2                    two processes on this machine
megastar train configs/run/demo.yaml train.steps=50 optim.lr=5e-4 other values
megastar train configs/run/star_b_50ep.yaml model=configs/model/l.yaml run=runs/try --dry-run
megastar train configs/run/star_b_50ep.yaml method=configs/method/ar.yaml --print-config
torchrun --nproc-per-node 8 -m megastar train configs/run/star_b_50ep.yaml
deepspeed --num_gpus 8 --module megastar train configs/run/star_b_50ep.yaml
sbatch slurm/train_b.sh configs/run/star_b_50ep.yaml
The same command again resumes from the run folder's newest checkpoint.
"""


def parser() -> Parser:
    from megastar.config.help import fields_text
    from megastar.config.schema import RunConfig

    p = Parser(
        "train",
        "Train a model on token shards, or go on with a run that was interrupted.",
        EXAMPLES,
        fields_text(RunConfig, terminal_width()),
    )
    p.add_argument("items", nargs="*", metavar="CONFIG | section.field=value", help="a YAML file, then other values")
    p.add_argument(
        "--nproc", type=positive, default=1, help="processes to start here (default 1); ignored in a launcher"
    )
    p.add_argument("--dry-run", action="store_true", help="build everything, run one fake step, print memory and batch")
    p.add_argument("--print-config", action="store_true", help="print every field as YAML and exit")
    return p


def main(words: list[str]) -> int:
    # A rank of a launcher listens at once: the imports below take seconds, and a signal would end it without the others.
    stop = StopFlag() if is_launched(os.environ) or "SLURM_STEP_ID" in os.environ else None
    from megastar.config.load import config_yaml, load_config, resolve_batch

    args = parser().parse_intermixed_args(words)
    path, overrides = config_and_overrides(args.items)
    cfg = load_config(path, overrides)
    if args.print_config:
        print(config_yaml(cfg), end="")
        return 0
    if args.nproc > 1 and not is_launched(os.environ):
        from megastar.commands._launch import launch

        resolve_batch(cfg, args.nproc)  # a wrong number of processes is told before they start
        return launch(args.nproc, ["train", *args.items, *(["--dry-run"] if args.dry_run else [])])
    from megastar.engine.trainer import train

    if not isinstance(sys.stdout, FaultTolerantStream):  # the log may lie on a disk that fills
        sys.stdout, sys.stderr = FaultTolerantStream(sys.stdout), FaultTolerantStream(sys.stderr)
    train(cfg, dry_run=args.dry_run, stop=stop)
    return 0
