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
from rich.console import Console
from rich.table import Table

import megastar
from megastar.data.files import write_atomic
from megastar.errors import UserError
from megastar.evaluation.collector import Collector, collect
from megastar.evaluation.features import Network, open_network
from megastar.evaluation.pictures import Pictures, open_pictures, to_pixels
from megastar.evaluation.reference import read_reference
from megastar.evaluation.scores import Settings, check_count, check_real, choose_metrics, compute, needs
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, tokenizer_hash
from megastar.tokenizer.losses import psnr
from megastar.tokenizer.train import to_images

# What the sampler must tell of generated pictures, and the names under which it may. A result lists what is missing.
WANTED = {
    "label_plan": ("label_plan",),
    "guidance": ("guidance", "cfg_scale"),
    "weights": ("weights",),
    "dtype": ("dtype",),
}


@dataclass(frozen=True)
class Options:
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

    ``known`` are ``Options``. Real pictures are cut to the generated ones' size. What a sampler wrote about an .npz, in
    a file of its name and .json, joins the provenance. Raises ``UserError``.
    """
    o, start = Options(**known), time.perf_counter()
    pictures = open_pictures(generated, subset=generated_subset, console=o.console)
    if pictures.height != pictures.width:
        raise UserError(
            f"{generated} holds {pictures.width} x {pictures.height} pixels: only square pictures are scored, cut them first"
        )
    network = o.network()
    metrics = choose_metrics(o.metrics, network)
    check_count(metrics, network, o.settings, pictures.count, generated)
    made = Collector(network, **needs(metrics, real=False))
    collect(made, pictures.batches(o.batch), pictures.count, "generated", o.console)
    about = {"source": str(generated), "subset": generated_subset, "pictures": made.count, "size": pictures.height}
    about |= {"sha256": pictures.sha256(), "classes": _class_counts(pictures)}
    told = _sidecar(Path(generated)) | dict(o.provenance)
    return _score(made, real, metrics, o, {"generated": about}, told, start)


def evaluate_collected(made: Collector, real: str | Path, **known: Any) -> dict[str, Any]:
    """Scores of pictures that a sampler has fed to a ``Collector``, on one rank, after ``made.finish(group)``.

    The collector must hold what ``needs(choose_metrics(metrics, network), real=False)`` says. ``known`` are
    ``Options``; those that name the network are not read.
    """
    o, start = Options(**known), time.perf_counter()
    metrics = choose_metrics(o.metrics, made.network)
    wanted = needs(metrics, real=False)
    assert made.keep >= wanted["keep"] and made.spatial >= wanted["spatial"], f"the collector lacks {wanted}"
    about = {"source": "drawn while scoring", "pictures": made.count, "size": made.side}
    return _score(made, real, metrics, o, {"generated": about}, dict(o.provenance), start)


def evaluate_reconstruction(
    tokenizer: str | Path, real: str | Path, *, limit: int | None = None, **known: Any
) -> dict[str, Any]:
    """PSNR (dB, mean over pictures) and scores of a tokenizer's reconstructions of ``real``, in fp32.

    Take pictures that the tokenizer was not trained on. Also reports the share of the code book they use.
    """
    o, start = Options(**known), time.perf_counter()
    config, _ = read_tokenizer_metadata(tokenizer)
    pictures = open_pictures(real, subset=o.real_subset, size=config.image_size, limit=limit, console=o.console)
    network = o.network()
    metrics = choose_metrics(o.metrics, network)
    check_count(metrics, network, o.settings, pictures.count, real)
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
    return _score(made, real, metrics, o, about, dict(o.provenance), start, limit)


class Reconstructions:
    """What a tokenizer makes of pictures, batch by batch; PSNR before rounding, and the codes that were used."""

    def __init__(self, tokenizer: str | Path, pictures: Pictures, device: torch.device | str = "cpu"):
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


def _score(
    made: Collector,
    real: str | Path,
    metrics: Sequence[str],
    o: Options,
    about: dict[str, Any],
    provenance: dict[str, Any],
    start: float,
    limit: int | None = None,
) -> dict[str, Any]:
    check_count(metrics, made.network, o.settings, made.count, about.get("generated", {}).get("source", real))
    reference = read_reference(
        real, made.side, made.network, **needs(metrics, real=True), subset=o.real_subset, tokenizer=o.real_tokenizer,
        expected_sha256=o.real_sha256, limit=limit, batch=o.batch, console=o.console, cache=o.cache,
    )  # fmt: skip
    check_real(metrics, made.network, o.settings, reference)
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
    """SAMPLES.npz.json, where the sampler says how it drew."""
    file = generated.with_name(generated.name + ".json")
    return read_provenance(file) if generated.suffix in (".npz", ".tar") and file.is_file() else {}


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
    return [what for what, names in WANTED.items() if not any(provenance.get(n) is not None for n in names)]


def _class_counts(pictures: Pictures) -> dict[str, int] | None:
    labels = pictures.labels()
    if labels is None or not len(labels):
        return None
    counts = np.unique(labels, return_counts=True)[1]
    return {"classes": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}


def _versions() -> dict[str, str]:
    out = {"megastar": getattr(megastar, "__version__", "unknown"), "python": platform.python_version()}
    for package in ("torch", "numpy", "pillow"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "unknown"
    return out | {"torch": torch.__version__}
