"""``megastar evaluate``."""

from __future__ import annotations

from pathlib import Path

from megastar.commands.common import Parser, natural, positive
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
    p.add_argument(
        "--real", required=True, help="ADM's VIRTUAL_*.npz, a folder, a tar, an .npz of pictures, or token shards"
    )
    p.add_argument("--real-subset", default=None, help="only real pictures below this top folder")
    p.add_argument("--real-sha256", default=None, help="refuse a reference with another hash")
    p.add_argument("--real-tokenizer", default=None, help="the tokenizer that decodes --real's token shards")
    p.add_argument("--subset", default=None, help="only generated pictures below this top folder")
    p.add_argument("--inception", default=None, help="FID's Inception file; never downloaded")
    p.add_argument("--inception-sha256", default=None, help="vouch for an Inception file of your own")
    p.add_argument(
        "--features", default="efflite0", help="without --inception: efflite0 or module:function (default efflite0)"
    )
    p.add_argument(
        "--metrics",
        default=None,
        help="with commas: fid, sfid, is, pr, kid (default fid,sfid,is,pr); without --inception: fd, pr, kid (default fd)",
    )
    p.add_argument("--is-split", type=positive, default=5000, help="pictures in a split of IS (default 5000, as ADM)")
    p.add_argument("--kid-subsets", type=positive, default=100, help="random subsets of KID (default 100)")
    p.add_argument("--kid-size", type=positive, default=1000, help="pictures in each (default 1000)")
    p.add_argument("--seed", type=natural, default=0, help="of KID's subsets (default 0)")
    p.add_argument(
        "--allow-few", action="store_true", help="score fewer pictures than a metric needs, to try things out"
    )
    p.add_argument("--provenance", type=Path, default=None, help="JSON about the samples (default: SAMPLES.npz.json)")
    p.add_argument("--out", type=Path, default=None, help="JSON file for the scores and their origin")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--batch", type=positive, default=32, help="pictures at once (default 32)")
    return p


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    if (a.generated is None) == (a.tokenizer is None):
        raise UserError("give either pictures to score or --tokenizer; see megastar evaluate --help")
    if a.inception is not None and a.features not in ("efflite0", "inception"):
        raise UserError(f"--inception and --features {a.features} are two networks: give one")
    from rich.console import Console

    from megastar.device import pick_device
    from megastar.evaluation.runner import evaluate, evaluate_reconstruction, read_provenance
    from megastar.evaluation.scores import Settings

    told = read_provenance(a.provenance) if a.provenance else {}
    metrics = [m.strip().lower() for m in a.metrics.split(",") if m.strip()] if a.metrics else None
    features = a.features
    if metrics and set(metrics) & {"fid", "sfid", "is"} and features == "efflite0":
        features = "inception"  # whose absence then has its sentence
    options = {
        "metrics": metrics,
        "features": features,
        "inception": a.inception,
        "inception_sha256": a.inception_sha256,
        "real_subset": a.real_subset,
        "real_sha256": a.real_sha256,
        "real_tokenizer": a.real_tokenizer,
        "settings": Settings(
            is_split=a.is_split,
            kid_subsets=a.kid_subsets,
            kid_size=a.kid_size,
            seed=a.seed,
            allow_few=a.allow_few,
        ),
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
