"""Scores of generated images and of the tokenizer's reconstructions: one JSON with everything needed to reproduce it."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector, collect
from megastar.evaluation.features import Network, open_network
from megastar.evaluation.image_sources import ImageSource, open_images, sizes_of
from megastar.evaluation.options import EvaluationOptions
from megastar.evaluation.published import beside
from megastar.evaluation.reference import Reference, read_reference
from megastar.evaluation.scores import check_count, check_real, choose_metrics, compute, needs
from megastar.sampling.distributed import SamplingPipeline, iterate_images
from megastar.sampling.npz import record_of
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, tokenizer_hash
from megastar.tokenizer.losses import psnr
from megastar.tokenizer.scores import summary_of
from megastar.tokenizer.vq import to_images, to_pixels
from megastar.utils.files import write_output
from megastar.utils.json_file import ANY, dict_of, read_json, shown, text, validator
from megastar.version import __version__

logger = logging.getLogger(__name__)
SAMPLED = "drawn while scoring"  # a result's source without a file
# Provenance that generated images should have, under the sampler's names. A result lists what is missing.
_PROVENANCE = validator(dict_of(text(1000), ANY))
EXPECTED = ("label_plan", "cfg_scale", "weights", "dtype", "seed")


def evaluate(
    generated: str | Path, real: str | Path, *, generated_subset: str | None = None, **options: Any
) -> dict[str, Any]:
    """Scores of ``generated`` against ``real`` (folders, image tars, .npz; ``real`` also token shards).

    ``options`` are the fields of ``EvaluationOptions``. Real images are cropped to the generated ones' size. The record
    that a sampler wrote beside an .npz (NAME.npz.json) becomes part of the provenance. Raises ``UserError``.
    """
    o, start = EvaluationOptions(**options), time.perf_counter()
    images, provenance = open_generated(generated, generated_subset)
    metrics, made = _prepare(o, images.count, generated)
    reference = _reference(real, images.height, metrics, made.network, o)
    collect(made, images.batches(o.batch), images.count, "generated", o.console)
    summary = {"generated": describe_images(generated, generated_subset, images, made.count)}
    return _score(made, reference, metrics, o, summary, provenance | dict(o.provenance), start)


def open_generated(path: str | Path, subset: str | None) -> tuple[ImageSource, dict[str, Any]]:
    """Generated images, and the record that a sampler wrote beside them. Raises ``UserError`` for images that are not square,
    and for a record of another number of images."""
    images = open_images(path, subset=subset)
    if images.height != images.width:
        raise UserError(f"{path}: images of {images.width} x {images.height} pixels; crop them to squares first")
    provenance = _read_record(Path(path))
    if provenance.get("count", images.count) != images.count:
        raise UserError(
            f"{record_of(Path(path))} records {shown(provenance['count'])} images, but {path} contains {images.count}: "
            "remove the wrong file"
        )
    return images, provenance


def describe_images(source: str | Path, subset: str | None, images: ImageSource, count: int) -> dict[str, Any]:
    """What a result records of images of which ``count`` were read."""
    out: dict[str, Any] = {"source": str(source), "subset": subset, "pictures": count, "size": images.height}
    out |= {"sha256": images.sha256(), "classes": _class_counts(images.labels())}
    return out | ({"resized": dict(images.resized)} if images.resized else {})


def evaluate_collected(made: Collector, real: str | Path, **options: Any) -> dict[str, Any]:
    """Scores of the images that a sampler fed to a ``Collector``, on one rank, after ``made.finish(group)``.

    The collector must have the properties ``needs(choose_metrics(metrics, network), real=False)``. ``options`` are the
    fields of ``EvaluationOptions``; those of the network are ignored.
    """
    o, start = EvaluationOptions(**options), time.perf_counter()
    metrics = choose_metrics(o.metrics, made.network)
    required = needs(metrics, real=False)
    assert made.keep >= required["keep"] and made.spatial >= required["spatial"], f"the collector must have {required}"
    check_count(metrics, made.network, o.settings, made.count, SAMPLED)
    reference = _reference(real, made.side, metrics, made.network, o)
    summary = {"source": SAMPLED, "pictures": made.count, "size": made.side}
    return _score(made, reference, metrics, o, {"generated": summary}, dict(o.provenance), start)


def sample_and_evaluate(
    pipeline: SamplingPipeline,
    real: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    group: dist.ProcessGroup | None = None,
    folder: Path | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Sample a plan's images and score them without writing them. All ranks of ``group`` call it; the result is rank 0's.

    Finished parts in ``folder`` are read instead of sampled. ``options`` are the fields of ``EvaluationOptions``, equal on
    all ranks. Statistics are reduced in float64 over ``group``, which must support CPU tensors. Errors of the request
    and of the real set are raised before the first image is sampled. Raises ``UserError``.
    """
    o, start = EvaluationOptions(**options), time.perf_counter()
    count, size = pipeline.shape[:2]
    metrics, made = _prepare(o, count, "the request")
    reference = _reference(real, size, metrics, made.network, o) if rank == 0 else None
    for ids, pixels in iterate_images(pipeline, rank=rank, world=world, folder=folder, console=o.console):
        made.update(pixels, ids)
    made.finish(group)
    if reference is None:
        return None
    assert made.count == count, (made.count, count)
    classes = _class_counts(np.asarray(pipeline.labels))
    summary = {"source": SAMPLED, "pictures": count, "size": size, "classes": classes, "processes": world}
    provenance = pipeline.identity() | dict(o.provenance)
    return _score(made, reference, metrics, o, {"generated": summary}, provenance, start)


def evaluate_reconstruction(
    tokenizer: str | Path, real: str | Path, *, limit: int | None = None, **options: Any
) -> dict[str, Any]:
    """PSNR (dB, mean over images) and scores of a tokenizer's reconstructions of ``real``, in fp32.

    Use images that are not in the tokenizer's training set. Also reports the share of the codebook that they use.
    """
    o, start = EvaluationOptions(**options), time.perf_counter()
    config, _ = read_tokenizer_metadata(tokenizer)
    images = open_images(
        real,
        subset=o.real_subset,
        size=config.image_size,
        limit=limit,
        tokenizer=o.real_tokenizer,
        device=o.device,
        data=o.data,
    )
    metrics, made = _prepare(o, images.count, real)
    reference = _reference(real, config.image_size, metrics, made.network, o, limit)
    reconstructions = Reconstructions(tokenizer, images, o.device)
    collect(made, reconstructions.batches(o.batch), images.count, "reconstructions", o.console)
    summary: dict[str, Any] = {**summary_of(torch.cat(reconstructions.ratios), reconstructions.uses)}
    summary["tokenizer"] = {"source": str(tokenizer), "sha256": tokenizer_hash(tokenizer)}
    return _score(made, reference, metrics, o, summary, dict(o.provenance), start)


class Reconstructions:
    """A tokenizer's reconstructions of images, in batches; their PSNR before rounding, and the codes that were used."""

    def __init__(self, tokenizer: str | Path, source: ImageSource, device: torch.device | str = "cpu"):
        self.model, self.source, self.device = load_tokenizer(tokenizer, device), source, device
        self.ratios: list[torch.Tensor] = []
        self.uses = torch.zeros(self.model.config.codebook_size, dtype=torch.long)

    @torch.no_grad()
    def batches(self, batch: int) -> Iterator[np.ndarray]:
        for pixels in self.source.batches(batch):
            images = to_images(torch.from_numpy(np.array(pixels)), self.device)
            codes = self.model.encode(images)
            self.uses += torch.bincount(codes.flatten().cpu(), minlength=len(self.uses))
            decoded = self.model.decode_codes(codes)
            self.ratios.append(psnr(images, decoded).double().cpu())
            yield to_pixels(decoded)


def _prepare(o: EvaluationOptions, count: int, source: object) -> tuple[Sequence[str], Collector]:
    """The metrics, and a collector for ``count`` images of ``source``."""
    network = open_network(
        o.features, o.device, inception=o.inception, inception_sha256=o.inception_sha256, dinov2=o.dinov2
    )
    metrics = choose_metrics(o.metrics, network)
    check_count(metrics, network, o.settings, count, source)
    return metrics, Collector(network, **needs(metrics, real=False))


def _reference(
    real: str | Path,
    size: int,
    metrics: Sequence[str],
    network: Network,
    o: EvaluationOptions,
    limit: int | None = None,
) -> Reference:
    """The real set, read and checked before the generated one."""
    reference = read_reference(real, size, network, o, **needs(metrics, real=True), limit=limit)
    check_real(metrics, network, o.settings, reference)
    return reference


def _score(
    made: Collector,
    reference: Reference,
    metrics: Sequence[str],
    o: EvaluationOptions,
    summary: dict[str, Any],
    provenance: dict[str, Any],
    start: float,
) -> dict[str, Any]:
    check_count(metrics, made.network, o.settings, made.count, summary.get("generated", {}).get("source", "images"))
    with o.console.status(f"computing {', '.join(metrics)}") if o.console is not None else nullcontext():
        scores, details, warnings = compute(made, reference, metrics, o.settings)
    warnings += list(resized_warnings(summary.get("generated", {}), reference.metadata))
    first = next(iter(scores))
    missing = [] if "tokenizer" in summary else not_recorded(provenance)
    result = {
        "metric": first,
        "value": scores[first],
        "scores": scores,
        **details,
        "warnings": warnings,
        **summary,
        "real": reference.metadata,
        "features": made.network.describe(),
        "settings": asdict(o.settings),
        "versions": package_versions(),
        "device": str(made.network.device),
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance,
        "not_recorded": missing,
    }
    if found := beside(result):
        result["published"] = found
    report(result, o, _show)
    return result


def not_recorded(provenance: Mapping[str, Any]) -> list[str]:
    """The fields of ``EXPECTED`` that the provenance of images lacks."""
    return [name for name in EXPECTED if provenance.get(name) is None]


def report(result: Mapping[str, Any], o: EvaluationOptions, show: Callable[[Mapping[str, Any], Console], None]) -> None:
    """Log a result's warnings, ``show`` it on the console, and write it to ``o.out``."""
    for warning in result["warnings"]:
        logger.warning(warning)
    if missing := result["not_recorded"]:
        logger.warning("provenance of the images is incomplete: %s (pass --provenance FILE)", ", ".join(missing))
    if o.console is not None:
        show(result, o.console)
    if o.out is not None:
        Path(o.out).parent.mkdir(parents=True, exist_ok=True)
        write_output(Path(o.out), (json.dumps(result, indent=2) + "\n").encode())


def resized_warnings(made: Mapping[str, Any], real: Mapping[str, Any], what: str = "generated") -> Iterator[str]:
    """Images that were not scored at their own size. ``what``: the kind of images that ``made`` describes."""
    if sizes := made.get("resized"):
        yield (
            f"{sum(sizes.values())} of {made['pictures']} {what} images were cropped and resized to {made['size']} x "
            f"{made['size']} pixels ({sizes_of(sizes)}): score images of one size"
        )
    if count := real.get("resized"):
        yield f"{count} of {real['pictures']} real images were cropped and resized to {real['size']} x {real['size']} pixels"


def _show(result: Mapping[str, Any], console: Console) -> None:
    table = Table("score", "value", "")
    if "psnr" in result:
        table.add_row("PSNR", f"{result['psnr']:.2f} dB", "mean over images")
    for name, value in result["scores"].items():
        deviation = result.get(f"{name}_std")
        note = f"standard deviation {deviation:.4g}" if deviation is not None else ""
        if "floor" in result and name == result["metric"]:
            note = f"floor {result['floor']:.2f}: {result['floor_meaning']}"
        table.add_row(name, f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}", note)
    console.print(table)
    for figure in result.get("published", []):
        scores = ", ".join(f"{name} {value:g}" for name, value in figure["scores"].items())
        differs = "; ".join(figure["differs"]) or "no known difference of the protocol"
        text = f"published: {scores} ({figure['figure']}; {figure['source']}). Here: {differs}"
        console.print(text, markup=False, highlight=False)


def _read_record(generated: Path) -> dict[str, Any]:
    """SAMPLES.npz.json, the sampler's record; a flat one of another program is accepted too."""
    file = record_of(generated)
    record = read_provenance(file) if generated.suffix in (".npz", ".tar") and file.is_file() else {}
    identity, metadata = record.get("identity"), record.get("about")
    return metadata | identity if isinstance(identity, dict) and isinstance(metadata, dict) else record


def read_provenance(file: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ``UserError``."""
    provenance: dict[str, Any] = read_json(Path(file), _PROVENANCE, "write a JSON object, or leave the file out")
    return provenance


def _class_counts(labels: np.ndarray | None) -> dict[str, int] | None:
    if labels is None or not len(labels):
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


def package_versions() -> dict[str, str]:
    ours = {"megastar": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return ours | {package: version(package) for package in ("numpy", "pillow")}
