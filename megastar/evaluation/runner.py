"""Scores of generated pictures and of the tokenizer's reconstructions: one JSON with everything needed to repeat it."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
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
from megastar.evaluation.image_sources import ImageSource, open_pictures, to_pixels
from megastar.evaluation.reference import Reference, read_reference
from megastar.evaluation.scores import Settings, check_count, check_real, choose_metrics, compute, needs
from megastar.sampling.distributed import SamplingPipeline, iterate_images
from megastar.sampling.npz import record_of
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, tokenizer_hash
from megastar.tokenizer.losses import psnr
from megastar.tokenizer.train import to_images
from megastar.utils.files import write_atomic
from megastar.version import __version__

# What the sampler must tell of generated pictures, under its own names. A result lists what is missing.
DRAWN = "drawn while scoring"
WANTED = ("label_plan", "cfg_scale", "weights", "dtype", "seed")


@dataclass(frozen=True)
class EvaluationOptions:
    """How to score; the same for pictures from files, from a sampler and from a tokenizer."""

    metrics: Sequence[str] | None = None
    features: str = "efflite0"
    inception: str | Path | None = None
    inception_sha256: str | None = None
    real_subset: str | None = None
    real_sha256: str | None = None
    real_tokenizer: str | Path | None = None
    settings: Settings = field(default_factory=Settings)
    device: torch.device | str = "cpu"
    batch: int = 32
    cache: str | Path | None = None
    out: str | Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    console: Console | None = None

    def network(self) -> Network:
        return open_network(
            self.features, self.device, inception=self.inception, inception_sha256=self.inception_sha256
        )  # fmt: skip


def evaluate(
    generated: str | Path, real: str | Path, *, generated_subset: str | None = None, **known: Any
) -> dict[str, Any]:
    """Scores of ``generated`` against ``real`` (folders, picture tars, .npz; ``real`` also token shards).

    ``known`` are ``EvaluationOptions``. Real pictures are cut to the generated ones' size. What a sampler wrote about an .npz, in
    a file of its name and .json, joins the provenance. Raises ``UserError``.
    """
    o, start = EvaluationOptions(**known), time.perf_counter()
    pictures = open_pictures(generated, subset=generated_subset, console=o.console)
    if pictures.height != pictures.width:
        raise UserError(
            f"{generated} holds {pictures.width} x {pictures.height} pixels: only square pictures are scored, cut them first"
        )
    network = o.network()
    metrics = choose_metrics(o.metrics, network)
    check_count(metrics, network, o.settings, pictures.count, generated)
    told = _sidecar(Path(generated))
    if told.get("count", pictures.count) != pictures.count:
        raise UserError(
            f"{record_of(Path(generated))} is of {told['count']} pictures, {generated} holds {pictures.count}: remove the one "
            "that is not of the other"
        )
    told |= dict(o.provenance)
    reference = _reference(real, pictures.height, metrics, network, o)
    made = Collector(network, **needs(metrics, real=False))
    collect(made, pictures.batches(o.batch), pictures.count, "generated", o.console)
    about = {"source": str(generated), "subset": generated_subset, "pictures": made.count, "size": pictures.height}
    about |= {"sha256": pictures.sha256(), "classes": _class_counts(pictures.labels())}
    return _score(made, reference, metrics, o, {"generated": about}, told, start)


def evaluate_collected(made: Collector, real: str | Path, **known: Any) -> dict[str, Any]:
    """Scores of pictures that a sampler has fed to a ``Collector``, on one rank, after ``made.finish(group)``.

    The collector must hold what ``needs(choose_metrics(metrics, network), real=False)`` says. ``known`` are
    ``EvaluationOptions``; those that name the network are not read.
    """
    o, start = EvaluationOptions(**known), time.perf_counter()
    metrics = choose_metrics(o.metrics, made.network)
    wanted = needs(metrics, real=False)
    assert made.keep >= wanted["keep"] and made.spatial >= wanted["spatial"], f"the collector lacks {wanted}"
    about = {"source": DRAWN, "pictures": made.count, "size": made.side}
    check_count(metrics, made.network, o.settings, made.count, DRAWN)
    reference = _reference(real, made.side, metrics, made.network, o)
    return _score(made, reference, metrics, o, {"generated": about}, dict(o.provenance), start)


def evaluate_drawn(
    painter: SamplingPipeline,
    real: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    group: dist.ProcessGroup | None = None,
    folder: Path | None = None,
    **known: Any,
) -> dict[str, Any] | None:
    """Draw a plan's pictures and score them on the way: none is written. All ranks of ``group`` call it; rank 0's result.

    Finished parts in ``folder`` are read instead of drawn. ``known`` are ``EvaluationOptions``, equal on all ranks; the networks
    are on the options' device, statistics meet in float64 over ``group``, which must take tensors of the CPU. Whatever
    is wrong with the request or the real set is said before the first picture is drawn. Raises ``UserError``.
    """
    o, start = EvaluationOptions(**known), time.perf_counter()
    network = o.network()
    metrics = choose_metrics(o.metrics, network)
    count, size = painter.shape[:2]
    check_count(metrics, network, o.settings, count, "the request")
    reference = _reference(real, size, metrics, network, o) if rank == 0 else None
    made = Collector(network, **needs(metrics, real=False))
    for ids, pixels in iterate_images(painter, rank=rank, world=world, folder=folder, console=o.console):
        made.update(pixels, ids)
    made.finish(group)
    if reference is None:
        return None
    assert made.count == count, (made.count, count)
    classes = _class_counts(np.asarray(painter.labels))
    about = {"source": DRAWN, "pictures": count, "size": size, "classes": classes, "processes": world}
    return _score(made, reference, metrics, o, {"generated": about}, painter.identity() | dict(o.provenance), start)


def evaluate_reconstruction(
    tokenizer: str | Path, real: str | Path, *, limit: int | None = None, **known: Any
) -> dict[str, Any]:
    """PSNR (dB, mean over pictures) and scores of a tokenizer's reconstructions of ``real``, in fp32.

    Take pictures that the tokenizer was not trained on. Also reports the share of the code book they use.
    """
    o, start = EvaluationOptions(**known), time.perf_counter()
    config, _ = read_tokenizer_metadata(tokenizer)
    pictures = open_pictures(real, subset=o.real_subset, size=config.image_size, limit=limit, console=o.console)
    network = o.network()
    metrics = choose_metrics(o.metrics, network)
    check_count(metrics, network, o.settings, pictures.count, real)
    reference = _reference(real, config.image_size, metrics, network, o, limit)
    rebuilt = Reconstructions(tokenizer, pictures, o.device)
    made = Collector(network, **needs(metrics, real=False))
    collect(made, rebuilt.batches(o.batch), pictures.count, "reconstructions", o.console)
    ratios = np.concatenate(rebuilt.ratios)
    about = {
        "psnr": float(ratios.mean()),
        "psnr_of_mean": -10 * math.log10(float((10 ** (-ratios / 10)).mean())),
        "codes_used": float(rebuilt.used.double().mean()),
        "tokenizer": {"source": str(tokenizer), "sha256": tokenizer_hash(tokenizer)},
    }
    return _score(made, reference, metrics, o, about, dict(o.provenance), start)


class Reconstructions:
    """What a tokenizer makes of pictures, batch by batch; PSNR before rounding, and the codes that were used."""

    def __init__(self, tokenizer: str | Path, pictures: ImageSource, device: torch.device | str = "cpu"):
        self.model, self.pictures, self.device = load_tokenizer(tokenizer, device), pictures, device
        self.ratios: list[np.ndarray] = []
        self.used = torch.zeros(self.model.config.codebook_size, dtype=torch.bool)

    @torch.no_grad()
    def batches(self, batch: int) -> Iterator[np.ndarray]:
        for some in self.pictures.batches(batch):
            images = to_images(torch.from_numpy(np.array(some)), self.device)
            codes = self.model.encode(images)
            self.used[codes.flatten().cpu()] = True
            again = self.model.decode_codes(codes)
            self.ratios.append(psnr(images, again).double().cpu().numpy())
            yield to_pixels(again)


def _reference(
    real: str | Path,
    size: int,
    metrics: Sequence[str],
    network: Network,
    o: EvaluationOptions,
    limit: int | None = None,
) -> Reference:
    """The real set, before any time goes into the generated one."""
    reference = read_reference(
        real, size, network, **needs(metrics, real=True), subset=o.real_subset, tokenizer=o.real_tokenizer,
        expected_sha256=o.real_sha256, limit=limit, batch=o.batch, console=o.console, cache=o.cache,
    )  # fmt: skip
    check_real(metrics, network, o.settings, reference)
    return reference


def _score(
    made: Collector,
    reference: Reference,
    metrics: Sequence[str],
    o: EvaluationOptions,
    about: dict[str, Any],
    provenance: dict[str, Any],
    start: float,
) -> dict[str, Any]:
    check_count(metrics, made.network, o.settings, made.count, about.get("generated", {}).get("source", "pictures"))
    with o.console.status(f"computing {', '.join(metrics)}") if o.console is not None else nullcontext():
        scores, details, warnings = compute(made, reference, metrics, o.settings)
    first = next(iter(scores))
    result = {"metric": first, "value": scores[first], "scores": scores, **details, "warnings": warnings, **about}
    result |= {"real": reference.about, "features": made.network.describe(), "settings": asdict(o.settings)}
    result |= {
        "versions": _versions(),
        "device": str(made.network.device),
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance,
        "not_recorded": [] if "tokenizer" in about else _missing(provenance),
    }
    if o.console is not None:
        _show(result, o.console)
    if o.out is not None:
        Path(o.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(o.out), (json.dumps(result, indent=2) + "\n").encode())
    return result


def _show(result: dict[str, Any], console: Console) -> None:
    for warning in result["warnings"]:
        console.print(f"[yellow]warning[/]: {warning}")
    if result["not_recorded"]:
        missing = ", ".join(result["not_recorded"])
        console.print(f"[yellow]not recorded[/] by whoever drew these pictures: {missing} (--provenance FILE tells it)")
    table = Table("score", "value", "")
    if "psnr" in result:
        table.add_row("PSNR", f"{result['psnr']:.2f} dB", "mean over pictures")
    for name, value in result["scores"].items():
        spread = result.get(f"{name}_std")
        note = f"standard deviation {spread:.4g}" if spread is not None else ""
        if "floor" in result and name == result["metric"]:
            note = f"floor {result['floor']:.2f}: {result['floor_meaning']}"
        table.add_row(name, f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}", note)
    console.print(table)


def _sidecar(generated: Path) -> dict[str, Any]:
    """SAMPLES.npz.json, where the sampler says how it drew; other programs may write a flat one."""
    file = record_of(generated)
    told = read_provenance(file) if generated.suffix in (".npz", ".tar") and file.is_file() else {}
    if isinstance(told.get("identity"), dict) and isinstance(told.get("about"), dict):
        return told["about"] | told["identity"]
    return told


def read_provenance(file: str | Path) -> dict[str, Any]:
    """A JSON object. Raises ``UserError``."""
    try:
        told = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"provenance {file} cannot be read ({error}): expected a JSON object") from error
    if not isinstance(told, dict):
        raise UserError(f"provenance {file} holds a {type(told).__name__}: expected a JSON object")
    return told


def _missing(provenance: Mapping[str, Any]) -> list[str]:
    return [name for name in WANTED if provenance.get(name) is None]


def _class_counts(labels: np.ndarray | None) -> dict[str, int] | None:
    if labels is None or not len(labels):
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


def _versions() -> dict[str, str]:
    out = {"megastar": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "pillow"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "unknown"
    return out | {"torch": torch.__version__}
