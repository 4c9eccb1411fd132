"""Training of the tokenizer, one step at a time: reconstruction, perceptual and VQ losses, revival of unused codes.

The step is that of the global batch: on several ranks (``Replicas``) each computes the losses of its part, gradients are
averaged, and what concerns the codebook is decided from the codes and latents of all ranks. engine/tokenizer/ has the loop.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.config.env_text import recorded
from megastar.config.schema import TokenizerTrainConfig
from megastar.errors import UserError
from megastar.parallel.batch_norm import use_global_batch
from megastar.parallel.replicas import Replicas
from megastar.tokenizer.io import load_tokenizer
from megastar.tokenizer.losses import hinge_discriminator_loss, make_discriminator, make_perceptual
from megastar.tokenizer.quantizers.base import code_statistics, rows_at_once
from megastar.tokenizer.quantizers.vq import VectorQuantizer
from megastar.tokenizer.vq import VQModel, to_images
from megastar.utils.files import atomic_file
from megastar.utils.json_file import shown

BatchOf = Callable[[int], Tensor]
# Fields that may change when a run resumes.
MAY_DIFFER = (
    "steps", "threads", "out", "val_subset", "test_subset", "eval_every", "save_every", "log_every", "faults"
)  # fmt: skip
NETWORKS = ("model", "average", "optimizer", "discriminator", "d_optimizer")  # in a checkpoint
DROPOUT = int.from_bytes(b"drop", "big")  # makes dropout's random numbers independent of other uses of the seed


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
    """The state of a training run, equal on all ranks of ``replicas``.

    ``batch_of(step)`` returns this rank's part of a step's uint8 images, (B / ranks, H, W, 3). The batch is a pure function
    of the step. Here it is only called for k-means, which needs more images than one step has.
    """

    def __init__(
        self,
        c: TokenizerTrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        batch_of: BatchOf,
        replicas: Replicas | None = None,
    ):
        torch.manual_seed(c.seed)
        self.c, self.device, self.dtype, self.batch_of = c, device, dtype, batch_of
        self.replicas = replicas or Replicas()
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
        # The random numbers of k-means and revivals, the same on all ranks.
        self.draws = torch.Generator()
        self.draws.set_state(torch.get_rng_state())
        self.batch_uses: Tensor | None = None  # uses of each code in the last step on this rank
        self.uses = torch.zeros(
            c.tokenizer.codebook_size, dtype=torch.long
        )  # of each code, on this rank, since a revival
        self.dead = 0  # codes without a use on any rank at the last revival
        self.step = 0
        self.pictures: dict[str, Any] | None = None  # count and digest of the training images, if a checkpoint has them
        for network in filter(None, (self.model, self.average, self.discriminator)):
            use_global_batch(network, self.replicas)
        self.model.quantize.average = self.replicas.mean

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

    def start_equal(self) -> None:
        """Give all ranks the weights of rank 0. A collective."""
        self.replicas.from_main(self._weights())

    def _weights(self) -> Iterator[Tensor]:
        """Parameters and buffers, which are equal on all ranks."""
        for network in filter(None, (self.model, self.average, self.discriminator)):
            yield from (p.data for p in network.parameters())
            yield from network.buffers()

    @property
    def embedding(self) -> Tensor | None:
        """The codebook, where it is learned: (V, E)."""
        embedding = getattr(self.model.quantize, "embedding", None)
        return embedding.weight if isinstance(embedding, nn.Embedding) else None

    @property
    def is_vq(self) -> bool:
        return self.c.tokenizer.quantizer == "vq"

    # One step ------------------------------------------------------------------------------------------------
    def train_step(self, images: Tensor) -> dict[str, Tensor]:
        """One optimizer step; ``images`` (B / ranks, 3, H, W) in [-1, 1] are this rank's part of the step's batch.

        Returns scalars: the losses of this rank's part, and ``grad_norm``, of all.
        """
        c = self.c
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, c)
        if c.tokenizer.dropout:
            place = [c.seed, DROPOUT, self.step, self.replicas.rank]
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        self.model.train()
        codes: Tensor | None = None
        self.batch_uses = None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z = self.model.latents(images)
            if self.step < c.continuous_steps:
                recon = self.model.decode(self.model.quantize.unquantized(z))
                vq = z.new_zeros((), dtype=torch.float32)
            else:
                q = self.model.quantize(z, c.entropy_temperature if c.entropy else None)
                recon = self.model.decode(q.latents)
                vq = q.codebook_loss + c.commitment * q.commitment_loss + c.entropy * q.entropy_loss
                codes = q.codes
            recon = recon.float()
            l2 = (recon - images).square().mean()
            perceptual = self.perceptual(images, recon) if self.perceptual else l2.new_zeros(())
            loss = l2 + c.perceptual * perceptual + vq
            if self.discriminator and self.step >= c.adversarial_start:
                loss = loss - c.adversarial * self.discriminator(recon).float().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if codes is not None:  # counted once the backward pass is queued: the host waits for the codes
            self.batch_uses = torch.bincount(codes.flatten().cpu(), minlength=len(self.uses))
            self.uses += self.batch_uses
        self.replicas.average_gradients(self.model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):  # on all ranks alike
            raise UserError(
                f"tokenizer step {self.step}: the gradient norm is {norm.item()}; reduce lr (now {c.lr}) and resume"
            )
        self.optimizer.step()
        metrics = {"loss": loss, "l2": l2, "perceptual": perceptual, "vq": vq, "grad_norm": norm}
        metrics |= self._train_discriminator(images, recon.detach())
        self._update_average()
        self.step += 1
        if self.step == c.continuous_steps:
            self._set_codebook(z.detach())
        elif c.revive_every and self.step > c.continuous_steps and self.step % c.revive_every == 0:
            self._revive(z.detach())
        return {name: value.detach() for name, value in metrics.items()}

    def batch_codes(self) -> dict[str, float]:
        """``batch_codes_used`` and ``batch_perplexity`` of the last step's global batch; {} without quantization.

        Called by all ranks alike.
        """
        if self.batch_uses is None:
            return {}
        uses = self.replicas.sum(self.batch_uses.to(self.device)).cpu()
        return {f"batch_{name}": value for name, value in code_statistics(uses).items()}

    def _train_discriminator(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        if self.discriminator is None or self.d_optimizer is None or self.step < self.c.adversarial_start:
            return {}
        self.d_optimizer.zero_grad(set_to_none=True)  # also removes the gradients of the generator's loss
        loss = hinge_discriminator_loss(self.discriminator(real), self.discriminator(fake))
        llamagen = self.c.discriminator == "llamagen"
        (self.c.adversarial * loss if llamagen else loss).backward()
        self.replicas.average_gradients(self.discriminator.parameters())
        if llamagen:
            torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), 1.0)
        self.d_optimizer.step()
        return {"discriminator": loss}

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.c.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    # The codebook of vq -------------------------------------------------------------------------------------------
    def _points(self, z: Tensor) -> Tensor:
        """This rank's latents (B / ranks, E, h, w) -> points (B * h * w, E) of the global batch."""
        flat = self.replicas.gather(z.float()).permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        return F.normalize(flat, dim=1) if self.c.tokenizer.codebook_l2_norm else flat

    @torch.no_grad()
    def _set_codebook(self, z: Tensor) -> None:
        if self.embedding is None or not self.is_vq:
            return
        pool = [self._points(z)]
        wanted = 16 * self.c.tokenizer.codebook_size
        step = self.step
        while sum(map(len, pool)) < wanted:  # the next batches
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                z = self.model.latents(to_images(self.batch_of(step), self.device))
            pool.append(self._points(z))
            step += 1
        size, spherical = self.c.tokenizer.codebook_size, self.c.tokenizer.codebook_l2_norm
        centres = kmeans(torch.cat(pool), size, generator=self.draws, spherical=spherical)
        self.replicas.from_main([centres])  # on a GPU the order of its sums may differ
        for model in (self.model, self.average):
            _codebook(model).copy_(centres)

    @torch.no_grad()
    def _revive(self, z: Tensor) -> None:
        """Count the codes without a use on any rank since the last count; vq replaces them by encoder outputs of this
        batch."""
        dead = torch.nonzero(self.all_uses() == 0).flatten()
        self.dead = len(dead)
        embedding = self.embedding
        if embedding is not None and self.is_vq and len(dead) and self.step < 0.8 * self.c.steps:
            points = self._points(z)
            chosen = points[torch.randint(len(points), (len(dead),), generator=self.draws)].to(self.device)
            state = self.optimizer.state[embedding]
            for model in (self.model, self.average):
                _codebook(model)[dead] = chosen
            for name in ("exp_avg", "exp_avg_sq"):
                state[name][dead] = 0
        self.uses.zero_()

    def all_uses(self) -> Tensor:
        """Uses of each code since the last revival, on all ranks: (V,) int64 on the CPU. A collective."""
        return self.replicas.sum(self.uses.to(self.device)).cpu()

    # Checkpoints ---------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """What ``save`` writes; it refers to the live tensors. A collective, because codes are counted on each rank."""
        state = {k: getattr(self, k).state_dict() for k in NETWORKS if getattr(self, k)}
        state |= {"step": self.step, "uses": self.all_uses(), "dead": self.dead, "rng": self.draws.get_state()}
        state["config"] = recorded(asdict(self.c))
        return state | ({"pictures": self.pictures} if self.pictures else {})

    def save(self, path: Path, state: Mapping[str, Any] | None = None) -> None:
        """Write ``state``, which defaults to that of this step. Raises ``OSError``."""
        state = self.state() if state is None else state
        with atomic_file(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, content: bytes | None = None) -> None:
        """Continue from a state that ``save`` wrote, on any number of ranks. ``content``: that of the file, if it is read
        elsewhere. Raises ``UserError``, also if its configuration differs or it has more than ``steps`` steps.
        """
        try:
            file = path if content is None else io.BytesIO(content)
            state = torch.load(file, map_location="cpu", weights_only=True)
            differing = self._differences(dict(state["config"]))
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
        if self.step > self.c.steps:  # a result of ``steps`` steps cannot be made from it
            raise UserError(
                f"{path} has {self.step} steps, steps is {self.c.steps}: set steps to at least {self.step}, or choose another out=..."
            )

    def _differences(self, old: dict[str, Any]) -> list[str]:
        """The fields that may not differ and do. Fields that ``old`` lacks have their defaults: they are newer than it."""
        values = asdict(self.c)
        new, before = recorded(values), with_defaults(old, type(self.c))
        return [
            f"{k}: {shown(str(before.get(k)), 400)} -> {new[k]}"
            for k in new
            if k not in MAY_DIFFER and before.get(k) not in (new[k], values[k])
        ]

    def _restore(self, state: dict[str, Any]) -> None:
        step, uses, dead, pictures = state["step"], state["uses"], state.get("dead", 0), state.get("pictures")
        if not (type(step) is type(dead) is int and step >= 0 <= dead):
            raise ValueError(f"step {step!r}, dead {dead!r}")
        if uses.shape != self.uses.shape or uses.dtype != self.uses.dtype:
            raise ValueError(f"uses is {uses.dtype} {tuple(uses.shape)}")
        if not (pictures is None or (isinstance(pictures, dict) and {"count", "digest"} <= pictures.keys())):
            raise ValueError(f"pictures {pictures!r}")
        for k in NETWORKS:
            if getattr(self, k) and k in state:
                getattr(self, k).load_state_dict(state[k])
        self.draws.set_state(state["rng"])
        self.step, self.dead, self.pictures = step, dead, pictures
        self.uses = uses if self.replicas.rank == 0 else torch.zeros_like(uses)

    def replicas_agree(self) -> bool:
        """Whether weights, averages and optimizer states have the same bits on all ranks. A collective."""
        states = [o.state[p] for o in (self.optimizer, self.d_optimizer) if o for p in _parameters(o) if p in o.state]
        moments = [s[name] for s in states for name in ("exp_avg", "exp_avg_sq")]
        return self.replicas.all_equal([*self._weights(), *moments])


def _codebook(model: VQModel) -> Tensor:
    """The weights of vq's codebook (V, E)."""
    assert isinstance(model.quantize, VectorQuantizer)
    return model.quantize.embedding.weight


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def with_defaults(old: dict[str, Any], schema: type) -> dict[str, Any]:
    """Fields of an older version of ``schema``, with the defaults of the fields that it did not have."""
    defaults = schema()
    out = dict(old)
    for f in fields(schema):
        default = getattr(defaults, f.name)
        if is_dataclass(default) and isinstance(out.get(f.name), dict):
            out[f.name] = with_defaults(out[f.name], type(default))
        elif f.name not in out:
            out[f.name] = recorded(asdict(defaults))[f.name]
    return out
