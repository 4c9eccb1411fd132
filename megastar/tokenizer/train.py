"""Training of the tokenizer: reconstruction, perceptual and VQ losses, revival of unused codes."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from megastar.config.env_text import recorded
from megastar.config.schema import TokenizerTrainConfig
from megastar.errors import UserError
from megastar.run_dir.jsonl import JsonlWriter
from megastar.run_dir.layout import METRICS
from megastar.tokenizer.io import load_tokenizer
from megastar.tokenizer.losses import hinge_discriminator_loss, make_discriminator, make_perceptual, psnr
from megastar.tokenizer.quantizers.base import code_statistics, rows_at_once
from megastar.tokenizer.quantizers.vq import VectorQuantizer
from megastar.tokenizer.vq import VQModel, to_images
from megastar.utils.files import atomic_file
from megastar.utils.json_file import shown
from megastar.utils.progress_bar import progress_bar

logger = logging.getLogger(__name__)
BatchOf = Callable[[int], Tensor]
# Fields that may change when a run resumes.
MAY_DIFFER = ("steps", "threads", "out", "val_subset", "test_subset", "eval_every", "save_every")
NETWORKS = ("model", "average", "optimizer", "discriminator", "d_optimizer")  # in a checkpoint


def learning_rate(step: int, c: TokenizerTrainConfig) -> float:
    """Linear warm-up, then cosine to a hundredth of the peak, or constant."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    if c.schedule == "constant":
        return c.lr
    progress = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def kmeans(
    points: Tensor, k: int, iterations: int = 10, generator: torch.Generator | None = None, spherical: bool = True
) -> Tensor:
    """Points (N, E) -> centres (k, E), both unit vectors if ``spherical``; empty clusters are replaced by random points."""
    centres = points[torch.randperm(len(points), generator=generator)[:k]].clone()
    if len(centres) < k:
        centres = centres[torch.arange(k) % len(centres)]
    for _ in range(iterations):
        # |c|^2 is 1 on the sphere, and |x|^2 is the same for every centre.
        halves = centres.square().sum(1) / 2
        nearest = torch.cat([(part @ centres.t() - halves).argmax(1) for part in points.split(rows_at_once(k))])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=k)
        empty = counts == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=1) if spherical else sums / counts.clamp_min(1)[:, None]
    return centres


class TokenizerTrainer:
    """The state of a training run. ``batch_of(step)`` returns uint8 images (B, H, W, 3), a pure function of the step."""

    def __init__(self, c: TokenizerTrainConfig, device: torch.device, dtype: torch.dtype, batch_of: BatchOf):
        torch.manual_seed(c.seed)
        self.c, self.device, self.dtype, self.batch_of = c, device, dtype, batch_of
        self.model = self._initial().to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay)
        self.perceptual = make_perceptual(c)
        if self.perceptual is not None:
            self.perceptual.to(device)
        self.discriminator: nn.Module | None = None
        self.d_optimizer: torch.optim.Optimizer | None = None
        if c.adversarial:
            self.discriminator, self.d_optimizer = make_discriminator(c)
            self.discriminator.to(device)
        self.uses = torch.zeros(c.tokenizer.codebook_size, dtype=torch.long)  # of each code since the last revival
        self.dead = 0  # codes without a use at the last revival
        self.step = 0

    def _initial(self) -> VQModel:
        if not self.c.init:
            return VQModel(self.c.tokenizer)
        model = load_tokenizer(self.c.init)
        found, wanted = asdict(model.config), asdict(self.c.tokenizer)
        differing = [f"{k}: {found[k]}, not {v}" for k, v in wanted.items() if found[k] != v]
        if differing:
            raise UserError(
                f"init {self.c.init} has another architecture ({'; '.join(differing)}): set tokenizer.* to the file's values"
            )
        return model.requires_grad_(True)

    # One step ------------------------------------------------------------------------------------------------
    def train_step(self, images: Tensor) -> dict[str, float]:
        c = self.c
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, c)
        self.model.train()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z = self.model.latents(images)
            if self.step < c.continuous_steps:
                recon = self.model.decode(self.model.quantize.unquantized(z))
                vq = z.new_zeros((), dtype=torch.float32)
                batch_codes: dict[str, float] = {}
            else:
                q = self.model.quantize(z, c.entropy_temperature if c.entropy else None)
                recon = self.model.decode(q.latents)
                vq = q.codebook_loss + c.commitment * q.commitment_loss + c.entropy * q.entropy_loss
                uses = torch.bincount(q.codes.flatten().cpu(), minlength=len(self.uses))
                self.uses += uses
                batch_codes = {f"batch_{name}": value for name, value in code_statistics(uses).items()}
            recon = recon.float()
            l2 = (recon - images).square().mean()
            perceptual = self.perceptual(images, recon) if self.perceptual else l2.new_zeros(())
            loss = l2 + c.perceptual * perceptual + vq
            if self.discriminator and self.step >= c.adversarial_start:
                loss = loss - c.adversarial * self.discriminator(recon).float().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise UserError(
                f"tokenizer step {self.step}: the gradient norm is {norm.item()}; reduce lr (now {c.lr}) and resume"
            )
        self.optimizer.step()
        self._train_discriminator(images, recon.detach())
        self._update_average()
        self.step += 1
        if self.step == c.continuous_steps:
            self._set_codebook(z.detach())
        elif c.revive_every and self.step > c.continuous_steps and self.step % c.revive_every == 0:
            self._revive(z.detach())
        metrics = {"loss": loss, "l2": l2, "perceptual": perceptual, "vq": vq, "grad_norm": norm}
        return {name: value.item() for name, value in metrics.items()} | batch_codes

    def _train_discriminator(self, real: Tensor, fake: Tensor) -> None:
        if self.discriminator is None or self.d_optimizer is None or self.step < self.c.adversarial_start:
            return
        self.d_optimizer.zero_grad(set_to_none=True)  # also removes the gradients of the generator's loss
        loss = hinge_discriminator_loss(self.discriminator(real), self.discriminator(fake))
        if self.c.discriminator == "llamagen":
            (self.c.adversarial * loss).backward()
            torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        else:
            loss.backward()
        self.d_optimizer.step()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.c.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    # The codebook of vq ---------------------------------------------------------------------------------------
    def _points(self, z: Tensor) -> Tensor:
        flat = z.float().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        return F.normalize(flat, dim=1) if self.c.tokenizer.codebook_l2_norm else flat

    @torch.no_grad()
    def _set_codebook(self, z: Tensor) -> None:
        pool = [self._points(z)]
        wanted = 16 * self.c.tokenizer.codebook_size
        step = self.step
        while sum(map(len, pool)) < wanted:  # the next batches
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                pool.append(self._points(self.model.latents(to_images(self.batch_of(step), self.device))))
            step += 1
        centres = kmeans(torch.cat(pool), self.c.tokenizer.codebook_size, spherical=self.c.tokenizer.codebook_l2_norm)
        for model in (self.model, self.average):
            _codebook(model).copy_(centres)

    @torch.no_grad()
    def _revive(self, z: Tensor) -> None:
        """Count the codes without a use since the last count; vq replaces them by encoder outputs of this batch."""
        dead = torch.nonzero(self.uses == 0).flatten()
        self.dead = len(dead)
        if len(dead) and self.c.tokenizer.quantizer == "vq" and self.step < 0.8 * self.c.steps:
            points = self._points(z)
            chosen = points[torch.randint(len(points), (len(dead),))].to(self.device)
            state = self.optimizer.state[_codebook(self.model)]
            for model in (self.model, self.average):
                _codebook(model)[dead] = chosen
            for name in ("exp_avg", "exp_avg_sq"):
                state[name][dead] = 0
        self.uses.zero_()

    # Scores --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def score(self, pixels: Tensor, batch: int = 128) -> dict[str, float]:
        """``score`` of uint8 images (N, H, W, 3) with the averaged weights."""
        return score(self.average, pixels, self.device, batch)

    # Checkpoints ---------------------------------------------------------------------------------------------
    def save(self, path: Path) -> None:
        state = {k: getattr(self, k).state_dict() for k in NETWORKS if getattr(self, k)}
        state |= {"step": self.step, "uses": self.uses, "dead": self.dead}
        state |= {"rng": torch.get_rng_state(), "config": recorded(asdict(self.c))}
        with atomic_file(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a state that ``save`` wrote. Raises ``UserError``, also if its configuration differs."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            old, values = _with_missing(dict(state["config"])), asdict(self.c)
            new = recorded(values)
            differing = [
                f"{k}: {shown(str(old.get(k)), 400)} -> {new[k]}"
                for k in new
                if k not in MAY_DIFFER and old.get(k) not in (new[k], values[k])
            ]
            if not differing:
                self._restore(state)
        except Exception as error:  # torch.load raises many types for damaged files
            raise UserError(
                f"{path} is damaged ({shown(str(error))}): restore it, or remove it to start again"
            ) from error
        if differing:
            raise UserError(
                f"{path} has another configuration ({'; '.join(differing)}): choose another out=... or remove it"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        step, uses, dead = state["step"], state["uses"], state.get("dead", 0)
        if not (type(step) is type(dead) is int and step >= 0 <= dead):
            raise ValueError(f"step {step!r}, dead {dead!r}")
        if uses.shape != self.uses.shape or uses.dtype != self.uses.dtype:
            raise ValueError(f"uses is {uses.dtype} {tuple(uses.shape)}")
        for k in NETWORKS:
            if getattr(self, k) and k in state:
                getattr(self, k).load_state_dict(state[k])
        torch.set_rng_state(state["rng"])
        self.step, self.uses, self.dead = step, uses, dead

    # The loop ------------------------------------------------------------------------------------------------
    def fit(
        self,
        holdout: Tensor | None,
        out: Path,
        console: Console,
        stop: Callable[[], bool] = lambda: False,
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Train to ``steps``, resuming from ``out/last.pt`` if it exists. Returns the last scores.

        ``stop``: save after this step and return. ``check`` is called before each save; it raises if another process
        has taken over ``out``.
        """
        c, last = self.c, out / "last.pt"
        if last.is_file():
            self.load(last)
            logger.info("resumed %s at step %d", last, self.step)
        scores: dict[str, float] = {}
        rows = JsonlWriter(out / METRICS)
        rows.cut_after(self.step)
        with progress_bar(console, "tokenizer", c.steps, done=self.step) as bar:
            while self.step < c.steps and not stop():
                start = time.perf_counter()
                metrics = self.train_step(to_images(self.batch_of(self.step), self.device))
                rate = c.batch / (time.perf_counter() - start)
                text = [f"loss {metrics['loss']:.4f}", f"{rate:.0f} images/s"]
                bar.update(self.step, "  ".join(text + [f"{k} {v:.4g}" for k, v in scores.items()]))
                row = {"step": self.step, "images_per_s": round(rate, 1), **metrics, "dead": self.dead}
                is_last = self.step == c.steps
                if (
                    holdout is not None
                    and self.step > c.continuous_steps
                    and (is_last or self.step % c.eval_every == 0)
                ):
                    scores = self.score(holdout)
                    row |= scores
                if self.step % 50 == 0 or scores.keys() & row.keys():
                    rows.append(row)
                if is_last or self.step % c.save_every == 0 or stop():
                    check()
                    self.save(last)
        if self.step < c.steps and not last.is_file():  # stopped before the first step
            self.save(last)
        rows.flush(sync=True)
        return scores


def _codebook(model: VQModel) -> Tensor:
    """The weights of vq's codebook (V, E)."""
    assert isinstance(model.quantize, VectorQuantizer)
    return model.quantize.embedding.weight


@torch.no_grad()
def score(model: VQModel, pixels: Tensor, device: torch.device | str = "cpu", batch: int = 128) -> dict[str, float]:
    """Reconstruct uint8 images (N, H, W, 3) in fp32.

    Returns ``psnr`` (dB, mean over images), ``psnr_of_mean`` (dB, of the mean squared error over all), ``codes_used``
    (share of the codebook used by these images) and ``perplexity`` (of their codes; quantizers/base.py).
    """
    ratios, uses = [], torch.zeros(model.config.codebook_size, dtype=torch.long)
    model.eval()
    for part in pixels.split(batch):
        images = to_images(part, device)
        codes = model.encode(images)
        uses += torch.bincount(codes.flatten().cpu(), minlength=len(uses))
        ratios.append(psnr(images, model.decode_codes(codes)).double().cpu())
    return summary_of(torch.cat(ratios), uses)


def summary_of(ratios: Tensor, uses: Tensor) -> dict[str, float]:
    """The mean PSNR (dB) of images with ``ratios``, the PSNR of their mean squared error, and ``code_statistics``."""
    return {
        "psnr": ratios.mean().item(),
        "psnr_of_mean": -10 * math.log10((10 ** (-ratios / 10)).mean().item()),
        **code_statistics(uses),
    }


def _with_missing(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the defaults of the fields that did not exist when it was written."""
    defaults = recorded(asdict(TokenizerTrainConfig()))
    tokenizer = config.get("tokenizer")
    network = defaults["tokenizer"] | tokenizer if isinstance(tokenizer, dict) else tokenizer
    return defaults | config | {"tokenizer": network}
