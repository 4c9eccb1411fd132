"""Weights and tokenizer -> images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from megastar.model.transformer import Transformer
    from megastar.sampling.distributed import SamplingPipeline
    from megastar.tokenizer.vq import VQModel


def load_networks(
    weights: str | Path, tokenizer: str | Path, device: str = "auto", dtype: str = "fp32"
) -> tuple[Transformer, VQModel, dict[str, Any]]:
    """The transformer in ``dtype``, the tokenizer whose codes it was trained on, and the provenance of the weights.

    Raises ``UserError`` for files that do not exist or do not belong together.
    """
    from megastar.model.io import load_model
    from megastar.sampling.sampler import check_tokenizer
    from megastar.tokenizer.io import load_tokenizer, tokenizer_hash
    from megastar.utils.device import pick_device, pick_dtype

    where = pick_device(device)
    model, provenance = load_model(weights, where, pick_dtype(dtype, where))
    expected = str(provenance.get("tokenizer") or "")  # a hash, where whoever made the weights knew it
    if len(expected) == 64 and expected != (given := tokenizer_hash(tokenizer)):
        raise UserError(
            f"{weights} was trained on codes of the tokenizer {expected[:12]}, {tokenizer} is {given[:12]}: name the right one"
        )
    vq = load_tokenizer(tokenizer, where)
    check_tokenizer(model.cfg, vq)
    return model, vq, provenance


def open_pipeline(
    weights: str | Path,
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
    **options: Any,
) -> SamplingPipeline:
    """What draws pictures of the classes ``labels``; ``options`` are the fields of ``sampling.options.Options``."""
    from megastar.sampling.distributed import SamplingPipeline
    from megastar.sampling.options import SamplingOptions

    model, vq, _ = load_networks(weights, tokenizer, device, dtype)
    batch = min(batch, max(1, len(labels)))
    return SamplingPipeline(
        model,
        vq,
        labels,
        seed=seed,
        options=SamplingOptions(**options),
        batch=batch,
        passes=passes,
        rank=rank,
        size=size,
    )


def sample_images(
    weights: str | Path, tokenizer: str | Path, labels: list[int], *, console: Console | None = None, **known: Any
) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 of the classes ``labels``, in memory; ``known`` as for ``open_pipeline``."""
    import numpy as np

    from megastar.sampling.distributed import iterate_images

    painter = open_pipeline(weights, tokenizer, labels, **known)
    return np.concatenate([pictures for _, pictures in iterate_images(painter, console=console)])
