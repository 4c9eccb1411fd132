"""What ``megastar report`` computes: sample grids of the kept checkpoints, attention of the newest one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.files import find_file
from megastar.config.schema import DataConfig, RunConfig
from megastar.errors import UserError
from megastar.report.page import Grid, ReportRun, embedded
from megastar.report.read_run import read_provenance
from megastar.run_dir.checkpoint_dir import MANIFEST, complete, latest, name_of, step_in
from megastar.run_dir.layout import CHECKPOINTS, CONFIG, SAMPLES
from megastar.utils.files import sha256

if TYPE_CHECKING:
    import torch
    from rich.console import Console

NAME = re.compile(r"step-([0-9]{8})\.png")
GRIDS = 24  # maximum of one run
CLASSES = 12  # maximum rows of a grid
SAMPLING = {"seed": 0, "cfg_scale": 3.0, "temperature": 0.9}  # as suggested for megastar sample
DISTANCE_IMAGES = 16  # images over which attention distances are averaged
MAP_BYTES = 3 << 20  # of all attention maps before compression
PATIENCE = 20.0  # seconds without data from s3:// before attention is given up


@dataclass(frozen=True)
class RenderOptions:
    """The options of the command; ``picture``: index of the image for attention maps."""

    weights: str
    tokenizer: str | None
    shards: str | None
    device: str
    per_class: int
    picture: int


def add_grids(
    run: ReportRun, cfg: RunConfig | None, folder: Path, options: RenderOptions, console: Console, *, draw: bool
) -> None:
    """Add the grids of RUN/samples to ``run``; with ``draw`` missing grids of checkpoints are sampled first."""
    if draw and cfg is not None:
        try:
            draw_missing(cfg, folder, options, console, run.name)
        except UserError as error:
            run.notes.append(f"samples: {' '.join(str(error).split())}")
    from megastar.data.images.image_files import open_image

    found = sorted((int(m[1]), p) for p in (folder / SAMPLES).glob("step-*.png") if (m := NAME.fullmatch(p.name)))
    for step, path in evenly_spaced(found, GRIDS):
        try:
            with open_image(path) as image:
                source = embedded(image)
        except Exception as error:  # Pillow raises a dozen types for broken files
            run.notes.append(f"samples: cannot read {path.name} ({error})")
            continue
        run.grids.append(Grid(step, source, grid_caption(read_provenance(path))))


def grid_caption(provenance: dict[str, Any]) -> str:
    """How a grid was made; empty without ``provenance``."""
    if isinstance(caption := provenance.get("caption"), str):  # reconstructions of a tokenizer
        return caption[:300]
    if "weights" not in provenance:
        return ""
    p, weights = provenance, "averaged" if provenance["weights"] == "ema" else provenance["weights"]
    return f"{weights} weights, guidance {p.get('cfg_scale', 1):g}, temperature {p.get('temperature', 1):g}"


def evenly_spaced(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` (2 or more) items, including the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def draw_missing(cfg: RunConfig, folder: Path, options: RenderOptions, console: Console, name: str) -> None:
    """Sample RUN/samples/step-*.png for the kept checkpoints, with the same classes and random numbers for each. PNGs
    without our metadata are kept. A run that trains no null class is sampled without guidance."""
    checkpoints = evenly_spaced(complete(folder / CHECKPOINTS), GRIDS)
    if not checkpoints:
        return
    tokenizer = find_tokenizer(cfg.data, folder, options)
    sampling = SAMPLING if cfg.model.class_dropout_prob else SAMPLING | {"cfg_scale": 1.0}
    common = sampling | {"weights": options.weights, "per_class": options.per_class}
    common |= {
        "classes": evenly_spaced(list(range(cfg.model.num_classes)), CLASSES),
        "tokenizer_sha256": sha256(tokenizer),
    }
    for checkpoint in checkpoints:
        out = folder / SAMPLES / f"{name_of(step_in(checkpoint))}.png"
        provenance = common | {"checkpoint": sha256(checkpoint / MANIFEST)}
        if out.is_file() and read_provenance(out) in ({}, provenance):
            continue
        console.print(f"{name}: samples of step {step_in(checkpoint)}", markup=False, highlight=False)
        draw_grid(checkpoint, tokenizer, out, provenance, options.device, console)


def draw_grid(
    checkpoint: Path, tokenizer: Path, out: Path, provenance: dict[str, Any], device: str, console: Console
) -> None:
    from megastar.checkpoint.find_weights import class_names, find_weights
    from megastar.sampling.grid import Block, image_grid, save_grid
    from megastar.sampling.pipeline import sample_images

    weights, columns = find_weights(checkpoint, provenance["weights"]), provenance["per_class"]
    labels = [c for c in provenance["classes"] for _ in range(columns)]
    images = sample_images(
        weights, tokenizer, labels, device=device, console=console, **{k: provenance[k] for k in SAMPLING}
    )
    names = class_names(weights.config.num_classes, weights.provenance)
    save_grid(image_grid([Block("", images, labels)], names, columns=columns), out, provenance)


def find_tokenizer(data: DataConfig, folder: Path, options: RenderOptions) -> Path:
    """The tokenizer of the run in ``folder``. Raises ``UserError`` if it is missing, or has another hash than the run's."""
    from megastar.checkpoint.find_tokenizer import check_identity
    from megastar.checkpoint.find_weights import find_weights
    from megastar.checkpoint.hub.download import local_tokenizer

    found = find_weights(folder, options.weights)
    named = find_file(data.tokenizer, folder / CONFIG) if data.tokenizer else None
    if found.identity:
        found.places.append(named)
        tokenizer = Path(found.tokenizer_file(options.tokenizer))
        check_identity(folder, found.identity, tokenizer)
        return tokenizer
    given = local_tokenizer(options.tokenizer) if options.tokenizer else data.tokenizer
    if not given:
        raise UserError("the run has no tokenizer: give one with --tokenizer")
    if (path := find_file(given, folder / CONFIG)) is None:
        raise UserError(f"the tokenizer {given} does not exist: give its location with --tokenizer")
    return path


def find_shards(data: DataConfig, folder: Path, options: RenderOptions) -> str:
    from megastar.data.storage.shard_info import MANIFEST as SHARDS
    from megastar.data.storage.store import is_remote

    names = [options.shards] if options.shards else [data.val_shards, data.shards]
    for name in filter(None, names):
        if is_remote(name):
            return name
        if (found := find_file(Path(name) / SHARDS, folder / CONFIG)) is not None:
            return str(found.parent)
    raise UserError(f"the token shards {' and '.join(filter(None, names))} do not exist: give a location with --shards")


def add_attention(
    run: ReportRun, cfg: RunConfig | None, folder: Path, options: RenderOptions, console: Console, *, blocks_for: int
) -> None:
    """Add attention distances and maps of the newest checkpoint to ``run``; ``blocks_for`` runs share ``MAP_BYTES``."""
    if cfg is None or latest(folder / CHECKPOINTS) is None:
        return
    try:
        with console.status(f"attention of {run.name}"):
            run.distances, run.attention = compute_attention(cfg, folder, options, MAP_BYTES // blocks_for)
    except UserError as error:
        run.notes.append(f"attention: {' '.join(str(error).split())}")


def compute_attention(
    cfg: RunConfig, folder: Path, options: RenderOptions, map_bytes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``ReportRun.distances`` and ``ReportRun.attention``. Raises ``UserError``."""
    from megastar.checkpoint.find_weights import check_codes, class_names, find_weights
    from megastar.model.masks import draw_hidden
    from megastar.report.attention import attention_distances, masked_attention, uniform_distance
    from megastar.utils.device import pick_device

    shards, device = find_shards(cfg.data, folder, options), pick_device(options.device)
    codes, labels = centre_codes(shards, cfg.data, options.picture)
    found = find_weights(folder, options.weights)
    check_codes(folder, found.identity, shards, replace(cfg.data, patience=PATIENCE))
    model, metadata = found.load(device), found.provenance
    if codes.shape[1] != model.cfg.image_tokens or int(codes.max()) >= model.cfg.vocab_size:
        raise UserError(f"the codes in {shards} do not fit this network: give its shards with --shards")
    tokens, classes = codes[:, :-1].to(device), labels.to(device)
    which = f"{'averaged' if options.weights == 'ema' else 'student'} weights of step {metadata['step']:,}"
    heads = attention_distances(model, classes, tokens)  # (L, H)
    distances = {
        "means": heads.mean(1).tolist(),
        "heads": heads.tolist(),
        "uniform": uniform_distance(model.cfg.grid, codes.shape[1]),
        "caption": f"All keys visible, {len(codes)} images of {Path(shards).name}, {which}",
    }
    ratio, trained = cfg.self_guided.mask_ratio, cfg.self_guided.enabled and cfg.self_guided.mask_ratio > 0
    hidden = draw_hidden(cfg.train.seed, [0], [options.picture], model.cfg.image_tokens, ratio if trained else 0.25)[0]
    most = max(2, map_bytes // (2 * hidden.numel() ** 2))
    block = min(cfg.self_guided.contrastive_block, model.cfg.n_layer)
    maps = masked_attention(model, int(classes[0]), tokens[0], hidden, most, block)
    label = class_names(model.cfg.num_classes, metadata)[int(classes[0])]
    how = "in every block, as in training" if trained else "here only; this run trains with all keys visible"
    maps["caption"] = (
        f"Image {options.picture} of {Path(shards).name} (class {label}), {which}, mean of the heads. "
        f"{len(maps['hidden'])} of {len(hidden) - 1} keys are hidden {how}."
    )
    image = decode_image(cfg.data, folder, options, codes[0], device)
    return distances, maps | {"trained": trained, "block": block, "image": image}


def centre_codes(shards: str, data: DataConfig, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (B, T) and classes (B,) of the centre crops of image ``first`` and the following ones."""
    import numpy as np
    import torch

    from megastar.data.shards.reader import ShardSet

    tokens = ShardSet(shards, data=replace(data, patience=PATIENCE))
    if first >= len(tokens):
        raise UserError(f"--picture {first}: {shards} contains {len(tokens)} images, numbered from 0")
    chosen = np.arange(first, min(len(tokens), first + DISTANCE_IMAGES))
    codes, labels = tokens.gather(chosen, np.full((len(chosen), 1), tokens.manifest.centre_view))
    return torch.from_numpy(codes[:, 0].astype(np.int64)), torch.from_numpy(np.asarray(labels, np.int64))


def decode_image(
    data: DataConfig, folder: Path, options: RenderOptions, codes: torch.Tensor, device: torch.device
) -> str:
    """The image of codes (T,), or a white one if the tokenizer is missing or another one; a note beside the samples says so."""
    from PIL import Image

    from megastar.sampling.sampler import decode_images
    from megastar.tokenizer.io import load_tokenizer

    try:
        vq = load_tokenizer(find_tokenizer(data, folder, options), device)
    except UserError:
        return embedded(Image.new("RGB", (8, 8), "white"))
    return embedded(Image.fromarray(decode_images(vq, codes[None])[0]), lossless=True)
