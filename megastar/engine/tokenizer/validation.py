"""Scores of the averaged weights on held-out images, shared among the ranks; each score is that of one process."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from megastar.engine.tokenizer.batches import HeldOut
from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector
from megastar.evaluation.features import Network, open_network
from megastar.evaluation.frechet import frechet_distance
from megastar.evaluation.options import Settings
from megastar.evaluation.scores import check_count, min_images
from megastar.parallel.replicas import Replicas
from megastar.sampling.grid import save_grid
from megastar.tokenizer.losses import psnr
from megastar.tokenizer.quantizers.base import code_statistics
from megastar.tokenizer.scores import BATCH, ssim
from megastar.tokenizer.vq import VQModel, to_images, to_pixels
from megastar.utils.launcher import place_of

logger = logging.getLogger(__name__)
GAP = 2  # pixels between the images of a grid
SHOWN = 8  # images of a grid


@dataclass
class Validator:
    """The networks that score reconstructions on ``device``, and this rank's place. ``scores`` is a collective.

    ``stopping`` is called by all ranks before each batch; if it returns true there, the validation is given up.
    """

    replicas: Replicas
    device: torch.device
    perceptual: nn.Module | None
    networks: Sequence[tuple[str, Network]]  # metric and its network
    stopping: Callable[[], bool] = lambda: False
    _real: dict[tuple[int, int], Collector] = field(default_factory=dict)  # of held-out set and network, by their id

    def check(self, held_out: HeldOut, name: str) -> None:
        """Raises ``UserError`` if ``held_out`` has fewer images than a requested score requires."""
        for metric, network in self.networks:
            if metric != "fd":
                check_count([metric], network, Settings(), len(held_out), name)

    @torch.no_grad()
    def scores(self, model: VQModel, held_out: HeldOut) -> dict[str, float] | None:
        """None if ``stopping``, else scores of the reconstructions in fp32: ``psnr`` (dB, mean over images), ``psnr_of_mean`` (dB, of the mean squared
        error over all), ``ssim``, ``perceptual_distance`` (of the training's perceptual loss), ``codes_used`` (share of the
        codebook), ``perplexity`` (of the codes' frequencies), and r with the name of each network's Frechet distance.

        FD-EffLite0 needs 4 images; without them it is left out.
        """
        model.eval()
        sums = torch.zeros(5, dtype=torch.float64)  # images, PSNR, squared error, SSIM, perceptual distance
        uses = torch.zeros(model.config.codebook_size, dtype=torch.long)
        active = [(m, n) for m, n in self.networks if len(held_out) >= min_images(m, n, Settings())]
        made = {id(n): Collector(n) for _, n in active}
        fresh = {id(n): Collector(n) for _, n in active if (id(held_out), id(n)) not in self._real}
        batches = held_out.batches(BATCH)
        for _ in range(held_out.rounds(BATCH)):  # of all ranks alike
            if self.stopping():
                return None
            if (pixels := next(batches, None)) is None:
                continue
            images = to_images(pixels, self.device)
            codes = model.encode(images)
            decoded = model.decode_codes(codes)
            uses += torch.bincount(codes.flatten().cpu(), minlength=len(uses))
            ratios = psnr(images, decoded).double()
            distance = self.perceptual(images, decoded).item() if self.perceptual else 0.0
            sums += torch.tensor(
                [
                    len(pixels),
                    ratios.sum().item(),
                    (10 ** (-ratios / 10)).sum().item(),
                    ssim(images, decoded).double().sum().item(),
                    distance * len(pixels),
                ],
                dtype=torch.float64,
            )
            for _, network in active:
                made[id(network)].update(to_pixels(decoded))
                if id(network) in fresh:
                    fresh[id(network)].update(pixels)
        sums, uses = (self.replicas.sum(x.to(self.device)).cpu() for x in (sums, uses))
        count = sums[0].item()
        if not count:
            raise UserError(f"none of the {len(held_out)} held-out images can be read: check the files")
        ratio, error, similarity, distance = (sums[1:] / count).tolist()
        found = {"psnr": ratio, "psnr_of_mean": -10 * math.log10(error), "ssim": similarity}
        if self.perceptual:
            found["perceptual_distance"] = distance
        found |= code_statistics(uses)
        for metric, network in active:
            key = (id(held_out), id(network))
            if id(network) in fresh:
                self._real[key] = self._finish(fresh[id(network)])
            distance = frechet_distance(self._real[key].stats, self._finish(made[id(network)]).stats)
            found[f"r{network.name(metric)}"] = distance
        return found

    def _finish(self, collector: Collector) -> Collector:
        return collector.finish(self.replicas.group if self.replicas.world > 1 else None, self.device)


def open_networks(device: torch.device, inception: str | None) -> list[tuple[str, Network]]:
    """FD-EffLite0 where its packages are installed (a warning otherwise), and FID with an Inception file.

    Raises ``UserError`` for a file that is not Inception's.
    """
    found: list[tuple[str, Network]] = []
    if inception:
        found.append(("fid", open_network("inception", device, inception=inception)))
    try:
        return [("fd", open_network("efflite0", device)), *found]
    except UserError as error:
        if place_of(os.environ).rank == 0:
            logger.warning("validation without rFD-EffLite0: %s", error)
        return found


@torch.no_grad()
def save_reconstructions(model: VQModel, pixels: Tensor, path: Path, provenance: dict[str, Any]) -> None:
    """Write a grid, originals above their reconstructions: ``pixels`` uint8 (N, H, W, 3), N at least 1."""
    model.eval()
    device = next(model.parameters()).device
    decoded = torch.from_numpy(to_pixels(model.decode_codes(model.encode(to_images(pixels, device)))))
    n, side = len(pixels), pixels.shape[1]
    canvas = np.full((2 * (side + GAP) - GAP, n * (side + GAP) - GAP, 3), 255, np.uint8)
    for row, images in enumerate((pixels, decoded)):
        for column in range(n):
            top, left = row * (side + GAP), column * (side + GAP)
            canvas[top : top + side, left : left + side] = images[column].numpy()
    save_grid(Image.fromarray(canvas), path, provenance)
