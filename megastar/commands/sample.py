"""``megastar sample``: weights -> codes -> pictures, as a grid and, if wanted, as an .npz to score."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from megastar.checkpoint.find_weights import SHIPPED_TOKENIZER, class_names, find_weights, labels_of
from megastar.commands._common import Parser, natural, nearest, place_of, positive
from megastar.commands._sample_output import SHOWN_CLASSES, draw_to_files, score_drawn, shown_pictures
from megastar.commands._score_options import add_options, without_words
from megastar.config.files import find_file
from megastar.errors import UserError
from megastar.sampling.pipeline import open_pipeline

EXAMPLES = """
megastar sample                                                 the shipped weights, all classes -> samples.png
megastar sample runs/demo/run --out run.png                     the newest checkpoint's averaged weights
megastar sample --classes food-drink,travel-places --per-class 24 --cfg-scale 2 --seed 1
megastar sample --count 5000 --like runs/demo/codes/train --npz samples.npz
megastar sample w.safetensors --tokenizer t.safetensors --count 50000 --cfg-scale 1.5 --npz samples.npz --nproc 8
torchrun --nproc-per-node 8 -m megastar sample w.safetensors --count 50000 --npz samples.npz --folder parts
sbatch slurm/sample_fid.sh w.safetensors --cfg-scale 1.5 --npz samples.npz
megastar sample w.safetensors --tokenizer t.safetensors --count 50000 --real VIRTUAL_imagenet256_labeled.npz --inception FILE
    --score scores.json --nproc 8                              scored while they are drawn, no picture on disk
The same command again goes on: finished pictures are not drawn twice. docs/sampling.md tells what is guaranteed.
"""


def parser() -> Parser:
    p = Parser("sample", "Draw pictures from a run or a weights file.", EXAMPLES)
    p.add_argument(
        "source", nargs="?", default=None, help="run folder, checkpoint or .safetensors (default: the shipped weights)"
    )
    p.add_argument("--tokenizer", default=None, help="tokenizer .safetensors (default: the run's, or the shipped one)")
    p.add_argument("--out", type=Path, default=None, help="the grid to write (default samples.png)")
    p.add_argument("--npz", type=Path, default=None, help="also write all pictures, uint8 (N, H, W, 3), as arr_0")
    p.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="keep finished parts here (default: NPZ.parts until the .npz is whole)",
    )
    p.add_argument("--weights", choices=("ema", "student"), default="ema", help="of a run: which (default ema)")
    p.add_argument("--classes", default=None, help="names or numbers, with commas (default: all, of many the first 16)")
    p.add_argument("--per-class", type=positive, default=12, help="pictures of each class (default 12)")
    p.add_argument("--count", type=positive, default=None, help="pictures in all, spread over the classes, for scores")
    p.add_argument(
        "--plan",
        choices=("balanced", "random"),
        default="balanced",
        help="--count: the classes in turn, or each drawn for itself as LlamaGen does (default balanced)",
    )
    p.add_argument("--like", default=None, help="token shards whose class frequencies --count follows")
    p.add_argument(
        "--cfg-scale", type=float, default=None, help="classifier-free guidance; 1: none (default 3; with --count 1)"
    )
    p.add_argument(
        "--cfg-schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="guidance over the tokens: constant, or a ramp from 1 to --cfg-scale (default constant)",
    )
    p.add_argument(
        "--cfg-passes", type=int, choices=(1, 2), default=1, help="2: null rows in a pass of their own (default 1)"
    )
    p.add_argument("--cfg-interval", type=int, default=-1, help="guide up to this token; -1: all (default -1)")
    p.add_argument(
        "--temperature", type=float, default=None, help="1: as trained; less is tidier (default 0.9; with --count 1)"
    )
    p.add_argument("--top-k", type=natural, default=0, help="keep the k likeliest codes; 0: all (default 0)")
    p.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest codes up to this mass (default 1)")
    p.add_argument(
        "--seed", type=natural, default=0, help="picture i depends on the seed, i and its class only (default 0)"
    )
    p.add_argument("--batch", type=positive, default=64, help="pictures at once (default 64)")
    p.add_argument(
        "--size", type=positive, default=None, help="resize to this side, bicubic as LlamaGen (default: as drawn)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="fp32", help="precision (default fp32)")
    p.add_argument(
        "--nproc", type=positive, default=1, help="processes to start here (default 1); ignored in a launcher"
    )
    scores = p.add_argument_group("scores, without a picture on disk")
    scores.add_argument("--score", type=Path, default=None, help="score while drawing; JSON file for the result")
    add_options(scores, required=False)
    return p


def choose_labels(
    names: list[str],
    classes: str | None,
    per_class: int,
    count: int | None,
    like: list[int] | None,
    seed: int,
    plan: str = "balanced",
) -> list[int]:
    """The class of each picture. ``like`` holds labels of real pictures, whose frequencies ``count`` then follows.

    Raises ``UserError`` for an unknown class.
    """
    import numpy as np

    chosen = [parse_class(c.strip(), names) for c in classes.split(",")] if classes else list(range(len(names)))
    if count is None:
        shown = chosen if classes else chosen[:SHOWN_CLASSES]
        return [c for c in shown for _ in range(per_class)]
    if like is None:
        from megastar.sampling.distributed import plan_labels

        return plan_labels(plan, count, chosen, seed)
    pool = np.array([c for c in like if c in set(chosen)])
    if not len(pool):
        raise UserError(f"--like holds no picture of the classes {classes}")
    order = np.random.default_rng([seed, 1]).permutation(len(pool))
    return pool[order[np.arange(count) % len(pool)]].tolist()


def parse_class(text: str, names: list[str]) -> int:
    if text in names:
        return names.index(text)
    if text.isdigit():
        if int(text) < len(names):
            return int(text)
        raise UserError(f"class {text} is outside 0..{len(names) - 1}, the classes of these weights")
    raise UserError(f"class {text!r} is unknown: {nearest(text, names)}")


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    if a.like and a.count is None:
        raise UserError("--like tells how --count pictures spread over the classes: give --count too")
    if a.plan == "random" and (a.count is None or a.like):
        raise UserError("--plan random draws the classes of --count pictures: give --count, and no --like")
    rank, world, local = place_of(os.environ)
    if max(world, a.nproc) > 1 and not (a.npz or a.folder or a.score):
        raise UserError("several processes share a folder: give --npz or --folder, or --score")
    if bool(a.score) != bool(a.real):
        raise UserError(
            "--score and --real belong together: where the result goes, and what the pictures are compared with"
        )
    if a.score and (a.npz or a.out):
        raise UserError("--score keeps no pictures: leave out --npz and --out, or score an .npz with megastar evaluate")
    if a.nproc > 1 and world == 1:
        from megastar.commands._launch import launch

        find_weights(a.source, a.weights)  # a run is converted once, not by each process
        return launch(a.nproc, ["sample", *without_words(words, "--nproc")])
    from rich.console import Console

    from megastar.model.io import read_model_metadata

    found = find_weights(a.source, a.weights)
    cfg, about = read_model_metadata(found.file)
    tokenizer = a.tokenizer or found.tokenizer or SHIPPED_TOKENIZER
    tokenizer = str(find_file(tokenizer) or tokenizer)
    names = class_names(cfg.num_classes, about)
    like = labels_of(a.like) if a.like else None
    labels = choose_labels(names, a.classes, a.per_class, a.count, like, a.seed, a.plan)
    # To look at, tidy pictures; to score, the model's own distribution unless asked otherwise.
    scale, temperature = (1.0, 1.0) if a.count or a.score else (3.0, 0.9)
    options = {
        "cfg_scale": scale if a.cfg_scale is None else a.cfg_scale,
        "cfg_schedule": a.cfg_schedule,
        "temperature": temperature if a.temperature is None else a.temperature,
        "top_k": a.top_k,
        "top_p": a.top_p,
        "cfg_interval": a.cfg_interval,
    }
    known = {"seed": a.seed, "dtype": a.dtype, "batch": a.batch, "size": a.size}
    origin = {"weights": str(found.file), "tokenizer": tokenizer, "trained": about, "passes": a.cfg_passes}
    origin["label_plan"] = f"like {a.like}" if a.like else a.plan if a.count else "per class"
    device = a.device
    if device == "auto" and world > 1:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = f"cuda:{local % gpus}" if gpus else "cpu"
    console = Console(quiet=rank > 0)

    painter = open_pipeline(
        found.file, tokenizer, labels, device=device, passes=a.cfg_passes, rank=rank, **known, **options
    )
    if a.score:
        score_drawn(painter, a, origin, (rank, world), console, words)
        return 0
    columns = min(a.per_class, max(Counter(labels).values()))
    if a.npz or a.folder:
        some = draw_to_files(painter, a, origin, (rank, world), columns, console)
    else:
        from megastar.sampling.distributed import iterate_images

        pictures = [p for _, some in iterate_images(painter, console=console) for p in some]
        some = {i: pictures[i] for i in shown_pictures(labels, columns)}
    if rank or not some:
        return 0
    import numpy as np

    from megastar.sampling.grid import Block, image_grid, save_grid

    block = Block("", np.stack(list(some.values())), [labels[i] for i in some])
    out = a.out or Path("samples.png")
    save_grid(image_grid([block], names, columns=columns), out, known | options | origin)
    written = " and ".join(str(p) for p in (out, a.npz, a.folder) if p)
    console.print(f"{len(labels)} pictures of {len(set(labels))} classes: {written}", markup=False, highlight=False)
    return 0
