"""Linear probe of a frozen block's features at several positions. Source: MAE's protocol.

MAE (main_linprobe.py): BatchNorm without affine, a linear layer, LARS, 90 epochs, lr 0.1 * batch / 256 at a batch of
16,384, 10 epochs of warm-up, cosine to 0, no weight decay. MAE uses random crops; here the features of one crop are cached.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from megastar.config.schema import DataConfig, ModelConfig
from megastar.data.shards.reader import ShardSet
from megastar.errors import UserError
from megastar.evaluation.lars import LARS, learning_rate
from megastar.model.transformer import Transformer
from megastar.utils.files import atomic_file, read_small, sha256, sha256_of, write_atomic
from megastar.utils.progress_bar import progress_bar

logger = logging.getLogger(__name__)
OPTIMIZERS = ("lars", "sgd")
MIN_LARS_IMAGES = 10_000_000  # over all epochs; with fewer, LARS at MAE's rate stays near the initial weights


def probe_positions(tokens: int, count: int = 8) -> list[int]:
    """Evenly spaced sequence positions counted from 1: for T = 256 and 8, 32, 64 ... 256."""
    return [tokens * (i + 1) // count for i in range(count)]


def load_crops(
    shards: str | Path, count: int = 1, limit: int | None = None, data: DataConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N * count, T) of ``count`` stored crops per image, the centre crop first, and classes (N * count,).

    ``limit``: only the first images. ``data``: cache and patience of shards on S3.
    """
    tokens = ShardSet(shards, data=data)
    centre, stored = tokens.manifest.centre_view, tokens.manifest.views
    if tokens.manifest.centre_note:
        logger.warning("%s: %s", shards, tokens.manifest.centre_note)
    views = [centre, *(v for v in range(stored) if v != centre)][:count]
    images = np.arange(min(len(tokens), limit or len(tokens)))
    codes, labels = tokens.gather(images, np.tile(views, (len(images), 1)))  # (N, count, T)
    return codes.reshape(-1, codes.shape[-1]), np.repeat(labels, count)


@torch.no_grad()
def probe_features(
    model: Transformer,
    codes: np.ndarray,
    *,
    block: int,
    positions: list[int],
    batch: int = 64,
    cache: str | Path | None = None,
    console: Console | None = None,
    title: str = "",
) -> np.ndarray:
    """Codes (N, T) -> output of ``block`` (counted from 1) with the null class at ``positions``: (N, P, D) fp32.

    The input of position p (counted from 1) is the null class and the first p - 1 codes. With a folder ``cache``, the
    features are stored there with their SHA-256, under a hash of the model's weights, the codes and the positions.
    """
    shape = (len(codes), len(positions), model.cfg.dim)
    with ExitStack() as stack:
        if cache is None:
            out: np.ndarray = np.empty(shape, np.float32)
        else:
            file = Path(cache) / f"probe-{_fingerprint(model, codes, block, positions)}.npy"
            if file.is_file() and (known := _stored(file, shape)) is not None:
                return known
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(atomic_file(file))
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        device = next(model.parameters()).device
        index = torch.tensor(positions, device=device) - 1
        was_training = model.training
        model.eval()
        bar = stack.enter_context(progress_bar(console, f"features {title}", len(codes)))
        for first in range(0, len(codes), batch):
            tokens = torch.from_numpy(codes[first : first + batch].astype(np.int64)).to(device)  # (B, T)
            null = torch.full((len(tokens),), model.cfg.num_classes, device=device)
            output = model(null, tokens[:, :-1], features_at=block, last_block=block, need_logits=False)
            out[first : first + batch] = output.features[:, index].float().cpu().numpy()
            bar.advance(len(tokens))
        model.train(was_training)
        if isinstance(out, np.memmap):
            out.flush()
            write_atomic(_hash_file(file), sha256(temporary).encode())
    return out


def _hash_file(file: Path) -> Path:
    """The file with the SHA-256 of a file of features."""
    return file.with_name(f"{file.name}.sha256")


def _stored(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in ``file`` if its header is the one that numpy writes for ``shape`` and its hash the recorded one."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    start = head.tell()
    with suppress(OSError), file.open("rb") as f:
        size = start + 4 * math.prod(shape)
        whole = f.read(start) == head.getvalue() and os.fstat(f.fileno()).st_size == size
        if whole and sha256_of(f).encode() == read_small(_hash_file(file), 64):
            return np.memmap(f, np.float32, "r", start, shape)
    logger.warning("%s is damaged, or its %s: the features are computed again", file, _hash_file(file).name)
    return None


def _fingerprint(model: Transformer, codes: np.ndarray, block: int, positions: list[int]) -> str:
    digest = hashlib.sha256(f"{block} {positions} {codes.shape}".encode())
    digest.update(np.ascontiguousarray(codes).data)
    for name, p in model.state_dict().items():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def linear_probe(
    model: Transformer,
    train_codes: np.ndarray,
    train_labels: np.ndarray,
    val_codes: np.ndarray,
    val_labels: np.ndarray,
    *,
    block: int,
    positions: int | Sequence[int] = 8,
    epochs: int = 90,
    batch: int = 0,
    lr: float = 0.0,
    optimizer: str = "lars",
    seed: int = 0,
    cache: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Top-1 accuracy at each position: codes (N, T), labels (N,), one view per image, no image in both sets.

    ``positions``: the number of evenly spaced ones, or a list, counted from 1. ``batch`` 0: MAE's 16,384 on ImageNet, and
    on smaller sets the batch that also gives 78 steps per epoch. ``lr`` 0: 0.1 * batch / 256. Keeps all features,
    N * positions * D * 4 bytes, in memory, or in a file in the folder ``cache``. Raises ``UserError``.
    """
    c = model.cfg
    for name, codes, labels in (("training", train_codes, train_labels), ("validation", val_codes, val_labels)):
        _check(c, name, codes, labels)
    if not 1 <= block <= c.n_layer:
        raise UserError(f"block {block} is outside 1..{c.n_layer}, the blocks of the model")
    count = positions if isinstance(positions, int) else len(positions)
    if not 1 <= count <= c.image_tokens:
        raise UserError(f"{count} positions: choose 1..{c.image_tokens}, the model's sequence length")
    at = probe_positions(c.image_tokens, positions) if isinstance(positions, int) else list(positions)
    if outside := [p for p in at if not 1 <= p <= c.image_tokens]:
        raise UserError(f"position {outside[0]} is outside 1..{c.image_tokens}, the model's sequence")
    if optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
    x, y = (
        probe_features(model, codes, block=block, positions=at, cache=cache, console=console, title=name)
        for name, codes in (("training", train_codes), ("validation", val_codes))
    )
    batch = min(batch or min(16384, max(64, len(x) // 78)), len(x))
    lr = lr or 0.1 * batch / 256
    accuracy = fit_probes(
        x, torch.as_tensor(train_labels).long(), y, torch.as_tensor(val_labels).long(), c.num_classes, epochs=epochs,
        batch=batch, lr=lr, optimizer=optimizer, seed=seed, device=next(model.parameters()).device, console=console,
    )  # fmt: skip
    warnings = []
    if optimizer == "lars" and len(x) * epochs < MIN_LARS_IMAGES:
        warnings.append(
            f"LARS at MAE's rate converges slowly: {epochs} epochs of {len(x)} images (ImageNet: 90 of 1,281,167); use "
            f"--optimizer sgd, or a higher --lr, for small sets"
        )
        logger.warning(warnings[0])
    return {
        "block": block,
        "positions": at,
        "accuracy": accuracy.tolist(),
        "train_pictures": len(x),
        "val_pictures": len(y),
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "optimizer": optimizer,
        "seed": seed,
        "warnings": warnings,
    }


def _check(c: ModelConfig, name: str, codes: np.ndarray, labels: np.ndarray) -> None:
    if codes.ndim != 2 or codes.shape[1] != c.image_tokens or len(codes) != len(labels) or not len(codes):
        raise UserError(
            f"{name} codes {codes.shape} and labels {labels.shape}: expected (N, {c.image_tokens}) and (N,) with N above 0"
        )
    if codes.max() >= c.vocab_size:
        raise UserError(f"{name} codes up to {codes.max()}, but the model's vocabulary ends at {c.vocab_size - 1}")
    if labels.min() < 0 or labels.max() >= c.num_classes:
        raise UserError(
            f"{name} labels in {labels.min()}..{labels.max()}, but the model's classes are 0..{c.num_classes - 1}"
        )


@torch.no_grad()
def fit_probes(
    train: np.ndarray | Tensor,
    train_labels: Tensor,
    val: np.ndarray | Tensor,
    val_labels: Tensor,
    classes: int,
    *,
    epochs: int = 90,
    batch: int = 512,
    lr: float = 0.2,
    optimizer: str = "lars",
    seed: int = 0,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Tensor:
    """One BatchNorm (no affine) + linear layer per position, trained together: (N, P, D) twice -> accuracy (P,).

    The gradient of the softmax regression is explicit, so besides the features only one position's logits (B, classes)
    are in memory.
    """
    N, P, D = train.shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.init.trunc_normal_(torch.empty(P, D, classes), std=0.01, generator=generator).to(device)
    bias = torch.zeros(P, classes, device=device)
    descent = LARS([weight], [bias], adaptive=optimizer == "lars")
    running_mean, running_var = torch.zeros(P, D, device=device), torch.ones(P, D, device=device)
    batch = min(batch, N)
    per_epoch, step = N // batch, 0
    gradients = [torch.empty_like(weight), torch.empty_like(bias)]
    with progress_bar(console, "linear probe", epochs * per_epoch) as bar:
        while step < epochs * per_epoch:
            for rows in torch.randperm(N, generator=generator)[: per_epoch * batch].split(batch):
                rows = rows.sort().values  # sequential reads of a file
                labels = train_labels[rows].to(device)
                x_all = _rows(train, rows).to(device)  # (B, P, D)
                var, mean = torch.var_mean(x_all, 0, correction=0)
                running_mean.lerp_(mean, 0.1)
                running_var.lerp_(var * (batch / max(1, batch - 1)), 0.1)  # as torch's BatchNorm: unbiased
                for p in range(P):
                    x = (x_all[:, p] - mean[p]) / (var[p] + 1e-6).sqrt()
                    error = torch.addmm(bias[p], x, weight[p]).softmax(-1)  # (B, classes)
                    error[torch.arange(batch, device=device), labels] -= 1
                    torch.mm(x.T, error.div_(batch), out=gradients[0][p])
                    gradients[1][p] = error.sum(0)
                descent.step(gradients, learning_rate(step / per_epoch, epochs, lr))
                step += 1
                bar.advance()
    hits = torch.zeros(P, dtype=torch.int64)
    for first in range(0, len(val), batch):
        rows = torch.arange(first, min(first + batch, len(val)))
        x_all, labels = _rows(val, rows).to(device), val_labels[rows].to(device)
        for p in range(P):
            x = (x_all[:, p] - running_mean[p]) / (running_var[p] + 1e-6).sqrt()
            hits[p] += (torch.addmm(bias[p], x, weight[p]).argmax(-1) == labels).sum().cpu()
    return hits.double() / len(val)


def _rows(x: np.ndarray | Tensor, rows: Tensor) -> Tensor:
    return x[rows] if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x[rows.numpy()]))
