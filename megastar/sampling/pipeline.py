"""Weights and tokenizer -> images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from megastar.sampling.distributed import SamplingPipeline


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
    from megastar.model.io import load_model
    from megastar.sampling.distributed import SamplingPipeline
    from megastar.sampling.options import SamplingOptions
    from megastar.tokenizer.io import load_tokenizer, tokenizer_hash
    from megastar.utils.device import pick_device, pick_dtype

    where = pick_device(device)
    model, about = load_model(weights, where, pick_dtype(dtype, where))
    told = str(about.get("tokenizer") or "")  # a hash, where whoever made the weights knew it
    if len(told) == 64 and told != (given := tokenizer_hash(tokenizer)):
        raise UserError(
            f"{weights} was trained on codes of the tokenizer {told[:12]}, {tokenizer} is {given[:12]}: name the right one"
        )
    vq = load_tokenizer(tokenizer, where)
    known = {"seed": seed, "batch": min(batch, max(1, len(labels))), "passes": passes, "rank": rank, "size": size}
    return SamplingPipeline(model, vq, labels, options=SamplingOptions(**options), **known)


def sample_images(
    weights: str | Path, tokenizer: str | Path, labels: list[int], *, console: Console | None = None, **known: Any
) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 of the classes ``labels``, in memory; ``known`` as for ``open_pipeline``."""
    import numpy as np

    from megastar.sampling.distributed import iterate_images

    painter = open_pipeline(weights, tokenizer, labels, **known)
    return np.concatenate([pictures for _, pictures in iterate_images(painter, console=console)])
