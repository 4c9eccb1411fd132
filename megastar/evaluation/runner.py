"""Scores of generated pictures and of the tokenizer's reconstructions: one JSON with everything needed to repeat it."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import megastar
from megastar.errors import UserError
from megastar.evaluation.features import NAME, RECIPE, FeatureExtractor
from megastar.evaluation.frechet import finite_sample_floor, frechet_distance, statistics
from megastar.evaluation.pictures import load_images, source_hash
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, tokenizer_hash
from megastar.tokenizer.losses import psnr
from megastar.tokenizer.train import to_images

FEWEST = 5000  # below it the covariance of 1280 features is too noisy to compare with other papers' or runs' counts
FLOOR_SEED = 0


def evaluate(
    generated: str | Path,
    real: str | Path,
    *,
    out: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch: int = 32,
    console: Console | None = None,
    provenance: Mapping[str, Any] | None = None,
    generated_subset: str | None = None,
    real_subset: str | None = None,
    cache: str | Path | None = None,
) -> dict[str, Any]:
    """FD-EffLite0 of ``generated`` against ``real`` (folders, picture tars, .npz) with its finite-sample floor.

    Real pictures are cut to the generated ones' size. ``out`` is the JSON file to write; ``provenance`` goes into it
    (command, weights, seeds of the samples). Features of the real set are kept in ``cache`` (default
    ``$MEGASTAR_CACHE`` or ~/.cache/megastar) under the hash of their source. Raises ``UserError``.
    """
    start = time.perf_counter()
    images = load_images(generated, subset=generated_subset, console=console)
    _check_count(generated, len(images))
    height, width = images.shape[1:3]
    if height != width:
        raise UserError(f"{generated} holds {width} x {height} pixels: only square pictures are scored, cut them first")
    extract = FeatureExtractor(device)
    made = extract(images, batch, console, "generated")
    wanted, about_real = real_features(real, height, extract, real_subset, batch, console, cache)
    about_generated = {
        "source": str(generated),
        "subset": generated_subset,
        "pictures": len(images),
        "size": height,
        "sha256": source_hash(generated, subset=generated_subset),
    }
    result = _score(made, wanted) | {"generated": about_generated, "real": about_real}
    return _finish(result, extract, start, out, console, provenance)


def evaluate_reconstruction(
    tokenizer: str | Path,
    real: str | Path,
    *,
    out: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch: int = 32,
    console: Console | None = None,
    provenance: Mapping[str, Any] | None = None,
    real_subset: str | None = None,
    cache: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """PSNR (dB, mean over pictures) and FD-EffLite0 of a tokenizer's reconstructions of ``real``, in fp32.

    Take pictures that the tokenizer was not trained on. Also reports the share of the code book they use.
    """
    start = time.perf_counter()
    config, _ = read_tokenizer_metadata(tokenizer)
    images = load_images(real, subset=real_subset, size=config.image_size, limit=limit, console=console)
    _check_count(real, len(images))
    rebuilt, ratios, used = reconstruct(tokenizer, images, device, batch, console)
    extract = FeatureExtractor(device)
    made = extract(rebuilt, batch, console, "reconstructions")
    if limit is None:
        wanted, about_real = real_features(real, config.image_size, extract, real_subset, batch, console, cache)
    else:  # a part of the set has no place in the cache
        wanted = extract(images, batch, console, "real")
        about_real = _about(real, real_subset, len(images), config.image_size, source_hash(real, subset=real_subset))
    result = {
        "psnr": float(ratios.mean()),
        "psnr_of_mean": -10 * math.log10(float((10 ** (-ratios / 10)).mean())),
        "codes_used": used,
    }
    result |= _score(made, wanted)
    result |= {"tokenizer": {"source": str(tokenizer), "sha256": tokenizer_hash(tokenizer)}, "real": about_real}
    return _finish(result, extract, start, out, console, provenance)


@torch.no_grad()
def reconstruct(
    tokenizer: str | Path, images: np.ndarray, device: torch.device | str, batch: int, console: Console | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """uint8 (N, H, W, 3) -> reconstructions of the same kind, PSNR (N,) before rounding, share of codes used."""
    model = load_tokenizer(tokenizer, device)
    out, ratios = np.empty_like(images), np.empty(len(images))
    used = torch.zeros(model.config.codebook_size, dtype=torch.bool)
    columns = (TextColumn("reconstructions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task("", total=len(images))
        for first in range(0, len(images), batch):
            some = slice(first, first + batch)
            pictures = to_images(torch.from_numpy(images[some]), device)
            codes = model.encode(pictures)
            used[codes.flatten().cpu()] = True
            again = model.decode_codes(codes)
            ratios[some] = psnr(pictures, again).double().cpu().numpy()
            pixels = again.add(1).mul(127.5).round().clamp(0, 255).byte()
            out[some] = pixels.permute(0, 2, 3, 1).cpu().numpy()
            bar.advance(task, len(codes))
    return out, ratios, float(used.double().mean())


def real_features(
    real: str | Path,
    size: int,
    extract: FeatureExtractor,
    subset: str | None,
    batch: int,
    console: Console | None,
    cache: str | Path | None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Features (N, 1280) of the real pictures, read from the cache when their source has not changed, and their record."""
    digest = source_hash(real, subset=subset)
    file = _cache_folder(cache) / f"efflite0-{RECIPE}-{size}-{digest[:32]}.safetensors"
    features = None
    if file.is_file():
        try:
            features = load_file(file)["features"]
        except (SafetensorError, KeyError, OSError):
            file.unlink(missing_ok=True)  # a broken cache is made again
    if features is None:
        images = load_images(real, subset=subset, size=size, console=console)
        _check_count(real, len(images))
        features = extract(images, batch, console, "real")
        _keep(file, features, console)
    return features, _about(real, subset, len(features), size, digest)


def _about(source: str | Path, subset: str | None, count: int, size: int, digest: str) -> dict[str, Any]:
    return {"source": str(source), "subset": subset, "pictures": count, "size": size, "sha256": digest}


def _cache_folder(cache: str | Path | None) -> Path:
    return Path(cache or os.environ.get("MEGASTAR_CACHE") or Path.home() / ".cache" / "megastar")


def _keep(file: Path, features: np.ndarray, console: Console | None) -> None:
    """A cache that cannot be written costs time next time, never the score."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        save_file({"features": features}, temporary)
        temporary.replace(file)
    except OSError as error:
        if console is not None:
            console.print(f"features of the real set are not kept ({error})", markup=False)


def _check_count(source: str | Path, count: int) -> None:
    if count < 4:
        raise UserError(f"{source}: {count} pictures cannot be scored; {FEWEST} or more give a score worth reporting")


def _score(made: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    floor, half = finite_sample_floor(wanted, FLOOR_SEED)
    warnings = [
        f"only {len(x)} {name} pictures: below {FEWEST} the distance is biased upward, compare equal counts only"
        for name, x in (("scored", made), ("real", wanted))
        if len(x) < FEWEST
    ]
    return {
        "metric": NAME,
        "value": frechet_distance(statistics(made), statistics(wanted)),
        "floor": floor,
        "floor_meaning": f"{NAME} between two disjoint halves of the real set, {half} pictures each",
        "floor_seed": FLOOR_SEED,
        "warnings": warnings,
    }


def _finish(
    result: dict[str, Any],
    extract: FeatureExtractor,
    start: float,
    out: str | Path | None,
    console: Console | None,
    provenance: Mapping[str, Any] | None,
) -> dict[str, Any]:
    result["features"] = extract.describe()
    result["versions"] = {
        "megastar": getattr(megastar, "__version__", "unknown"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    result["device"] = str(extract.device)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["provenance"] = dict(provenance or {})
    if console is not None:
        for warning in result["warnings"]:
            console.print(f"[yellow]warning[/]: {warning}")
        first = f"PSNR {result['psnr']:.2f} dB, " if "psnr" in result else ""
        console.print(f"{first}{NAME} {result['value']:.2f} (floor {result['floor']:.2f}: {result['floor_meaning']})")
    if out is not None:
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(path)
    return result
