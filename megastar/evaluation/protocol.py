"""What the provenance of images records of their sampling and training, beside the protocol of the published figures.

The protocol: temperature 1, all codes, guidance that is equal for all tokens, averaged weights, and ST-AR's losses as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from megastar.config.sections.repa import RepaConfig
from megastar.config.sections.self_guided import SelfGuidedConfig
from megastar.sampling.options import SamplingOptions
from megastar.utils.json_file import shown

USUAL = SamplingOptions()
DRAWN = ("temperature", "top_k", "top_p")
SHAPE = ("cfg_schedule", "cfg_interval")  # of guidance along the tokens
LABEL_PLANS = {"LlamaGen": "random"}  # paper -> how its classes were chosen; others do not state it
BLOCKS = {"B": 6, "L": 18, "XL": 18}  # contrastive_block [P]
OBJECTIVE = (
    "views",
    "mask_ratio",
    "alpha",
    "beta",
    "positions",
    "step_loss",
    "view_loss",
    "teacher_decay",
)  # of ST-AR [P]
ENCODER, ALIGNED = "dinov2", {"B": 4, "L": 8, "XL": 12}  # of the figures with REPA [L: LlamaGen-REPA]
TRAINING = "the crops and losses of the training"


def shape_of_guidance(provenance: Mapping[str, Any], tokens: int | None) -> str:
    """``cfg_schedule linear, cfg_interval 100`` where these change the guidance of some tokens; else empty."""
    found = {name: provenance.get(name) for name in SHAPE}
    if tokens is not None and _is_number(found["cfg_interval"]) and found["cfg_interval"] >= tokens - 2:
        found["cfg_interval"] = -1  # it counts the tokens after the first
    return ", ".join(f"{n} {shown(v)}" for n, v in found.items() if v is not None and not _equal(v, getattr(USUAL, n)))


def sampling_differences(provenance: Mapping[str, Any]) -> Iterator[str]:
    """Recorded settings of the sampler, besides guidance, that differ from the protocol."""
    model, trained = _mapping(provenance.get("model")), _mapping(provenance.get("trained"))
    vocabulary = model.get("vocab_size")
    for name in DRAWN:
        value, usual = provenance.get(name), getattr(USUAL, name)
        everything = name == "top_k" and _is_number(value) and _is_number(vocabulary) and value >= vocabulary
        if value is not None and not everything and not _equal(value, usual):
            yield f"{name} {shown(value)} instead of {usual:g}"
    if steps := provenance.get("parallel_steps"):
        yield f"parallel_steps {shown(steps)} instead of one token per step"
    if order := provenance.get("token_order"):
        yield f"token_order {shown(order)} instead of raster"
    if trained.get("weights") == "student":
        yield "student weights instead of ema"


def label_difference(provenance: Mapping[str, Any], paper: str) -> Iterator[str]:
    """Classes that were not chosen as in ``paper``; both plans of 50,000 images are accepted where it does not state its own."""
    plan, stated = provenance.get("label_plan"), LABEL_PLANS.get(paper)
    if plan is not None and plan not in ([stated] if stated else ["balanced", "random"]):
        yield f"label_plan {shown(plan)} instead of {stated or 'balanced'}"


def training_differences(trained: Mapping[str, Any], method: str, size: str) -> Iterator[str]:
    """Recorded settings of the training that differ from those of the figures with ``method`` (ar, star, repa)."""
    found = _mapping(trained.get("objective"))
    for name, usual in _usual_objective(method, size).items():
        if (value := found.get(name)) not in (None, "") and not _equal(value, usual):
            yield f"{name} {shown(value)} instead of {usual}"
    if init := trained.get("init"):
        file = init.get("file") if isinstance(init, Mapping) else init
        yield f"the training started from {shown(file)} (train.init); the epochs of these weights are not counted"


def not_recorded(provenance: Mapping[str, Any], method: str, size: str) -> list[str]:
    """Names of settings of the protocol that the provenance does not record. Without guidance its shape has no effect."""
    trained = _mapping(provenance.get("trained"))
    guided = provenance.get("cfg_scale") not in (None, 1)
    names = [n for n in (*DRAWN, *(SHAPE if guided else ()), "label_plan") if provenance.get(n) is None]
    names += [] if trained.get("weights") is not None else ["weights"]
    found, wanted = _mapping(trained.get("objective")), _usual_objective(method, size)
    if wanted and not found:
        return [*names, TRAINING]
    return names + [n for n in wanted if found.get(n) in (None, "")]


def _usual_objective(method: str, size: str) -> dict[str, Any]:
    """The fields of ``objective`` in the provenance of weights (checkpoint/source.py) that the figures have."""
    if method == "star":
        block = {"contrastive_block": BLOCKS[size]} if size in BLOCKS else {}
        return {name: getattr(SelfGuidedConfig(), name) for name in OBJECTIVE} | block
    if method == "repa":
        block = {"repa_block": ALIGNED[size]} if size in ALIGNED else {}
        return {"views": 1, "repa_encoder": ENCODER, "repa_weight": RepaConfig().weight} | block
    return {"views": 1} if method == "ar" else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(value: Any, usual: Any) -> bool:
    """Of one kind: True is no number, and 1 equals 1.0."""
    return bool(value == usual) and isinstance(value, bool) == isinstance(usual, bool)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
