"""``megastar sample``: generate images as a grid and, optionally, as an .npz file to score."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

from megastar.checkpoint.find_weights import class_names, class_number, find_weights, has_null_class, labels_of
from megastar.commands._shared.common import (
    MOST,
    SETTINGS,
    Parser,
    add_score_options,
    bounded,
    given_score_options,
    main_console,
    natural,
    own_device,
    place_of,
    positive,
    processes,
    seed,
)
from megastar.commands._shared.outputs import check_outputs
from megastar.commands._shared.sample_output import (
    GRID,
    SHOWN_CLASSES,
    parts_of,
    sample_and_score,
    sample_to_files,
    shown_images,
)
from megastar.errors import UserError
from megastar.sampling.pipeline import open_pipeline
from megastar.sampling.step_schedules import PART_SCHEDULES, STEP_SCHEDULES
from megastar.utils.files import check_regular
from megastar.utils.launcher import LAUNCHED_BY_US

EXAMPLES = """
megastar sample                                                 the shipped weights, all classes -> samples.png
megastar sample runs/demo/run --out run.png                     EMA weights of the newest checkpoint
megastar sample --classes food-drink,travel-places --per-class 24 --cfg-scale 2 --seed 1
megastar sample --count 5000 --like runs/demo/codes/train --npz samples.npz
megastar sample w.safetensors --tokenizer t.safetensors --count 50000 --cfg-scale 1.5 --npz samples.npz --nproc 8
megastar sample hf://owner/name@v1.0                            a folder of convert --to hf on the Hub; docs/hub.md
megastar sample c2i_B_256.pt --tokenizer vq16.safetensors --cfg-scale 2     LlamaGen's file; docs/convert.md
torchrun --nproc-per-node 8 -m megastar sample w.safetensors --count 50000 --npz samples.npz --folder parts
megastar sample runs/random --parallel-steps 16                   random token order: 16 steps instead of one per token
sbatch slurm/sample_fid.sh w.safetensors --cfg-scale 1.5 --npz samples.npz
megastar sample w.safetensors --tokenizer t.safetensors --count 50000 --real VIRTUAL_imagenet256_labeled.npz --inception FILE
    --score scores.json --nproc 8                              scored while sampling, no images on disk
Repeating an interrupted command resumes it. docs/sampling.md lists the guarantees.
"""


def parser() -> Parser:
    p = Parser("sample", "Generate images from a run or a weights file.", EXAMPLES)
    p.add_argument(
        "source",
        nargs="?",
        help="run folder, checkpoint, .safetensors, folder of convert --to hf, hf://owner/name[@revision], or LlamaGen's .pt "
        "(default: shipped weights)",
    )
    p.add_argument(
        "--tokenizer", help="tokenizer .safetensors (default: the one whose hash the weights record, if it is found)"
    )
    p.add_argument(
        "--any-tokenizer",
        action="store_true",
        help="decode with --tokenizer even if the weights were trained on codes of another one",
    )
    p.add_argument("--out", type=Path, help="PNG file for the grid (default samples.png)")
    p.add_argument("--npz", type=Path, help="also write all images to this .npz file, uint8 (N, H, W, 3) in arr_0")
    p.add_argument("--folder", type=Path, help="folder for finished parts (default: NPZ.parts, removed at the end)")
    p.add_argument(
        "--weights",
        help="of a run: ema (default) or student; of a .pt file with several sets: the name of one, as model",
    )
    p.add_argument("--classes", help="comma-separated names or numbers (default: all, at most the first 16)")
    p.add_argument("--per-class", type=positive, default=12, help="images per class")
    p.add_argument("--count", type=positive, help="total number of images over all classes, for scoring")
    p.add_argument(
        "--plan",
        choices=("balanced", "random"),
        default="balanced",
        help="with --count: cycle through the classes, or draw each at random as LlamaGen does",
    )
    p.add_argument("--like", help="with --count: token shards whose class frequencies to follow")
    p.add_argument(
        "--cfg-scale",
        type=bounded(float, 0, 10**6),
        help="guidance scale; 1: none (default 3; with --count or --score, or without a null class, 1)",
    )
    p.add_argument(
        "--cfg-schedule",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="guidance scale over the tokens: constant, or a ramp from 1 to --cfg-scale",
    )
    p.add_argument("--cfg-passes", type=int, choices=(1, 2), default=1, help="2: separate pass for the null class")
    p.add_argument(
        "--cfg-interval", type=bounded(int, -1, MOST), default=-1, help="last token with guidance; -1: all tokens"
    )
    p.add_argument(
        "--temperature",
        type=bounded(float, 0, 10**6),
        help="softmax temperature (default 0.9; with --count or --score, 1)",
    )
    p.add_argument("--top-k", type=natural, default=0, help="sample from the k most likely codes; 0: all")
    p.add_argument(
        "--top-p",
        type=bounded(float, 0, 1),
        default=1.0,
        help="sample from the most likely codes of this total probability",
    )
    p.add_argument(
        "--parallel-steps",
        type=bounded(int, 1, 65536),
        help="weights of random token order: draw the tokens of an image in this many steps (default: one by one)",
    )
    p.add_argument(
        "--schedule",
        choices=STEP_SCHEDULES,
        help="with --parallel-steps: few tokens in the first steps and many in the last (cosine, the default), or as many in "
        "each (uniform); without it: one diagonal of the grid of tokens per step, 15 steps for 8 x 8 (diagonal)",
    )
    p.add_argument(
        "--token-order",
        choices=("auto", "raster", "random"),
        default="auto",
        help="weights of random token order: raster, or random, another order for each image, from the seed and its number "
        "(default: random with --parallel-steps, else raster)",
    )
    p.add_argument("--seed", type=seed, default=0, help="image i depends on the seed, i and its class only")
    p.add_argument("--batch", type=positive, default=64, help="images per batch")
    p.add_argument(
        "--size", type=bounded(int, 1, 4096), help="resize to this size, bicubic as in LlamaGen (default: no resizing)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="fp32", help="precision")
    p.add_argument("--nproc", type=processes, default=1, help="local processes (default 1); ignored under a launcher")
    scores = p.add_argument_group("scoring without writing images")
    scores.add_argument("--score", type=Path, help="score while sampling; JSON file for the result")
    add_score_options(scores, required=False)
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
    """The class of each image. ``like``: labels of real images, whose frequencies ``count`` images follow.

    Raises ``UserError`` for an unknown class.
    """
    chosen = [class_number(c.strip(), names) for c in classes.split(",")] if classes else list(range(len(names)))
    if count is None:
        shown = chosen if classes else chosen[:SHOWN_CLASSES]
        return [c for c in shown for _ in range(per_class)]
    from megastar.sampling.distributed import labels_like, plan_labels

    if like is None:
        return plan_labels(plan, count, chosen, seed)
    pool = [c for c in like if c in set(chosen)]
    if not pool:
        raise UserError(f"--like holds no image of the classes {classes}: give classes that it holds")
    return labels_like(pool, count, seed)


def main(words: list[str]) -> int:
    a = parser().parse(words)
    if a.like and a.count is None:
        raise UserError("--like sets the class frequencies of --count images: give --count too")
    if a.plan == "random" and (a.count is None or a.like):
        raise UserError("--plan random draws the classes of --count images: give --count, and no --like")
    if a.schedule in PART_SCHEDULES and not a.parallel_steps:
        raise UserError(f"--schedule {a.schedule} divides the tokens among --parallel-steps: give that too")
    rank, world, _ = place_of(os.environ)
    if max(world, a.nproc) > 1 and not (a.npz or a.folder or a.score):
        raise UserError("several processes need a shared output: give --npz, --folder or --score")
    if bool(a.score) != bool(a.real):
        raise UserError("--score (the output file) and --real (the reference images) must be given together")
    of_score = (
        "real_subset",
        "real_sha256",
        "real_tokenizer",
        "inception",
        "inception_sha256",
        "dinov2",
        "metrics",
        "features",
    )
    if not a.score and (given := given_score_options(a, (*of_score, *SETTINGS))):
        raise UserError(f"{given[0]} belongs to a score: give --score and --real too, or leave it out")
    if a.score and (a.npz or a.out):
        raise UserError("--score keeps no images: leave out --npz and --out, or score an .npz with megastar evaluate")
    grid = None if a.score else a.out or GRID
    inputs = (a.source, a.tokenizer, a.like, a.real, a.real_tokenizer, a.inception, a.dinov2)
    files, folders = {"--out": grid, "--npz": a.npz, "--score": a.score}, {"--folder": a.folder}
    if a.npz and a.npz.name and not rank:  # rank 0 writes them
        from megastar.sampling.npz import record_of

        files["the record of --npz"] = record_of(a.npz)
        folders["the parts of --npz"] = None if a.folder else parts_of(a.npz)
    check_outputs(files, *inputs, folders=folders)
    for path in filter(None, (grid, a.npz)):
        check_regular(path)  # they are renamed into place
    if a.nproc > 1 and world == 1:
        from megastar.commands._shared.launch import launch

        find_weights(a.source, a.weights)  # converts a run once, not in each process
        return launch(a.nproc, ["sample", *words])
    if LAUNCHED_BY_US in os.environ and logging.getLogger("megastar").level == logging.INFO:
        logging.getLogger("megastar.checkpoint").setLevel(logging.WARNING)  # the launcher has reported what it found
    found = find_weights(a.source, a.weights)
    cfg, provenance = found.config, found.provenance
    tokenizer = found.tokenizer_file(a.tokenizer)
    names = class_names(cfg.num_classes, provenance)
    if a.like and provenance.get("classes"):
        from megastar.data.shards.class_names import check_same_classes
        from megastar.data.shards.manifest import load_manifest

        check_same_classes(found.file, names, a.like, load_manifest(a.like, found.data).classes)
    like = labels_of(a.like, found.data) if a.like else None
    labels = choose_labels(names, a.classes, a.per_class, a.count, like, a.seed, a.plan)
    # Defaults: sharper images to look at, the model's own distribution to score.
    scale, temperature = (1.0, 1.0) if a.count or a.score else (3.0, 0.9)
    scale = scale if has_null_class(provenance) else 1.0
    options = {
        "cfg_scale": scale if a.cfg_scale is None else a.cfg_scale,
        "cfg_schedule": a.cfg_schedule,
        "temperature": temperature if a.temperature is None else a.temperature,
        "top_k": a.top_k,
        "top_p": a.top_p,
        "cfg_interval": a.cfg_interval,
        "parallel_steps": a.parallel_steps or 0,
        "schedule": a.schedule or "cosine",
        "token_order": a.token_order,
    }
    settings = {"seed": a.seed, "dtype": a.dtype, "batch": a.batch, "size": a.size}
    origin = {"weights": str(found.digest_file), "tokenizer": tokenizer, "trained": provenance, "passes": a.cfg_passes}
    sizes = ("name", "n_layer", "n_head", "dim", "image_tokens", "num_classes", "vocab_size")
    origin["model"] = {name: getattr(found.config, name) for name in sizes}
    origin["label_plan"] = f"like {a.like}" if a.like else a.plan if a.count else "per class"
    console, device = main_console(), own_device(a.device)
    pipeline = open_pipeline(
        found, tokenizer, labels, device=device, passes=a.cfg_passes, rank=rank, any_tokenizer=a.any_tokenizer,
        **settings, **options,
    )  # fmt: skip
    if a.score:
        sample_and_score(pipeline, a, origin, (rank, world), console, words)
        return 0
    columns = min(a.per_class, max(Counter(labels).values()))
    if a.npz or a.folder:
        shown = sample_to_files(pipeline, a, origin, (rank, world), columns, console)
    else:
        from megastar.sampling.distributed import iterate_images

        images = [image for _, batch in iterate_images(pipeline, console=console) for image in batch]
        shown = {i: images[i] for i in shown_images(labels, columns)}
    if rank or not shown:
        return 0
    import numpy as np

    from megastar.sampling.grid import Block, image_grid, save_grid

    block = Block("", np.stack(list(shown.values())), [labels[i] for i in shown])
    out = a.out or GRID
    save_grid(image_grid([block], names, columns=columns), out, settings | pipeline.options.recorded() | origin)
    written = " and ".join(str(p) for p in (out, a.npz, a.folder) if p)
    console.print(f"{len(labels)} images of {len(set(labels))} classes: {written}", markup=False, highlight=False)
    return 0
