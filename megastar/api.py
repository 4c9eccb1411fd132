"""Trained weights as one object that samples, encodes, decodes and extracts features: ``megastar.load``.

N images or sequences, H = W the image size, T tokens, D width, V codes. Arrays come out as numpy; numpy arrays, torch
tensors and sequences of them, PIL images among these, go in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megastar.checkpoint.find_weights import class_names, class_number, find_weights, has_null_class
from megastar.config.schema import ModelConfig
from megastar.data.pretokenize.encoding import ViewEncoder
from megastar.errors import UserError
from megastar.evaluation.linear_probe import probe_features
from megastar.model.transformer import Transformer
from megastar.sampling.options import SamplingOptions
from megastar.sampling.pipeline import annealed, check_guidance, load_networks
from megastar.sampling.sampler import Sampler, decode_images, sample_seeds
from megastar.tokenizer.vq import VQModel

logger = logging.getLogger(__name__)


def load(
    source: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16", "auto"] = "fp32",
    any_tokenizer: bool = False,
) -> Model:
    """The weights in ``source`` with their tokenizer.

    Args:
        source: a run folder (its newest checkpoint), a checkpoint folder, a .safetensors file that megastar wrote, a
            folder of ``megastar convert --to hf``, such a folder on the Hub as "hf://owner/name" or
            "hf://owner/name@revision", or a .pt file of LlamaGen; None: the weights shipped with megastar, trained on emoji images of 64 x 64 pixels.
        tokenizer: a tokenizer .safetensors; None: the one whose hash the weights record, where the run had it, beside its
            shards or the weights, or shipped with megastar.
        weights: which weights of a run or checkpoint, "ema" (None means it) or "student"; of a .pt file with several sets
            the name of one. A run is converted to RUN/weights/*.safetensors at the first call.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:1".
        dtype: precision of the transformer; "auto" is bf16 where the hardware has it. The tokenizer stays in fp32.
        any_tokenizer: allow a tokenizer other than the one whose hash the weights record.

    Raises ``UserError`` for files that are missing, damaged, or do not belong together.

    >>> load(device="cpu")
    <megastar.Model nano: 9 classes, 64 x 64 images of 64 tokens, cpu>
    """
    found = find_weights(source, weights)
    transformer, vq, provenance = load_networks(found, found.tokenizer_file(tokenizer), device, dtype, any_tokenizer)
    return Model(
        transformer,
        vq,
        class_names(transformer.cfg.num_classes, provenance),
        has_null_class(provenance),
        annealed(provenance),
    )


class Model:
    """A transformer with its tokenizer, frozen. Made by ``megastar.load``; one thread at a time may use it.

    ``transformer`` and ``tokenizer`` are the torch modules. ``config`` describes the transformer, ``classes`` are the
    names of its classes (their numbers as texts where the weights name none).
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: VQModel,
        classes: Sequence[str],
        null_class: bool = True,
        note: str = "",
    ):
        self._provenance = {"null_class": null_class}
        self._note = note  # why not to sample in random order
        self.transformer, self.tokenizer, self.classes = transformer, tokenizer, list(classes)
        self.config: ModelConfig = transformer.cfg
        self.device: torch.device = next(transformer.parameters()).device
        self._encoder = ViewEncoder(tokenizer, self.device, torch.float32, 0)
        self._sampler: Sampler | None = None

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.tokenizer.config.image_size

    def __repr__(self) -> str:
        c, size = self.config, self.image_size
        images = f"{size} x {size} images of {c.image_tokens} tokens"
        return f"<megastar.Model {c.name}: {c.num_classes} classes, {images}, {self.device}>"

    def sample(
        self,
        classes: int | str | Sequence[int | str] | np.ndarray | Tensor,
        n: int = 1,
        *,
        cfg_scale: float = 3.0,
        seed: int = 0,
        temperature: float = 0.9,
        top_k: int = 0,
        top_p: float = 1.0,
        batch: int = 64,
        parallel_steps: int = 0,
        schedule: str = "cosine",
        token_order: str = "auto",
    ) -> np.ndarray:
        """``n`` images of each class, class by class: uint8 (N, H, W, 3), equal to those of ``megastar sample``.

        Args:
            classes: a number or a name of ``classes``, or a sequence of them.
            cfg_scale: strength of classifier-free guidance, from 1, which means none.
            seed: image i of the result depends on the seed, i and its class only.
            temperature: of the softmax over the codes; 1 samples the distribution that was trained.
            top_k: sample from the k most probable codes only; 0: from all.
            top_p: sample from the most probable codes up to this total probability only.
            batch: images that are sampled at once.
            parallel_steps: draw the tokens in this many steps, by weights of random token order; 0: one by one.
            schedule: "cosine" or "uniform", how many tokens each of these steps draws; "diagonal": one diagonal of the grid per
                step, without ``parallel_steps``.
            token_order: "raster", "random", or "auto": random with ``parallel_steps``, else raster.

        Raises ``UserError`` for an unknown class or an option out of its range.

        >>> model = load(device="cpu")
        >>> model.sample("food-drink", n=2, seed=1).shape
        (2, 64, 64, 3)
        """
        if n < 1:
            raise UserError(f"n is {n}: sample at least 1 image of each class")
        check_guidance(self._provenance, cfg_scale)
        labels = torch.tensor([c for c in self._class_numbers(classes) for _ in range(n)])  # (N,)
        seeds = sample_seeds(seed, len(labels))
        options = SamplingOptions(
            cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p,
            parallel_steps=parallel_steps, schedule=schedule, token_order=token_order,
        )  # fmt: skip
        if options.permutes and self._note:
            logger.warning(self._note)
        batch = min(batch, len(labels))
        if self._sampler is None or (self._sampler.options, self._sampler.batch) != (options, batch):
            self._sampler = None  # its cache is freed before the new one is allocated
            self._sampler = Sampler(self.transformer, options, batch)
        parts = zip(labels.split(batch), (seeds[i : i + batch] for i in range(0, len(seeds), batch)), strict=True)
        codes = torch.cat([self._sampler.draw(some, theirs) for some, theirs in parts])
        return decode_images(self.tokenizer, codes, batch)

    def encode(self, images: Any) -> np.ndarray:
        """Images uint8 (N, H, W, 3) -> codes int64 (N, T), row by row of the token grid, as in token shards.

        Raises ``UserError`` for another shape or dtype: images are neither resized nor converted.
        """
        size = self.image_size
        pixels = _array(images, "images")
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise UserError(
                f"images have shape {pixels.shape}: this model takes (N, {size}, {size}, 3), height x width x RGB"
            )
        if pixels.dtype != np.uint8:
            raise UserError(f"images have dtype {pixels.dtype}: give uint8 pixels from 0 to 255")
        return self._encoder(np.ascontiguousarray(pixels))

    def decode(self, codes: Any) -> np.ndarray:
        """Codes (N, T), integers from 0 to V - 1 -> images uint8 (N, H, W, 3). Raises ``UserError``."""
        return decode_images(self.tokenizer, torch.from_numpy(self._checked_codes(codes)))

    def features(self, images: Any, *, block: int, batch: int = 64) -> np.ndarray:
        """Output of block ``block`` (from 1 to ``config.n_layer``) at every position: float32 (N, T, D).

        The features of ``megastar probe``: the images are encoded, and the transformer reads the null class and then the
        codes, without any label. The attention is causal, so position t (from 0) depends on the null class and the
        first t codes; the last code is never read. ``images``: uint8 (N, H, W, 3), or codes (N, T) of ``encode``.

        Raises ``UserError`` for a block that does not exist and for images or codes that do not fit.
        """
        c = self.config
        if not has_null_class(self._provenance):
            raise UserError("these weights have no null class (trained without dropping labels), which features need")
        if not 1 <= block <= c.n_layer:
            raise UserError(f"block {block} is outside 1..{c.n_layer}, the blocks of this model")
        given = _array(images, "images")
        codes = self._checked_codes(given) if given.ndim == 2 else self.encode(given)
        positions = list(range(1, c.image_tokens + 1))
        return probe_features(self.transformer, codes, block=block, positions=positions, batch=batch)

    def _class_numbers(self, classes: Any) -> list[int]:
        given = classes.tolist() if isinstance(classes, (np.ndarray, np.generic, Tensor)) else classes
        listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        if not listed:
            raise UserError("no classes are given: name at least one")
        for c in listed:
            if not isinstance(c, (int, str, np.integer)):
                raise UserError(f"class {c!r} is a {type(c).__name__}: give a class by its number or name")
        return [class_number(c if isinstance(c, str) else int(c), self.classes) for c in listed]

    def _checked_codes(self, codes: Any) -> np.ndarray:
        c, given = self.config, _array(codes, "codes")
        if given.ndim != 2 or given.shape[1] != c.image_tokens:
            raise UserError(f"codes have shape {given.shape}: this model takes (N, {c.image_tokens})")
        if not np.issubdtype(given.dtype, np.integer):
            raise UserError(f"codes have dtype {given.dtype}: give integers")
        if given.size and (given.min() < 0 or given.max() >= c.vocab_size):
            raise UserError(
                f"codes range from {given.min()} to {given.max()}: the codebook of this model has codes 0 to {c.vocab_size - 1}"
            )
        return given.astype(np.int64)


def _array(given: Any, what: str) -> np.ndarray:
    """A numpy array of a tensor, an array, or a sequence of arrays or PIL images of one size."""
    if isinstance(given, Tensor):
        return given.detach().cpu().numpy()
    try:
        return np.asarray(given)
    except ValueError as error:
        raise UserError(f"{what} have different shapes: give one array, or a sequence of equal shapes") from error
