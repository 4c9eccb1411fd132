"""The real set of a score: ADM's VIRTUAL_*.npz, published mu and sigma, a folder, tars, or decoded token shards."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector, collect
from megastar.evaluation.features import Network
from megastar.evaluation.frechet import Statistics
from megastar.evaluation.image_sources import NPZ_NAMES, ImageSource, check_applicable, npz_names, open_images
from megastar.evaluation.inception import POOL, SPATIAL
from megastar.evaluation.options import EvaluationOptions
from megastar.utils.files import atomic_file, sha256
from megastar.utils.json_file import shown
from megastar.utils.npz import NpzFile
from megastar.utils.printable import one_line
from megastar.utils.weights.safetensors_header import read_header

logger = logging.getLogger(__name__)
HASH = "sha256"  # of the arrays, in the metadata of a cache


@dataclass
class Reference:
    """What scores require from the real set. ``count``: the images that were read; 0 for published moments."""

    stats: Statistics
    spatial: Statistics | None
    features: np.ndarray | None
    count: int
    metadata: dict[str, Any]
    published: bool = False


def read_reference(
    real: str | Path,
    size: int | None,
    network: Network,
    o: EvaluationOptions,
    *,
    keep: bool,
    spatial: bool,
    limit: int | None = None,
) -> Reference:
    """Statistics (and features, ``keep``) of the real set at the generated images' ``size``.

    For FID and sFID, the published mu and sigma (mu_s and sigma_s) of an .npz are used, as in ADM's evaluator; its images
    are then read only for precision, recall and KID. Otherwise the results are cached in ``o.cache`` (default
    ``$MEGASTAR_CACHE`` or ~/.cache/megastar) under the hash of their source. Raises ``UserError``.
    """
    check_applicable(real, o.real_subset, o.real_tokenizer)
    names = npz_names(Path(real)) if Path(real).suffix == ".npz" else []
    published = "mu" in names and network.key.startswith("inception")
    if "mu" in names and not published and not set(names) & set(NPZ_NAMES):
        raise UserError(f"{real} contains only Inception's statistics: pass --inception FILE, or use images")
    images: ImageSource | None = None
    if not names or set(names) & set(NPZ_NAMES):  # opened even if only mu and sigma are used, to check the resolution
        images = open_images(
            real,
            subset=o.real_subset,
            size=size,
            limit=limit,
            tokenizer=o.real_tokenizer,
            device=network.device,
            data=o.data,
        )
    elif keep:
        raise UserError(f"{real} contains only statistics: precision, recall and KID also require images (arr_0)")
    digest = images.sha256() if images else sha256(Path(real))
    if o.real_sha256 and digest != o.real_sha256.lower():
        raise UserError(f"--real {real} has the SHA-256 {digest}, not the expected {o.real_sha256}: download it again")
    metadata: dict[str, Any] = {"source": str(real), "subset": o.real_subset, "pictures": None, "size": size}
    metadata["sha256"] = digest
    if o.real_tokenizer is not None:
        metadata["tokenizer"] = str(o.real_tokenizer)
    collector = Collector(network, keep=keep, spatial=spatial and not published)
    if published:
        stats = _given(Path(real), "mu", "sigma", POOL)
        spatial_stats = _given(Path(real), "mu_s", "sigma_s", SPATIAL) if spatial else None
        if images is None:
            metadata["size"] = "not recorded in the file"
        elif keep:
            collect(collector, images.batches(o.batch), images.count, "real", o.console, o.on_batch)
        metadata["statistics"] = "mu and sigma of the file"
    else:
        assert images is not None
        contents = f"{'f' if keep else ''}{'s' if spatial else ''}-{limit or 'all'}"
        folder = Path(o.cache or os.environ.get("MEGASTAR_CACHE") or Path.home() / ".cache" / "megastar")
        file = folder / f"{network.key}-{size}-{digest[:32]}-{contents}.safetensors"
        if (resized := _restore(collector, file)) is None:
            collect(collector, images.batches(o.batch), images.count, "real", o.console, o.on_batch)
            resized = sum(images.resized.values())
            _save(file, collector.arrays() | {"resized": np.array([resized])})
        if resized:  # those of another size than the generated ones
            metadata["resized"] = resized
        stats, spatial_stats = collector.stats, collector.spatial_stats if spatial else None
    metadata["pictures"] = collector.count or None
    features = collector.features if keep else None
    return Reference(stats, spatial_stats, features, collector.count, metadata, published)


def _given(path: Path, mean: str, covariance: str, dim: int) -> Statistics:
    file = NpzFile(path)
    if not {mean, covariance} <= set(file.names()):
        raise UserError(f"{path} has no {mean} and {covariance}: use ADM's VIRTUAL_*.npz, or images, as the reference")
    heads = {name: file.header(name) for name in (mean, covariance)}
    if [h.shape for h in heads.values()] != [(dim,), (dim, dim)] or any(h.dtype.kind != "f" for h in heads.values()):
        found = ", ".join(f"{name} is {h.dtype} {shown(str(h.shape))}" for name, h in heads.items())
        raise UserError(f"{path}: {found}; expected floats ({dim},) and ({dim}, {dim})")
    m, c = (file.read(name) for name in heads)
    if not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise UserError(f"{path}: {mean} or {covariance} contains NaN or infinity: download it again")
    return Statistics.given(m, c)


def _restore(collector: Collector, file: Path) -> int | None:
    """Restore the cached features; the number of images that were resized, None without a cache or for a damaged one."""
    if not file.is_file():
        return None
    try:
        recorded = read_header(file)[0].get(HASH)
        arrays = load_file(file)
        if recorded != _hash(arrays):
            raise ValueError("its arrays differ from their hash" if recorded else "it records no hash of its arrays")
        collector.restore(arrays)
        return int(arrays["resized"].item())
    except (UserError, SafetensorError, KeyError, ValueError, OSError) as error:
        logger.warning("the cached features %s of the real set are computed again: %s", file, one_line(str(error)))
        with suppress(OSError):  # it is replaced
            file.unlink()
        return None


def _hash(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the names, types, shapes and bytes of ``arrays``."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the cache; a failure costs only time, so it is a warning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        with atomic_file(file) as temporary:
            save_file(arrays, temporary, {HASH: _hash(arrays)})
    except (OSError, SafetensorError) as error:  # the latter for a name that is not UTF-8
        logger.warning("cannot cache the features of the real set in %s: %s", file, error)
