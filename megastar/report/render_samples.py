"""What ``megastar report`` draws and computes: sample grids of the kept checkpoints, attention of the newest one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.files import find_file
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.report.page import Grid, ReportRun, embedded
from megastar.report.read_run import provenance_of

if TYPE_CHECKING:
    import torch
    from rich.console import Console

NAME = re.compile(r"step-(\d{8})\.png")
GRIDS = 24  # of one run on the page
CLASSES = 12  # rows of a grid when there are more
SAMPLING = {"seed": 0, "cfg_scale": 3.0, "temperature": 0.9}  # what megastar sample takes for pictures to look at
ATTENDED = 16  # pictures whose attention distances are averaged
MAP_BYTES = 3 << 20  # of all attention maps, before they are packed
PATIENCE = 20.0  # seconds for shards on s3://: a report does not wait for an outage to end


@dataclass(frozen=True)
class Wanted:
    """The command's options."""

    weights: str
    tokenizer: str | None
    shards: str | None
    device: str
    per_class: int
    picture: int


def add_grids(
    run: ReportRun, cfg: RunConfig | None, folder: Path, wanted: Wanted, console: Console, *, draw: bool
) -> None:
    """The grids of RUN/samples; with ``draw`` first those of the checkpoints that have none of this kind there."""
    if draw and cfg is not None:
        try:
            draw_missing(cfg, folder, wanted, console, run.name)
        except UserError as error:
            run.notes.append(f"samples: {' '.join(str(error).split())}")
    from PIL import Image

    found = sorted((int(m[1]), p) for p in (folder / "samples").glob("step-*.png") if (m := NAME.fullmatch(p.name)))
    for step, path in evenly(found, GRIDS):
        try:
            with Image.open(path) as image:
                source = embedded(image)
        except (OSError, ValueError, SyntaxError) as error:
            run.notes.append(f"samples: {path.name} cannot be read ({error})")
            continue
        told = provenance_of(path)
        run.grids.append(Grid(step, source, caption_of(told)))


def caption_of(told: dict[str, Any]) -> str:
    """How a grid was drawn, from what its PNG says; nothing for one that is not ours."""
    if "weights" not in told:
        return ""
    which = "averaged" if told["weights"] == "ema" else told["weights"]
    return f"{which} weights, guidance {told.get('cfg_scale', 1):g}, temperature {told.get('temperature', 1):g}"


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` (2 or more) of them, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def draw_missing(cfg: RunConfig, folder: Path, wanted: Wanted, console: Console, name: str) -> None:
    """RUN/samples/step-*.png of the kept checkpoints: the same classes and random numbers at each. A PNG that is not
    from here stays."""
    from megastar.run_dir.checkpoint_dir import MANIFEST, complete, step_in
    from megastar.utils.files import sha256

    checkpoints = evenly(complete(folder / "checkpoints"), GRIDS)
    if not checkpoints:
        return
    tokenizer, classes = tokenizer_of(cfg, folder, wanted), classes_of(cfg.model.num_classes)
    same = SAMPLING | {"weights": wanted.weights, "per_class": wanted.per_class, "classes": classes}
    same["tokenizer_sha256"] = sha256(tokenizer)
    for checkpoint in checkpoints:
        out = folder / "samples" / f"step-{step_in(checkpoint):08d}.png"
        told = same | {"checkpoint": sha256(checkpoint / MANIFEST)}
        if out.is_file() and provenance_of(out) in ({}, told):
            continue
        console.print(f"{name}: samples of step {step_in(checkpoint)}", markup=False, highlight=False)
        draw_grid(checkpoint, tokenizer, out, told, wanted.device, console)


def draw_grid(
    checkpoint: Path, tokenizer: Path, out: Path, told: dict[str, Any], device: str, console: Console
) -> None:
    from megastar.checkpoint.find_weights import class_names, find_weights
    from megastar.model.io import read_model_metadata
    from megastar.sampling.grid import Block, image_grid, save_grid
    from megastar.sampling.pipeline import sample_images

    weights = find_weights(checkpoint, told["weights"]).file
    labels = [c for c in told["classes"] for _ in range(told["per_class"])]
    pictures = sample_images(weights, tokenizer, labels, device=device, console=console, **SAMPLING)
    model, about = read_model_metadata(weights)
    names = class_names(model.num_classes, about)
    save_grid(image_grid([Block("", pictures, labels)], names, columns=told["per_class"]), out, told)


def classes_of(count: int) -> list[int]:
    """Which classes a grid shows: all, or some over the whole range."""
    return evenly(list(range(count)), CLASSES)


def tokenizer_of(cfg: RunConfig, folder: Path, wanted: Wanted) -> Path:
    given = wanted.tokenizer or cfg.data.tokenizer
    if not given:
        raise UserError("the run names no tokenizer: name it with --tokenizer")
    if (found := find_file(given, folder / "config.yaml")) is None:
        raise UserError(f"the tokenizer {given} is not here: name it with --tokenizer")
    return found


def shards_of(cfg: RunConfig, folder: Path, wanted: Wanted) -> str:
    from megastar.data.storage.protocol import is_remote

    names = [wanted.shards] if wanted.shards else [cfg.data.val_shards, cfg.data.shards]
    for name in filter(None, names):
        if is_remote(name):
            return name
        if (found := find_file(Path(name) / "manifest.json", folder / "config.yaml")) is not None:
            return str(found.parent)
    raise UserError(f"the token shards {' and '.join(filter(None, names))} are not here: name some with --shards")


def add_attention(
    run: ReportRun, cfg: RunConfig | None, folder: Path, wanted: Wanted, console: Console, *, blocks_for: int
) -> None:
    """Attention distances and the masked picture of the newest checkpoint; ``blocks_for`` runs share the page's room."""
    from megastar.run_dir.checkpoint_dir import latest

    if cfg is None or not (folder / "checkpoints").is_dir() or latest(folder / "checkpoints") is None:
        return
    try:
        with console.status(f"attention of {run.name}"):
            attend(run, cfg, folder, wanted, blocks_for)
    except UserError as error:
        run.notes.append(f"attention: {' '.join(str(error).split())}")


def attend(run: ReportRun, cfg: RunConfig, folder: Path, wanted: Wanted, blocks_for: int) -> None:

    from megastar.checkpoint.find_weights import class_names, find_weights
    from megastar.model.io import load_model
    from megastar.model.masks import draw_hidden
    from megastar.report.attention import masked_picture, reach_of
    from megastar.utils.device import pick_device

    shards, device = shards_of(cfg, folder, wanted), pick_device(wanted.device)
    codes, labels = centre_codes(shards, cfg, wanted.picture)
    model, about = load_model(find_weights(folder, wanted.weights).file, device)
    if codes.shape[1] != model.cfg.image_tokens or int(codes.max()) >= model.cfg.vocab_size:
        raise UserError(f"{shards} holds other codes than this network's: name its own with --shards")
    tokens, classes = codes[:, :-1].to(device), labels.to(device)
    which = f"{'averaged' if wanted.weights == 'ema' else 'student'} weights of step {about['step']:,}"
    reach = reach_of(model, classes, tokens)
    told = f"All keys visible, {reach.pictures} pictures of {Path(shards).name}, {which}"
    run.reach = {"means": reach.means, "heads": reach.distances, "uniform": reach.uniform, "about": told}
    ratio, trained = cfg.self_guided.mask_ratio, cfg.self_guided.enabled and cfg.self_guided.mask_ratio > 0
    hidden = draw_hidden(cfg.train.seed, [0], [wanted.picture], model.cfg.image_tokens, ratio if trained else 0.25)[0]
    most = max(2, MAP_BYTES // (2 * hidden.numel() ** 2 * blocks_for))
    block = min(cfg.self_guided.contrastive_block, model.cfg.n_layer)
    found = masked_picture(model, int(classes[0]), tokens[0], hidden, most, block)
    label = class_names(model.cfg.num_classes, about)[int(classes[0])]
    how = "hidden in every block, as in training" if trained else "hidden here; this run trains with all keys visible"
    found["about"] = (
        f"Picture {wanted.picture} of {Path(shards).name} (class {label}), {which}, mean of the heads. "
        f"{len(found['hidden'])} of {len(hidden) - 1} keys are {how}."
    )
    found["trained"] = trained
    run.attention = found | {"block": block, "picture": decoded(cfg, folder, wanted, codes[0], device)}


def centre_codes(shards: str, cfg: RunConfig, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (B, T) and classes (B,) of the centre crops of picture ``first`` and those after it."""
    import numpy as np
    import torch

    from megastar.data.shards.reader import ShardSet

    tokens = ShardSet(shards, data=replace(cfg.data, patience=PATIENCE))
    if first >= len(tokens):
        raise UserError(f"--picture {first}: {shards} holds {len(tokens)}, numbered from 0")
    chosen = np.arange(first, min(len(tokens), first + ATTENDED))
    codes, labels = tokens.gather(chosen, np.full((len(chosen), 1), tokens.manifest.centre_view))
    return torch.from_numpy(codes[:, 0].astype(np.int64)), torch.from_numpy(np.asarray(labels, np.int64))


def decoded(cfg: RunConfig, folder: Path, wanted: Wanted, codes: torch.Tensor, device: torch.device) -> str:
    """The picture of codes (T,), or an empty one where the tokenizer is not known."""
    from PIL import Image

    from megastar.sampling.sampler import decode_images
    from megastar.tokenizer.io import load_tokenizer

    try:
        vq = load_tokenizer(tokenizer_of(cfg, folder, wanted), device)
    except UserError:
        return embedded(Image.new("RGB", (8, 8), "white"))
    return embedded(Image.fromarray(decode_images(vq, codes[None])[0]), lossless=True)
