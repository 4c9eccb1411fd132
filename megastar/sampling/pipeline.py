"""Weights and tokenizer -> images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.errors import UserError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from megastar.checkpoint.find_weights import Weights
    from megastar.model.transformer import Transformer
    from megastar.sampling.distributed import SamplingPipeline
    from megastar.tokenizer.vq import VQModel


def load_networks(
    weights: Weights | str | Path,
    tokenizer: str | Path,
    device: str = "auto",
    dtype: str = "fp32",
    any_tokenizer: bool = False,
) -> tuple[Transformer, VQModel, dict[str, Any]]:
    """The transformer in ``dtype``, the tokenizer whose codes it was trained on, and the provenance of the weights.

    ``any_tokenizer`` allows a tokenizer with another hash than the recorded one. Raises ``UserError`` for files that do
    not exist or do not belong together.
    """
    from megastar.checkpoint.find_tokenizer import check_identity
    from megastar.checkpoint.find_weights import Weights
    from megastar.sampling.sampler import check_tokenizer
    from megastar.tokenizer.io import load_tokenizer
    from megastar.utils.device import pick_device, pick_dtype

    target = pick_device(device)
    found = weights if isinstance(weights, Weights) else Weights(Path(weights))
    check_identity(found.file, found.identity, tokenizer, any_tokenizer)
    model, vq = found.load(target, pick_dtype(dtype, target)), load_tokenizer(tokenizer, target)
    check_tokenizer(model.cfg, vq)
    return model, vq, found.provenance


def open_pipeline(
    weights: Weights | str | Path,
    tokenizer: str | Path,
    labels: list[int],
    *,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    batch: int = 64,
    passes: int = 1,
    rank: int = 0,
    size: int | None = None,
    any_tokenizer: bool = False,
    **options: Any,
) -> SamplingPipeline:
    """A pipeline that samples images of the classes ``labels``; ``options`` are the fields of ``SamplingOptions``."""
    from megastar.sampling.distributed import SamplingPipeline
    from megastar.sampling.options import SamplingOptions

    model, vq, provenance = load_networks(weights, tokenizer, device, dtype, any_tokenizer)
    settings = SamplingOptions(**options)
    check_guidance(provenance, settings.cfg_scale)
    if rank == 0 and settings.permutes and (sentence := annealed(provenance)):
        logger.warning(sentence)
    return SamplingPipeline(
        model, vq, labels, seed=seed, options=settings, batch=min(batch, max(1, len(labels))),
        passes=passes, rank=rank, size=size,
    )  # fmt: skip


def annealed(provenance: dict[str, Any]) -> str:
    """What is wrong with a random order for these weights; empty where all images were permuted to the end."""
    order = provenance.get("token_order")
    share = order.get("permuted_share") if isinstance(order, dict) else None
    if not isinstance(share, (int, float)) or not 0 <= share < 1:
        return ""
    return (
        f"when these weights were saved, {share:.0%} of the images were permuted (token_order.anneal_start, anneal_end): "
        "they are better in raster order, token by token, than in a random order or several tokens per step"
    )


def check_guidance(provenance: dict[str, Any], cfg_scale: float) -> None:
    """Raise ``UserError`` for guidance by weights without a null class."""
    from megastar.checkpoint.find_weights import has_null_class

    if cfg_scale != 1 and not has_null_class(provenance):
        raise UserError(
            f"these weights have no null class (they were trained without dropping labels), so guidance {cfg_scale:g} is "
            "not possible: sample with guidance scale 1"
        )


def sample_images(
    weights: Weights | str | Path,
    tokenizer: str | Path,
    labels: list[int],
    *,
    console: Console | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Images (N, H, W, 3) uint8 of the classes ``labels``, in memory; ``kwargs`` as for ``open_pipeline``."""
    import numpy as np

    from megastar.sampling.distributed import iterate_images

    pipeline = open_pipeline(weights, tokenizer, labels, **kwargs)
    return np.concatenate([images for _, images in iterate_images(pipeline, console=console)])
