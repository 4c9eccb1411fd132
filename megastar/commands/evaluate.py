"""``megastar evaluate``: score images against real images."""

from __future__ import annotations

from pathlib import Path

from megastar.commands._shared.common import (
    Parser,
    add_score_options,
    given_score_options,
    positive,
    score_options_of,
    seed,
)
from megastar.commands._shared.json_output import only_json
from megastar.commands._shared.outputs import check_outputs
from megastar.errors import UserError
from megastar.utils.redact import redact

EXAMPLES = """
megastar evaluate samples.npz --real VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth
megastar evaluate samples.npz --real imagenet/val --inception FILE --metrics fid,kid --out scores.json
megastar evaluate samples.npz --real data/codes/val --real-tokenizer vq.safetensors --inception FILE
megastar evaluate samples.npz --real assets/emoji64/emoji64.tar --real-subset train --out scores.json
megastar evaluate samples.npz --real imagenet/val --metrics fd_dinov2 --dinov2 dinov2_vitl14_pretrain.pth
megastar evaluate samples.npz --real imagenet/train --fdr efflite0,dinov2 --held-out imagenet/val --dinov2 FILE
megastar evaluate folder/of/images --real imagenet/val --features my_network:features --metrics fd,pr
megastar evaluate --tokenizer assets/tokenizer/emoji64-vq.safetensors --real assets/emoji64/emoji64.tar --real-subset test
Without --inception the score is FD-EffLite0. It is not an FID: compare it only between runs and with its floor, the
distance between two halves of the real set. See docs/evaluation.md for the ImageNet protocol.
"""


def parser() -> Parser:
    p = Parser("evaluate", "Score images, or a tokenizer's reconstructions, against real images.", EXAMPLES)
    p.add_argument("generated", nargs="?", help="folder, tar or .npz (arr_0) of images to score")
    p.add_argument("--tokenizer", help="score this tokenizer's reconstructions of the real images instead")
    p.add_argument("--subset", help="use only generated images in this top-level folder")
    add_score_options(p, required=True)
    p.add_argument(
        "--fdr",
        metavar="NETWORKS",
        help="instead of --metrics: FDr^k over these networks, comma-separated: efflite0, inception, dinov2, module:function",
    )
    p.add_argument("--held-out", help="for --fdr: held-out real images; a folder, tar or .npz")
    p.add_argument("--held-out-subset", help="for --fdr: use only held-out images in this top-level folder")
    p.add_argument("--seed", type=seed, default=0, help="seed of KID's subsets")
    p.add_argument("--provenance", type=Path, help="JSON file with the samples' provenance (default: SAMPLES.npz.json)")
    p.add_argument("--out", type=Path, help="JSON file for the scores and their provenance")
    p.add_argument("--json", action="store_true", help="print what --out holds instead of a table")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    p.add_argument("--batch", type=positive, default=32, help="images per batch")
    return p


def main(words: list[str]) -> int:
    a = parser().parse(words)
    if (a.generated is None) == (a.tokenizer is None):
        raise UserError("give either images to score or --tokenizer; see megastar evaluate --help")
    if (a.fdr is None) != (a.held_out is None) or (a.held_out_subset and not a.held_out):
        raise UserError("--fdr and --held-out belong together: give both, or neither")
    if a.fdr and (a.tokenizer or a.metrics or a.features):
        raise UserError("--fdr scores images with its own networks: leave out --tokenizer, --metrics and --features")
    if a.fdr and (given := given_score_options(a, ("is_split", "kid_subsets", "kid_size"))):
        raise UserError(f"--fdr computes Frechet distances only: leave out {given[0]}")
    if a.subset and a.tokenizer:
        raise UserError(
            f"--subset {a.subset} chooses among images to score, but --tokenizer reconstructs those of --real: use "
            f"--real-subset {a.subset}"
        )
    from megastar.sampling.npz import record_of

    recorded = Path(a.generated or "").suffix in (".npz", ".tar")
    images = (a.generated, record_of(Path(a.generated)) if recorded else None, a.real, a.held_out)
    check_outputs({"--out": a.out}, *images, a.tokenizer, a.real_tokenizer, a.inception, a.dinov2, a.provenance)
    from megastar.checkpoint.hub.download import local_tokenizer
    from megastar.evaluation.runner import evaluate, evaluate_reconstruction, read_provenance
    from megastar.utils.device import pick_device
    from megastar.utils.logs import shared_console

    provenance = read_provenance(a.provenance) if a.provenance else {}
    options = score_options_of(a, a.seed) | {
        "out": a.out,
        "device": pick_device(a.device),
        "batch": a.batch,
        "console": shared_console(),
        "provenance": provenance | {"command": redact(" ".join(["megastar evaluate", *words]))},
    }
    with only_json(a.json) as print_json:
        if a.fdr:
            from megastar.evaluation.fd_ratio import fd_ratio

            names = [word.strip() for word in a.fdr.split(",") if word.strip()]
            sets = {"generated_subset": a.subset, "held_out_subset": a.held_out_subset}
            result = fd_ratio(a.generated, a.real, a.held_out, names, **sets, **options)
        elif a.tokenizer:
            result = evaluate_reconstruction(local_tokenizer(a.tokenizer), a.real, **options)
        else:
            result = evaluate(a.generated, a.real, generated_subset=a.subset, **options)
        if a.json:
            print_json(result)
    return 0
