"""Scores that papers print for class-conditional ImageNet at 256 x 256, beside which a measured one is shown.

The figures are in published.json, with their sources; docs/published.md is made from it by ``markdown``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megastar.evaluation.protocol import (
    label_difference,
    not_recorded,
    sampling_differences,
    shape_of_guidance,
    training_differences,
)
from megastar.utils.json_file import (
    FLOAT,
    dict_of,
    integer,
    list_of,
    one_of,
    optional,
    read_json,
    record,
    text,
    validator,
)

FILE = Path(__file__).with_name("published.json")
METHODS = {
    "ar": "AR",
    "star": "ST-AR",
    "repa": "AR + REPA",
    "gear": "GEAR",
    "rar": "RAR",
}
NAMES = ("FID", "sFID", "IS", "precision", "recall")
IMAGENET = 1_281_167  # images of the training set: an epoch
SIZES = {(12, 768): "B", (24, 1024): "L", (36, 1280): "XL", (48, 1536): "XXL", (24, 3200): "3B"}  # (n_layer, dim)
_FILE = validator(
    record(
        {
            "reference": text(200),
            "image_size": integer(1, 4096),
            "figures": list_of(
                record(
                    {
                        "paper": text(100), "method": one_of(*METHODS), "size": text(20), "tokens": integer(1, 65536),
                        "epochs": optional(integer(1, 10_000)), "cfg_scale": optional(FLOAT), "samples": optional(integer(1)),
                        "scores": dict_of(one_of(*NAMES), FLOAT), "source": text(500), "note": text(500),
                    },
                    closed=True,
                )
            ),
        },
        closed=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Scores of one row of a table. ``epochs``, ``cfg_scale`` and ``samples`` are None where the source does not state them."""

    paper: str
    method: str
    size: str
    tokens: int
    epochs: int | None
    cfg_scale: float | None
    samples: int | None
    scores: Mapping[str, float]
    source: str
    note: str

    def describe(self) -> str:
        """``ST-AR's AR, B, 50 epochs, no guidance``"""
        epochs = "epochs not stated" if self.epochs is None else f"{self.epochs} epochs"
        return f"{METHODS[self.method]} {self.size} in {self.paper}, {epochs}, {guidance(self.cfg_scale)}"


def guidance(scale: float | None) -> str:
    return "guidance not stated" if scale is None else "no guidance" if scale == 1 else f"cfg_scale {scale:g}"


@cache
def load_published() -> tuple[str, int, tuple[Figure, ...]]:
    """The reference, the picture size and the figures of published.json."""
    content = read_json(FILE, _FILE)
    return content["reference"], content["image_size"], tuple(Figure(**row) for row in content["figures"])


@dataclass(frozen=True)
class Measured:
    """What is known of images that were scored; None: not recorded."""

    method: str
    size: str
    tokens: int | None
    epochs: float | None
    cfg_scale: float | None
    samples: int
    image_size: int
    reference: str  # empty: the published moments of ADM's file
    shape: str  # of guidance along the tokens; empty: the same for all
    provenance: Mapping[str, Any]
    trained: Mapping[str, Any]


def measured_of(result: Mapping[str, Any]) -> Measured | None:
    """From a result of ``evaluation.runner``; None for images whose provenance names no network of a published size, or one
    that was not trained on ImageNet's 1000 classes, or by another method than those of ``METHODS``."""
    made, provenance = result.get("generated"), result.get("provenance")
    if not isinstance(made, Mapping) or not isinstance(provenance, Mapping):
        return None
    model, trained = provenance.get("model"), provenance.get("trained")
    if not isinstance(model, Mapping) or not isinstance(trained, Mapping) or model.get("num_classes") != 1000:
        return None
    sizes = [_number(model.get(name)) for name in ("n_layer", "dim", "image_tokens")]
    size = SIZES.get((sizes[0], sizes[1]))  # type: ignore[arg-type]
    if size is None:
        return None
    method = trained.get("method", "star" if trained.get("self_guided") else "ar")  # older weights do not record it
    if not isinstance(method, str) or method not in METHODS:
        return None
    seen = _number(trained.get("images_seen"))
    real = result.get("real", {})
    published = real.get("statistics") is not None and "VIRTUAL_imagenet256" in str(real.get("source"))
    tokens = None if sizes[2] is None else int(sizes[2])
    return Measured(
        method=method,
        size=size,
        tokens=tokens,
        epochs=None if seen is None else seen / IMAGENET,
        cfg_scale=_number(provenance.get("cfg_scale")),
        samples=int(made.get("pictures") or 0),
        image_size=int(made.get("size") or 0),
        reference="" if published else str(real.get("source", "unknown")),
        shape=shape_of_guidance(provenance, tokens),
        provenance=provenance,
        trained=trained,
    )


def _number(value: Any) -> float | None:
    """A finite number of a file that another program may have written."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e15 < value < 1e15:
        return None
    return float(value)


def beside(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The published figures of the same method, size, epochs and guidance as a result with FID, and what differs otherwise.

    A result whose guidance changes along the tokens (``cfg_schedule``, ``cfg_interval``) does not match figures with constant guidance. A figure whose epochs or guidance are not stated, or not recorded for the result, is listed with that as a difference.
    """
    measured = measured_of(result)
    if measured is None or "FID" not in result.get("scores", {}):
        return []
    reference, side, figures = load_published()
    out = []
    for figure in figures:
        if (figure.method, figure.size) != (measured.method, measured.size) or _another(figure, measured):
            continue
        out.append(
            {
                "figure": figure.describe(),
                "scores": dict(figure.scores),
                "source": figure.source,
                "differs": list(_differences(figure, measured, reference, side)),
            }
        )
    return out


def _another(figure: Figure, m: Measured) -> bool:
    """Whether epochs, guidance or tokens are known on both sides and differ."""
    epochs = figure.epochs is not None and m.epochs is not None and abs(m.epochs / figure.epochs - 1) > 0.01
    scale = figure.cfg_scale is not None and m.cfg_scale is not None and not math.isclose(figure.cfg_scale, m.cfg_scale)
    shape = figure.cfg_scale not in (None, 1) and bool(m.shape)
    return epochs or scale or shape or (m.tokens is not None and m.tokens != figure.tokens)


def _differences(figure: Figure, m: Measured, reference: str, side: int) -> Iterator[str]:
    if figure.samples is None:
        yield f"{m.samples} samples, the paper's number was not verified"
    elif figure.samples != m.samples:
        yield f"{m.samples} samples instead of {figure.samples}"
    if m.epochs is None:
        yield f"the epochs of these weights are not recorded, the paper's are {figure.epochs}"
    elif figure.epochs is None:
        yield f"{m.epochs:.4g} epochs, the source does not state its own"
    if m.cfg_scale is None:
        yield f"the guidance of these samples is not recorded, the paper has {guidance(figure.cfg_scale)}"
    elif figure.cfg_scale is None:
        shape = f", {m.shape}" if m.shape and m.cfg_scale != 1 else ""
        yield f"{guidance(m.cfg_scale)}{shape}, the source does not state its own"
    if m.image_size != side:
        yield f"pictures of {m.image_size} x {m.image_size} instead of {side} x {side} pixels"
    if m.reference:
        yield f"the reference is {m.reference} instead of {reference}"
    yield from sampling_differences(m.provenance)
    yield from label_difference(m.provenance, figure.paper)
    yield from training_differences(m.trained, m.method, m.size)
    if missing := not_recorded(m.provenance, m.method, m.size):
        yield f"not recorded: {', '.join(missing)}"
    if figure.note:
        yield f"the paper: {figure.note}"


def markdown() -> str:
    """docs/published.md's table."""
    head = ["method", "size", "tokens", "epochs", "guidance", "samples", *NAMES, "paper", "note"]
    rows = [head]
    _, _, figures = load_published()
    for f in figures:
        scores = [f"{f.scores[n]:.2f}" if n in f.scores else "" for n in NAMES]
        counts = [
            str(f.epochs or "not stated"),
            guidance(f.cfg_scale),
            f"{f.samples:,}" if f.samples else "not verified",
        ]
        rows.append([METHODS[f.method], f.size, str(f.tokens), *counts, *scores, f"{f.paper}: {f.source}", f.note])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"
