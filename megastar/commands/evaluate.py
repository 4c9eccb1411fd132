"""``megastar evaluate``."""

from __future__ import annotations

from pathlib import Path

from megastar.commands.common import Parser, positive
from megastar.errors import UserError

EXAMPLES = """
megastar evaluate samples.npz --real assets/emoji64/emoji64.tar --real-subset train --out scores.json
megastar evaluate folder/of/pictures --real imagenet/val
megastar evaluate --tokenizer assets/tokenizer/emoji64-vq.safetensors --real assets/emoji64/emoji64.tar --real-subset test
FD-EffLite0 is no FID: it compares runs with each other and with its floor, the distance of two halves of the real set.
"""


def parser() -> Parser:
    p = Parser(
        "evaluate", "Score pictures, or a tokenizer's reconstructions, against real pictures (FD-EffLite0).", EXAMPLES
    )
    p.add_argument("generated", nargs="?", default=None, help="folder, tar or .npz of pictures to score")
    p.add_argument(
        "--tokenizer", default=None, help="score this tokenizer's reconstructions of the real pictures instead"
    )
    p.add_argument("--real", required=True, help="folder, tar or .npz of real pictures")
    p.add_argument("--real-subset", default=None, help="only real pictures below this top folder")
    p.add_argument("--subset", default=None, help="only generated pictures below this top folder")
    p.add_argument("--out", type=Path, default=None, help="JSON file for the scores and their origin")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--batch", type=positive, default=32, help="pictures at once (default 32)")
    return p


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    if (a.generated is None) == (a.tokenizer is None):
        raise UserError("give either pictures to score or --tokenizer; see megastar evaluate --help")
    from rich.console import Console

    from megastar.device import pick_device
    from megastar.evaluation.runner import evaluate, evaluate_reconstruction

    options = {
        "out": a.out,
        "device": pick_device(a.device),
        "batch": a.batch,
        "console": Console(),
        "provenance": {"command": " ".join(["megastar evaluate", *words])},
        "real_subset": a.real_subset,
    }
    if a.tokenizer:
        evaluate_reconstruction(a.tokenizer, a.real, **options)
    else:
        evaluate(a.generated, a.real, generated_subset=a.subset, **options)
    return 0
