"""Classes to codes to images: autoregressive sampling with a cache and guidance."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.sampling.decoder import CachedDecoder, StepGraphs
from megastar.sampling.guidance import null_until, scales
from megastar.sampling.logits import draw, probabilities
from megastar.sampling.options import SamplingOptions
from megastar.sampling.parallel import random_orders
from megastar.sampling.step_schedules import DecodingStep, decoding_steps, diagonals
from megastar.tokenizer.vq import VQModel, to_pixels
from megastar.utils.progress_bar import ProgressBar

ProgressCallback = Callable[[float], None]  # called with the share of the tokens sampled so far


def progress_callback(bar: ProgressBar, count: int) -> ProgressCallback:
    """Advances ``bar`` from its present state while ``count`` images are sampled."""
    done = bar.done
    return lambda share: bar.update(done + share * count, f"{bar.rate:.3g} images/s")


def sample_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the samples of the run ``seed``, distinct from any other run's. Raises ``UserError``."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} must be an integer from 0 to 2^64 - 1")
    return [(seed << 64) + i for i in range(count)]


def uniform_noise(seeds: Sequence[int], tokens: int) -> Tensor:
    """(N, T) float64 in [0, 1): row i depends on seeds[i] only (Philox, a counter-based generator)."""
    rows = np.empty((len(seeds), tokens))
    for row, seed in zip(rows, seeds, strict=True):
        row[:] = (np.random.Philox(key=int(seed)).random_raw(tokens) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(rows)


def any_below(numbers: Tensor, bound: int) -> bool:
    """Synchronizes a GPU."""
    return bool((numbers < bound).any())


class Sampler:
    """A network with the state for sampling: its decoding copy, caches and CUDA graphs, created once for all calls.

    ``batch`` images are sampled at once. ``passes``: conditional and null rows in one batch (1) or one after the
    other (2). ``rank`` appears in errors. ``cuda_graphs`` None: on a GPU.
    """

    def __init__(
        self,
        model: Transformer,
        options: SamplingOptions,
        batch: int = 64,
        *,
        passes: int = 1,
        rank: int = 0,
        cuda_graphs: bool | None = None,
    ):
        self.cfg, self.options, self.batch, self.rank = model.cfg, options, batch, rank
        problems = options.problems(model.cfg) + ([] if batch >= 1 else [f"batch {batch} must be at least 1"])
        if problems:
            raise UserError("\n".join(problems))
        o, T = options, self.cfg.image_tokens
        self.steps = decoding_steps(o.token_counts(T))
        self.scales = scales(T, o.cfg_scale, o.cfg_schedule, o.cfg_interval)
        self.null_until = null_until(self.scales)
        self.decoder = CachedDecoder(model, batch, self.null_until > 0, passes=passes)
        device = self.decoder.device
        self.classes = torch.zeros(batch, dtype=torch.long, device=device)
        self.factors = self.cfg.head_factors  # of a factorised head: a token takes one number per sub-code
        self.draws = T * max(1, len(self.factors))
        self.noise = torch.zeros(batch, self.draws, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(batch, T, dtype=torch.long, device=device)  # in the order of drawing
        self.orders = torch.arange(T, device=device).repeat(batch, 1)
        self.scale_of = torch.tensor(self.scales, dtype=torch.float32, device=device)
        self.permuted = o.permutes
        self.broken = torch.zeros(
            batch, dtype=torch.long, device=device
        )  # first position with logits that are not finite
        use_graphs = device.type == "cuda" if cuda_graphs is None else cuda_graphs
        # Without a reference to self: caches and graphs of a sampler that is no longer used are freed at once.
        own = weakref.ref(self)
        self.graphs = StepGraphs(lambda position: _step_of(own, position, batch), device) if use_graphs else None

    @torch.inference_mode()
    def draw(
        self,
        labels: Tensor,
        seeds: Sequence[int],
        on_progress: ProgressCallback | None = None,
        orders: Tensor | None = None,
    ) -> Tensor:
        """At most ``batch`` images: labels (B,) and as many seeds -> codes (B, T) int64 on the CPU, row by row of the grid.

        ``on_progress`` is called after each step. ``orders`` (B, T): the order in which each image's positions are drawn,
        by a network of random order; None: that of the options. Raises ``UserError`` if the network's logits are not
        finite, and for orders that are no permutations.
        """
        T, count = self.cfg.image_tokens, len(labels)
        assert count == len(seeds) <= self.batch, (count, len(seeds), self.batch)
        self.classes[:count] = labels.to(self.classes.device)
        self.noise[:count] = uniform_noise(seeds, self.draws).to(self.noise.device)
        self._set_orders(seeds, orders)
        self.broken.fill_(T)
        broken = self.broken[:count]
        for number, step in enumerate(self.steps):
            # A smaller last batch runs in the graphs of the full ones, but does not justify its own.
            if self.graphs is not None and (count == self.batch or number in self.graphs):
                self.graphs(number)
            else:
                self._step(number, count)
            if on_progress is not None:
                on_progress((step.first + step.drawn) / T)
            if broken.is_cpu and any_below(broken, T):
                break
        if any_below(broken, T):
            row = int(broken.argmin())
            raise UserError(
                f"the logits of token {int(broken[row])} are not finite for class {int(labels[row])} (rank {self.rank}): "
                "the weights are damaged, or fp16/bf16 overflows; check them with megastar convert --inspect, "
                "or sample with --dtype fp32"
            )
        tokens = self.tokens[:count]
        if self.permuted:
            tokens = torch.zeros_like(tokens).scatter_(1, self.orders[:count], tokens)
        return tokens.to("cpu", copy=True)

    def _set_orders(self, seeds: Sequence[int], given: Tensor | None) -> None:
        T, count = self.cfg.image_tokens, len(seeds)
        permuted = given is not None or self.options.permutes
        if given is not None:
            if self.cfg.target_position == "none":
                raise UserError("orders are given, but this network was trained in raster order: leave them out")
            fits = given.shape == (count, T) and torch.equal(given.sort(-1).values, torch.arange(T).expand(count, T))
            if not fits:
                raise UserError(f"orders of shape {tuple(given.shape)}: give one permutation of 0..{T - 1} per image")
        if permuted != self.permuted and self.graphs is not None:
            self.graphs.graphs.clear()  # they are of the other kind of step
        self.permuted = permuted
        orders = given
        if orders is None and self.options.schedule == "diagonal":
            orders = torch.tensor(diagonals(T)[0])
        if orders is None:
            orders = random_orders(seeds, T) if permuted else torch.arange(T)
        self.orders[:count] = orders.to(self.orders.device)

    def _step(self, number: int, count: int) -> None:
        """Draw the tokens of step ``number`` of the first ``count`` images. Does not synchronize a GPU."""
        step = self.steps[number]
        # A start before the first token: the cache still holds queries of the last step, whose places are to be written again.
        if self.permuted or step.drawn > 1 or step.start != step.first:
            self._parallel_step(step, count)
            return
        position = step.first
        tokens, scale, with_null = self.tokens[:count], self.scales[position], position < self.null_until
        if not self.factors:
            logits = self.decoder.logits(self.classes[:count], tokens, position, scale, with_null)
            tokens[:, position] = self._draw(logits, position, position)
            return
        states = self.decoder.states(self.classes[:count], tokens, position, with_null)
        code = torch.zeros_like(tokens[:, position])
        for i, size in enumerate(self.factors):
            logits = self.decoder.sub_logits(states, i, count, scale)
            drawn = self._draw(logits, position, position * len(self.factors) + i)
            code = code * size + drawn
            if i + 1 < len(self.factors):
                states = self.decoder.next_states(states, i, drawn)
        tokens[:, position] = code

    def _parallel_step(self, step: DecodingStep, count: int) -> None:
        tokens, first, until = self.tokens[:count], step.first, step.first + step.drawn
        with_null, factors = first < self.null_until, max(1, len(self.factors))
        same = len(set(self.scales[first:until])) == 1
        scale = self.scales[first] if same else self.scale_of[first:until, None]  # (count, 1)
        states = self.decoder.query_states(self.classes[:count], tokens, self.orders[:count], step, with_null)
        noise = self.noise[:count].unflatten(1, (-1, factors))[:, first:until]  # (B, count, sub-codes)
        if not self.factors:
            logits = self.decoder.code_logits(states, count, scale)  # (B, count, V)
            tokens[:, first:until] = self._draw_all(logits, first, noise[..., 0])
            return
        code = torch.zeros_like(tokens[:, first:until])
        for i, size in enumerate(self.factors):
            drawn = self._draw_all(self.decoder.sub_logits(states, i, count, scale), first, noise[..., i])
            code = code * size + drawn
            if i + 1 < len(self.factors):
                states = self.decoder.next_states(states, i, drawn)
        tokens[:, first:until] = code

    def _draw_all(self, logits: Tensor, position: int, noise: Tensor) -> Tensor:
        """Logits (B, count, V) and noise (B, count) -> one number each (B, count)."""
        o, broken = self.options, self.broken[: len(logits)]
        probs = probabilities(logits.flatten(0, 1), o.temperature, o.top_k, o.top_p)  # (B * count, V)
        bad = probs[:, 0].isnan().view(noise.shape).any(1)
        broken.copy_(torch.where(bad, broken.clamp(max=position), broken))
        return draw(probs, noise.flatten()).view(noise.shape)

    def _draw(self, logits: Tensor, position: int, column: int) -> Tensor:
        """Logits (B, V), or of a sub-code, -> one number per row (B,), by the noise of ``column``."""
        # One NaN or plus infinity among a row's logits makes all its probabilities NaN.
        return self._draw_all(logits[:, None], position, self.noise[: len(logits), column, None])[:, 0]


def _step_of(sampler: weakref.ref[Sampler], number: int, count: int) -> None:
    found = sampler()
    assert found is not None, "the graphs of a sampler that no longer exists"
    found._step(number, count)


def check_tokenizer(c: ModelConfig, tokenizer: VQModel) -> None:
    """Raises ``UserError`` if the tokenizer cannot decode this model's codes."""
    t = tokenizer.config
    if t.codebook_size != c.vocab_size or t.grid**2 != c.image_tokens:
        raise UserError(
            f"the model samples {c.image_tokens} codes of {c.vocab_size}, the tokenizer has {t.grid**2} codes of "
            f"{t.codebook_size}: name the tokenizer whose codes the model was trained on"
        )


@torch.no_grad()
def decode_images(tokenizer: VQModel, codes: Tensor, batch: int = 64, size: int | None = None) -> np.ndarray:
    """Codes (N, T) -> images (N, H, W, 3) uint8.

    ``size``: resize to it, bicubic without antialiasing and before rounding, as in LlamaGen's sample_c2i_ddp.py.
    """
    device = next(tokenizer.parameters()).device
    side = size or tokenizer.config.image_size
    out = np.empty((len(codes), side, side, 3), dtype=np.uint8)
    for first in range(0, len(codes), batch):
        images = tokenizer.decode_codes(codes[first : first + batch].to(device))  # (B, 3, H, W)
        if side != tokenizer.config.image_size:
            images = F.interpolate(images.float(), size=(side, side), mode="bicubic")
        out[first : first + batch] = to_pixels(images)
    return out
