"""What a frozen block knows about the class, read by a linear layer at several positions. Source: MAE's protocol."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.transformer import Transformer


def probe_positions(tokens: int, count: int = 8) -> list[int]:
    """Evenly spaced sequence positions counted from 1: for T = 256 and 8, 32, 64 ... 256."""
    return [tokens * (i + 1) // count for i in range(count)]


@torch.no_grad()
def probe_features(
    model: Transformer,
    codes: np.ndarray,
    *,
    block: int,
    positions: list[int],
    batch: int = 64,
    console: Console | None = None,
    title: str = "",
) -> Tensor:
    """Codes (N, T) -> output of ``block`` (counted from 1) with the null class at ``positions``: (N, P, D) fp32, CPU.

    Position p (counted from 1) has seen the null class and the first p - 1 codes.
    """
    c = model.cfg
    device = next(model.parameters()).device
    out = torch.empty(len(codes), len(positions), c.dim)
    index = torch.tensor(positions, device=device) - 1
    columns = (TextColumn(f"features {title}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    was_training = model.training
    model.eval()
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task("", total=len(codes))
        for first in range(0, len(codes), batch):
            tokens = torch.from_numpy(codes[first : first + batch].astype(np.int64)).to(device)  # (B, T)
            null = torch.full((len(tokens),), c.num_classes, device=device)
            output = model(null, tokens[:, :-1], features_at=block, last_block=block, need_logits=False)
            out[first : first + batch] = output.features[:, index].float().cpu()
            bar.advance(task, len(tokens))
    model.train(was_training)
    return out


def linear_probe(
    model: Transformer,
    train_codes: np.ndarray,
    train_labels: np.ndarray,
    val_codes: np.ndarray,
    val_labels: np.ndarray,
    *,
    block: int,
    positions: int = 8,
    epochs: int = 90,
    batch: int = 512,
    lr: float = 0.0,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Top-1 accuracy at each position: codes (N, T), labels (N,), one view a picture, split by picture.

    ``lr`` 0 takes 0.1 * batch / 256, MAE's rule. Keeps all features in memory: N * positions * D * 4 bytes. Raises
    ``UserError``.
    """
    for name, codes, labels in (("training", train_codes, train_labels), ("validation", val_codes, val_labels)):
        _check(model.cfg, name, codes, labels)
    if not 1 <= block <= model.cfg.n_layer:
        raise UserError(f"block {block} is outside 1..{model.cfg.n_layer}, the blocks of this model")
    if not 1 <= positions <= model.cfg.image_tokens:
        raise UserError(f"{positions} positions: choose 1..{model.cfg.image_tokens}, the model's sequence length")
    at = probe_positions(model.cfg.image_tokens, positions)
    x, y = (
        probe_features(model, codes, block=block, positions=at, console=console, title=name)
        for name, codes in (("training", train_codes), ("validation", val_codes))
    )
    batch = min(batch, len(x))
    lr = lr or 0.1 * batch / 256
    accuracy = fit_probes(
        x, torch.as_tensor(train_labels).long(), y, torch.as_tensor(val_labels).long(), model.cfg.num_classes,
        epochs=epochs, batch=batch, lr=lr, seed=seed, console=console,
    )  # fmt: skip
    return {
        "block": block,
        "positions": at,
        "accuracy": accuracy.tolist(),
        "train_pictures": len(x),
        "val_pictures": len(y),
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "seed": seed,
    }


def _check(c: ModelConfig, name: str, codes: np.ndarray, labels: np.ndarray) -> None:
    if codes.ndim != 2 or codes.shape[1] != c.image_tokens or len(codes) != len(labels) or not len(codes):
        raise UserError(
            f"{name} codes {codes.shape} and labels {labels.shape}: expected (N, {c.image_tokens}) and (N,) with N above 0"
        )
    if codes.max() >= c.vocab_size:
        raise UserError(f"{name} codes go up to {codes.max()}, the model's vocabulary ends at {c.vocab_size - 1}")
    if labels.min() < 0 or labels.max() >= c.num_classes:
        raise UserError(f"{name} classes lie in {labels.min()}..{labels.max()}, the model's in 0..{c.num_classes - 1}")


@torch.no_grad()
def fit_probes(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    classes: int,
    *,
    epochs: int = 90,
    batch: int = 512,
    lr: float = 0.2,
    momentum: float = 0.9,
    seed: int = 0,
    console: Console | None = None,
) -> Tensor:
    """One BatchNorm (no affine) + linear layer a position, trained together: (N, P, D) twice -> accuracy (P,).

    SGD with momentum, a tenth of the epochs warm-up, cosine to 0, no weight decay. MAE takes LARS, which only very
    large batches need. The gradient of the softmax regression is written out: P small layers in one product.
    """
    N, P, D = train.shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.init.trunc_normal_(torch.empty(P, D, classes), std=0.01, generator=generator)
    bias = torch.zeros(P, 1, classes)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    running_mean, running_var = torch.zeros(P, 1, D), torch.ones(P, 1, D)
    batch = min(batch, N)
    steps, step = epochs * (N // batch), 0
    columns = (TextColumn("linear probe"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as bar:
        task = bar.add_task("", total=steps)
        while step < steps:
            for rows in torch.randperm(N, generator=generator)[: N // batch * batch].split(batch):
                x = train[rows].transpose(0, 1)  # (P, B, D)
                mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
                running_mean.lerp_(mean, 0.1)
                running_var.lerp_(var, 0.1)
                x = (x - mean) / (var + 1e-6).sqrt()
                error = (x @ weight + bias).softmax(-1) - F.one_hot(train_labels[rows], classes)  # (P, B, classes)
                gradients = [x.transpose(1, 2) @ error / batch, error.mean(1, keepdim=True)]
                rate = lr * min((step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps)))
                for value, v, g in zip((weight, bias), velocity, gradients, strict=True):
                    value.sub_(v.mul_(momentum).add_(g), alpha=rate)
                step += 1
                bar.advance(task)
    x = (val.transpose(0, 1) - running_mean) / (running_var + 1e-6).sqrt()
    hits = (x @ weight + bias).argmax(-1) == val_labels  # (P, N_val)
    return hits.double().mean(1)
