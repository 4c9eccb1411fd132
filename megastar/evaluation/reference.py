"""The real side of a score: ADM's VIRTUAL_*.npz, published mu and sigma, a folder, tars, or decoded token shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector, collect
from megastar.evaluation.features import Network
from megastar.evaluation.frechet import Statistics
from megastar.evaluation.image_sources import NPZ_NAMES, npz_names, open_pictures, read_arrays
from megastar.evaluation.inception import POOL, SPATIAL
from megastar.utils.files import sha256


@dataclass
class Reference:
    """What scores need of the real set. ``count``: the pictures that were read; published moments tell none."""

    stats: Statistics
    spatial: Statistics | None
    features: np.ndarray | None
    count: int
    about: dict[str, Any]
    published: bool = False


def read_reference(
    real: str | Path,
    size: int | None,
    network: Network,
    *,
    keep: bool,
    spatial: bool,
    subset: str | None = None,
    tokenizer: str | Path | None = None,
    expected_sha256: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    console: Console | None = None,
    cache: str | Path | None = None,
) -> Reference:
    """Statistics (and features, ``keep``) of the real set at the generated pictures' ``size``.

    An .npz with mu and sigma gives its own, published ones to FID (mu_s and sigma_s to sFID), as ADM's evaluator does;
    its pictures are then read for precision, recall and KID only. All others are kept in ``cache`` (default
    ``$MEGASTAR_CACHE`` or ~/.cache/megastar) under the hash of their source. Raises ``UserError``.
    """
    names = npz_names(Path(real)) if Path(real).suffix == ".npz" else []
    published = "mu" in names and network.key.startswith("inception")
    if "mu" in names and not published and not set(names) & set(NPZ_NAMES):
        raise UserError(f"{real} holds Inception's statistics only: --inception FILE is needed, or pictures")
    has_pictures = not names or bool(set(names) & set(NPZ_NAMES))
    if keep and not has_pictures:
        raise UserError(f"{real} holds statistics only; precision, recall and KID need its pictures (arr_0) too")
    pictures = None
    if has_pictures:  # opened even where only mu and sigma are used: their resolution must fit
        pictures = open_pictures(
            real, subset=subset, size=size, limit=limit, tokenizer=tokenizer, console=console
        )  # fmt: skip
    digest = pictures.sha256() if pictures else sha256(Path(real))
    if expected_sha256 and digest != expected_sha256.lower():
        raise UserError(f"--real {real} has the SHA-256 {digest}, not the {expected_sha256} you named: get it again")
    about = {"source": str(real), "subset": subset, "pictures": None, "size": size, "sha256": digest}
    if tokenizer is not None:
        about["tokenizer"] = str(tokenizer)
    if published:
        return _published(Path(real), pictures, network, keep, spatial, batch, console, about)
    assert pictures is not None
    done = Collector(network, keep=keep, spatial=spatial)
    needs = f"{'f' if keep else ''}{'s' if spatial else ''}-{limit or 'all'}"
    file = _cache_folder(cache) / f"{network.key}-{size}-{digest[:32]}-{needs}.safetensors"
    if not _restore(done, file):
        collect(done, pictures.batches(batch), pictures.count, "real", console)
        _keep(file, done.arrays(), console)
    about["pictures"] = done.count
    spatial_stats = done.spatial_stats if spatial else None
    return Reference(done.stats, spatial_stats, done.features if keep else None, done.count, about)


def _published(real, pictures, network, keep, spatial, batch, console, about) -> Reference:
    """Statistics out of the file; features of its pictures."""
    stats = _given(real, "mu", "sigma", POOL)
    spatial_stats = _given(real, "mu_s", "sigma_s", SPATIAL) if spatial else None
    features, count = None, 0
    if keep:
        done = collect(Collector(network, keep=True), pictures.batches(batch), pictures.count, "real", console)
        features, count = done.features, done.count
    about |= {"statistics": "mu and sigma of the file", "pictures": count or None}
    if pictures is None:
        about["size"] = "not told by the file"
    return Reference(stats, spatial_stats, features, count, about, published=True)


def _given(path: Path, mean: str, covariance: str, dim: int) -> Statistics:
    found = read_arrays(path, [mean, covariance])
    if len(found) < 2:
        raise UserError(
            f"{path} has no {mean} and {covariance}: take ADM's VIRTUAL_*.npz, or pictures, as the reference"
        )
    m, c = found[mean], found[covariance]
    if m.shape != (dim,) or c.shape != (dim, dim) or m.dtype.kind != "f" or c.dtype.kind != "f":
        raise UserError(
            f"{path}: {mean} is {m.dtype} {m.shape}, {covariance} {c.dtype} {c.shape}; expected floats ({dim},) and "
            f"({dim}, {dim})"
        )
    if not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise UserError(f"{path}: {mean} or {covariance} holds NaN or infinity: get it again")
    return Statistics.given(m, c)


def _cache_folder(cache: str | Path | None) -> Path:
    return Path(cache or os.environ.get("MEGASTAR_CACHE") or Path.home() / ".cache" / "megastar")


def _restore(collector: Collector, file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        collector.restore(load_file(file))
        return True
    except (SafetensorError, KeyError, OSError):
        file.unlink(missing_ok=True)  # a broken cache is made again
        return False


def _keep(file: Path, arrays: dict[str, np.ndarray], console: Console | None) -> None:
    """A cache that cannot be written costs time next time, never the score."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
        temporary.replace(file)
    except OSError as error:
        if console is not None:
            console.print(f"features of the real set are not kept ({error})", markup=False)
