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

    target = pick_device(device)
    model, provenance = load_model(weights, target, pick_dtype(dtype, target))
    expected = str(provenance.get("tokenizer") or "")  # a hash, if it was recorded
    if len(expected) == 64 and expected != (found := tokenizer_hash(tokenizer)):
        raise UserError(
            f"{weights} was trained on codes of the tokenizer {expected[:12]}, but {tokenizer} has the hash {found[:12]}: "
            "name the tokenizer of the training"
        )
    vq = load_tokenizer(tokenizer, target)
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
    """A pipeline that samples images of the classes ``labels``; ``options`` are the fields of ``SamplingOptions``."""
    from megastar.sampling.distributed import SamplingPipeline
    from megastar.sampling.options import SamplingOptions

    model, vq, _ = load_networks(weights, tokenizer, device, dtype)
    return SamplingPipeline(
        model, vq, labels, seed=seed, options=SamplingOptions(**options), batch=min(batch, max(1, len(labels))),
        passes=passes, rank=rank, size=size,
    )  # fmt: skip


def sample_images(
    weights: str | Path, tokenizer: str | Path, labels: list[int], *, console: Console | None = None, **kwargs: Any
) -> np.ndarray:
    """Images (N, H, W, 3) uint8 of the classes ``labels``, in memory; ``kwargs`` as for ``open_pipeline``."""
    import numpy as np

    from megastar.sampling.distributed import iterate_images

    pipeline = open_pipeline(weights, tokenizer, labels, **kwargs)
    return np.concatenate([images for _, images in iterate_images(pipeline, console=console)])
