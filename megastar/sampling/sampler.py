"""Classes to codes to pictures: autoregressive sampling with a cache and guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.sampling.decoder import CachedDecoder
from megastar.sampling.guidance import null_until, scales
from megastar.sampling.logits import draw, probabilities
from megastar.sampling.options import SamplingOptions, check_request
from megastar.tokenizer.vq import VQModel
from megastar.utils.progress_bar import picture_bar


def sample_seeds(seed: int, count: int, start: int = 0) -> list[int]:
    """Seeds of samples start..start+count-1 of the run ``seed``: no two runs share one. Raises ``UserError``."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed}: give an integer from 0 to 2^64 - 1")
    return [(seed << 64) + i for i in range(start, start + count)]


def uniform_noise(seeds: Sequence[int], tokens: int) -> Tensor:
    """(N, T) float64 in [0, 1): row i is a function of seeds[i] only (Philox, a counter-based generator)."""
    rows = np.empty((len(seeds), tokens))
    for row, seed in zip(rows, seeds, strict=True):
        row[:] = (np.random.Philox(key=int(seed)).random_raw(tokens) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(rows)


class Sampler:
    """A network ready to draw: its decoding copy, caches and CUDA graphs are made once and serve every call.

    ``batch`` pictures are drawn at once. ``passes``: conditional and null rows in one batch (1) or one after the
    other (2). ``rank`` is named when something goes wrong.
    """

    def __init__(
        self, model: Transformer, options: SamplingOptions, batch: int = 64, *, passes: int = 1, rank: int = 0
    ):
        self.cfg, self.options, self.batch, self.rank = model.cfg, options, batch, rank
        problems = options.problems(model.cfg) + ([] if batch >= 1 else [f"batch {batch} must be at least 1"])
        if problems:
            raise UserError("\n".join(problems))
        o = options
        self.scales = scales(self.cfg.image_tokens, o.cfg_scale, o.cfg_schedule, o.cfg_interval)
        self.null_until = null_until(self.scales)
        self.decoder = CachedDecoder(model, batch, self.null_until > 0, passes=passes)

    @torch.inference_mode()
    def draw(
        self, labels: Tensor, seeds: Sequence[int], show: Callable[[float], object] = lambda share: None
    ) -> Tensor:
        """At most ``batch`` pictures: labels (B,) and as many seeds -> codes (B, T) int64 on the CPU.

        ``show`` is told the share of the tokens that are drawn, after each. Raises ``UserError`` when the network's logits are not finite.
        """
        o, T, device = self.options, self.cfg.image_tokens, self.decoder.device
        assert len(labels) == len(seeds) <= self.batch, (len(labels), len(seeds), self.batch)
        given = labels.to(device)  # (B,)
        noise = uniform_noise(seeds, T).to(device)  # (B, T)
        tokens = torch.zeros(len(labels), T, dtype=torch.long, device=device)
        broken = torch.full_like(given, T)  # (B,) the first position whose logits are not finite
        for position in range(T):
            logits = self.decoder.logits(given, tokens, position, self.scales[position], position < self.null_until)
            probs = probabilities(logits, o.temperature, o.top_k, o.top_p)  # (B, V)
            # One NaN or plus infinity among a row's logits makes all its probabilities NaN. No GPU waits for this.
            bad = probs[:, 0].isnan()
            broken = torch.where(bad, broken.clamp(max=position), broken)
            tokens[:, position] = draw(probs, noise[:, position])
            show((position + 1) / T)
            if device.type == "cpu" and bool(bad.any()):
                break
        if bool((broken < T).any()):
            row = int(broken.argmin())
            raise UserError(
                f"the logits of token {int(broken[row])} are not finite for class {int(labels[row])} (rank {self.rank}): "
                "the weights are damaged, or fp16/bf16 overflows; look at them with megastar convert --inspect, "
                "or sample with --dtype fp32"
            )
        return tokens.cpu()


def sample_tokens(
    model: Transformer,
    labels: Tensor | Sequence[int],
    *,
    seeds: Sequence[int],
    batch: int = 64,
    passes: int = 1,
    rank: int = 0,
    progress: Console | None = None,
    **options: Any,
) -> Tensor:
    """Draw one picture's codes for each label: labels (N,) -> codes (N, T) int64 on the CPU.

    ``options`` are the fields of ``SamplingOptions``. Sample i depends on labels[i] and seeds[i] only, not on ``batch``, its
    neighbours or ``passes``, up to the rounding of matrix products of another size (in fp32 too small to matter; in
    bf16 a code may turn). ``cfg_scale`` 1 computes no null half. ``progress`` is the console that shows a bar. Raises
    ``UserError`` (see check_request).
    """
    labels = torch.as_tensor(labels, dtype=torch.long).cpu()
    asked = SamplingOptions(**options)
    check_request(model.cfg, labels, seeds, asked, batch)
    out = torch.empty(len(labels), model.cfg.image_tokens, dtype=torch.long)
    if not len(labels):
        return out
    sampler = Sampler(model, asked, min(batch, len(labels)), passes=passes, rank=rank)
    with picture_bar(progress, len(labels)) as bar:
        for first in range(0, len(labels), batch):
            now = labels[first : first + batch]

            def show(share: float, first: int = first, count: int = len(now)) -> None:
                bar(first + share * count)

            out[first : first + batch] = sampler.draw(now, seeds[first : first + batch], show)
    return out


def check_tokenizer(c: ModelConfig, tokenizer: VQModel) -> None:
    """Raises ``UserError`` unless the tokenizer can decode this model's codes."""
    t = tokenizer.config
    if t.codebook_size != c.vocab_size or t.grid**2 != c.image_tokens:
        raise UserError(
            f"the model draws {c.image_tokens} codes of {c.vocab_size}, the tokenizer has {t.grid**2} codes of "
            f"{t.codebook_size}: name the tokenizer whose codes the model was trained on"
        )


@torch.no_grad()
def decode_pictures(tokenizer: VQModel, codes: Tensor, batch: int = 64, size: int | None = None) -> np.ndarray:
    """Codes (N, T) -> pictures (N, H, W, 3) uint8.

    ``size``: resized to it, bicubic without antialiasing and before rounding, as LlamaGen's sample_c2i_ddp.py does.
    """
    device = next(tokenizer.parameters()).device
    side = size or tokenizer.config.image_size
    out = np.empty((len(codes), side, side, 3), dtype=np.uint8)
    for first in range(0, len(codes), batch):
        images = tokenizer.decode_codes(codes[first : first + batch].to(device))  # (B, 3, H, W)
        if side != tokenizer.config.image_size:
            images = F.interpolate(images.float(), size=(side, side), mode="bicubic")
        pixels = images.float().add(1).mul(127.5).round().clamp(0, 255).byte()
        out[first : first + batch] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return out
