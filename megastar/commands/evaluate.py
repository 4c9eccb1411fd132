"""``megastar evaluate``."""

from __future__ import annotations

from pathlib import Path

from megastar.commands._common import Parser, natural, positive
from megastar.commands._score_options import add_options, options_of
from megastar.errors import UserError

EXAMPLES = """
megastar evaluate samples.npz --real VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth
megastar evaluate samples.npz --real imagenet/val --inception FILE --metrics fid,kid --out scores.json
megastar evaluate samples.npz --real data/codes/val --real-tokenizer vq.safetensors --inception FILE
megastar evaluate samples.npz --real assets/emoji64/emoji64.tar --real-subset train --out scores.json
megastar evaluate folder/of/pictures --real imagenet/val --features my_network:features --metrics fd,pr
megastar evaluate --tokenizer assets/tokenizer/emoji64-vq.safetensors --real assets/emoji64/emoji64.tar --real-subset test
Without --inception the score is FD-EffLite0. It is no FID: it compares runs with each other and with its floor, the
distance of two halves of the real set. See docs/evaluation.md for the ImageNet protocol.
"""


def parser() -> Parser:
    p = Parser("evaluate", "Score pictures, or a tokenizer's reconstructions, against real pictures.", EXAMPLES)
    p.add_argument("generated", nargs="?", default=None, help="folder, tar or .npz (arr_0) of pictures to score")
    p.add_argument(
        "--tokenizer", default=None, help="score this tokenizer's reconstructions of the real pictures instead"
    )
    p.add_argument("--subset", default=None, help="only generated pictures below this top folder")
    add_options(p, required=True)
    p.add_argument("--seed", type=natural, default=0, help="of KID's subsets (default 0)")
    p.add_argument("--provenance", type=Path, default=None, help="JSON about the samples (default: SAMPLES.npz.json)")
    p.add_argument("--out", type=Path, default=None, help="JSON file for the scores and their origin")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--batch", type=positive, default=32, help="pictures at once (default 32)")
    return p


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    if (a.generated is None) == (a.tokenizer is None):
        raise UserError("give either pictures to score or --tokenizer; see megastar evaluate --help")
    from rich.console import Console

    from megastar.evaluation.runner import evaluate, evaluate_reconstruction, read_provenance
    from megastar.utils.device import pick_device

    told = read_provenance(a.provenance) if a.provenance else {}
    options = options_of(a, a.seed) | {
        "out": a.out,
        "device": pick_device(a.device),
        "batch": a.batch,
        "console": Console(),
        "provenance": told | {"command": " ".join(["megastar evaluate", *words])},
    }
    if a.tokenizer:
        evaluate_reconstruction(a.tokenizer, a.real, **options)
    else:
        evaluate(a.generated, a.real, generated_subset=a.subset, **options)
    return 0
