"""``megastar train-tokenizer``: train a VQ tokenizer on random crops of images."""

from __future__ import annotations

import os
import sys
from typing import TextIO, cast

from megastar.commands._shared.common import (
    FaultTolerantStream,
    Parser,
    config_and_overrides,
    is_launched,
    place_of,
    print_run_folder,
    processes,
    terminal_width,
)
from megastar.commands._shared.outputs import check_outputs
from megastar.config.help import fields_text
from megastar.config.load import config_yaml, load_tokenizer_config
from megastar.config.schema import TokenizerTrainConfig
from megastar.utils.printable import say
from megastar.utils.process_exit import die_with_agent
from megastar.utils.redact import redact
from megastar.utils.signals import StopFlag

EXAMPLES = """
megastar train-tokenizer configs/tokenizer/emoji64.yaml
megastar train-tokenizer configs/tokenizer/emoji64.yaml --nproc 2          two local processes
megastar train-tokenizer configs/tokenizer/emoji64.yaml steps=2000 out=runs/try tokenizer.codebook_size=1024
megastar train-tokenizer pictures=photos/ out=runs/vq16 tokenizer.image_size=256 --inception inception.pth
megastar train-tokenizer configs/tokenizer/emoji64.yaml init=assets/tokenizer/emoji64-vq.safetensors \\
    continuous_steps=0 lr=5e-4 out=runs/tokenizer-more
torchrun --nproc-per-node 8 -m megastar train-tokenizer pictures=data/imagenet/train out=runs/vq16
sbatch slurm/train_tokenizer.sh configs/tokenizer/emoji64.yaml
Repeating a command resumes it, on any number of processes that divides the batch; the result is OUT/tokenizer.safetensors.
"""


def parser() -> Parser:
    p = Parser(
        "train-tokenizer",
        "Train a VQ tokenizer, which encodes images into codes and decodes codes into images.",
        EXAMPLES,
        fields_text(TokenizerTrainConfig, terminal_width()),
    )
    p.add_argument("items", nargs="*", metavar="CONFIG | field=value", help="a YAML file, fields to override")
    p.add_argument("--nproc", type=processes, default=1, help="local processes (default 1); ignored under a launcher")
    p.add_argument("--inception", help="file with FID's Inception weights: validation reports rFID; never downloaded")
    p.add_argument("--print-config", action="store_true", help="print every field as YAML and exit")
    p.add_argument("--print-run-folder", action="store_true", help="print the absolute path of out and exit")
    return p


def main(words: list[str]) -> int:
    # Ranks handle signals before the imports below, which take seconds: a signal must not kill one rank only.
    die_with_agent()
    stop = StopFlag() if is_launched(os.environ) or "SLURM_STEP_ID" in os.environ else None
    args = parser().parse(words)
    path, overrides = config_and_overrides(args.items)
    cfg = load_tokenizer_config(path, overrides)
    if args.print_config:
        say(config_yaml(cfg).rstrip("\n"))
        return 0
    if args.print_run_folder:  # the batch scripts of slurm/ ask for it
        print_run_folder(cfg.out, "out")
        return 0
    if not is_launched(os.environ):  # launched ranks let rank 0 check
        check_outputs({}, folders={"out =": cfg.out})
    from megastar.engine.tokenizer.setup import check_ranks

    if args.nproc > 1 and not is_launched(os.environ):
        from megastar.commands._shared.launch import launch

        check_ranks(cfg.batch, args.nproc)  # before processes are started
        return launch(args.nproc, ["train-tokenizer", *words])
    from megastar.engine.tokenizer.trainer import train_tokenizer

    stop = stop or StopFlag()
    if not isinstance(sys.stdout, FaultTolerantStream):  # the log may be on a full disk
        sys.stdout = cast("TextIO", FaultTolerantStream(sys.stdout))
        sys.stderr = cast("TextIO", FaultTolerantStream(sys.stderr))
    command = redact(" ".join(["megastar train-tokenizer", *([path] if path else []), *overrides]))
    try:
        result, scores = train_tokenizer(cfg, command, inception=args.inception, stop=stop, watchdog=True)
    finally:
        (stop.ignore if stop.signal else stop.restore)()  # a further signal must not replace the exit status
    if place_of(os.environ)[0] == 0:
        found = (f"{k}: {v['psnr']:.2f} dB, {v['codes_used']:.1%} codes" for k, v in scores.items())
        say(f"{result}: " + "; ".join(found))
    return 0
