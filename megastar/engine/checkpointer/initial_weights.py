"""``train.init``: the weights that a run starts from, checked against the run before work starts.

Blocks, norms and head are taken as they are. The class table is taken, drawn anew or mapped row by row (``init_classes``).
RoPE has no weights: with ``init_resize`` it is recomputed for the new grid, and the table of target positions of a network
of random token order is interpolated. With ``init_any_order`` such a table is left out, or starts at zero.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.checkpoint.class_rows import match_classes, read_class_map
from megastar.checkpoint.convert_weights import WeightsFile, open_weights
from megastar.checkpoint.find_tokenizer import SHORT, identity_of
from megastar.checkpoint.find_weights import Weights, convert_hint, has_null_class
from megastar.checkpoint.hub.download import is_hub_source, local_source
from megastar.checkpoint.hub.layout import is_hub_folder
from megastar.checkpoint.llamagen_reader import CLASS_TABLE, NeedsOption
from megastar.checkpoint.source import open_source
from megastar.config.schema import ModelConfig, RunConfig, TrainConfig
from megastar.data.shards.manifest import Manifest
from megastar.engine.checkpointer.load import TARGETS
from megastar.engine.context import Context
from megastar.engine.input_pipeline.data_checks import RunData, downsample_of
from megastar.engine.rank_sync import on_all_ranks, run_on_main
from megastar.engine.zero.engines import Engines
from megastar.errors import UserError
from megastar.parallel.plan import split_of
from megastar.run_dir import checkpoint_dir
from megastar.run_dir.layout import MANIFEST
from megastar.utils.files import sha256
from megastar.utils.launcher import place_of

logger = logging.getLogger(__name__)
PREFIX = "transformer."
ARCHITECTURE = ("n_layer", "n_head", "dim", "ffn_dim", "vocab_size", "rope_base", "norm_eps")


@dataclass
class InitialWeights:
    """``rows``: for each row of the run's class table the row of the file's, None for one that stays as drawn."""

    weights: Weights
    network: WeightsFile
    rows: list[int | None]
    digest_of: Path

    @property
    def config(self) -> ModelConfig:
        assert isinstance(self.network.cfg, ModelConfig)
        return self.network.cfg

    def record(self, init: str, main: bool) -> dict[str, Any]:
        """What a checkpoint records of them; the hash only on the main rank, which writes it."""
        out = {"file": init, "model": self.config.name, **self.network.provenance}
        if is_hub_source(init):
            out["revision"] = self.network.path.name  # the commit
        elif self.network.path.is_dir() and not is_hub_folder(self.network.path):
            out["checkpoint"] = self.network.path.name
        return out | ({"sha256": sha256(self.digest_of)} if main else {})


def open_initial(cfg: RunConfig) -> InitialWeights | None:
    """The weights of ``train.init`` where the run will read them, that is before its first checkpoint, else None.

    Raises ``UserError`` for a file that is missing, damaged, or of another architecture. ``check_initial`` checks the rest.
    """
    t = cfg.train
    if not t.init or checkpoint_dir.latest(checkpoint_dir.folder_of(cfg.run)):
        return None
    path = local_source(t.init)
    if path.is_dir() and not is_hub_folder(path):
        network, weights, digest_of = _of_run(t)
    else:
        network = _of_file(path, t, cfg.model)
        weights = Weights(network.path)
        digest_of = weights.digest_file
        weights.__dict__["opened"] = network  # it is not opened again
    _check_architecture(t, network.cfg, cfg.model)
    _check_finite(t.init, network)
    return InitialWeights(weights, network, [], digest_of)


def _of_run(t: TrainConfig) -> tuple[WeightsFile, Weights, Path]:
    which = t.init_weights or "ema"
    if which not in ("ema", "student"):
        raise UserError(
            f"train.init_weights = {which}: the run {t.init} has the weights ema and student: give one of them"
        )
    source = open_source(Path(t.init))
    names = list(source.weights)
    network = WeightsFile(
        source.folder, source.cfg.model, {n: source.weights[n] for n in names}, lambda n: source.weight(n, which),
        source.provenance(which),
    )  # fmt: skip
    weights = Weights(source.folder, recorded=str(network.provenance.get("tokenizer", "")))
    weights.__dict__["opened"] = network
    return network, weights, source.folder / MANIFEST


def _of_file(path: Path, t: TrainConfig, model: ModelConfig) -> WeightsFile:
    """``open_weights``; what a file of LlamaGen does not store is taken from the run, where the run can know it."""
    options = dict[str, Any]()
    same = t.init_classes == "same"
    known: dict[str, dict[str, Any]] = {"--image-tokens": {"image_tokens": model.image_tokens}}
    if same:
        raster = replace(model, target_position="none")  # as all of LlamaGen's
        known |= {"--num-classes": {"num_classes": model.num_classes}, "--config": {"config": raster}}
    while True:
        try:
            found = open_weights(path, weights=t.init_weights or None, **options)
            break
        except NeedsOption as error:
            option = error.option.split()[0]
            if option == "--weights":
                raise UserError(str(error).replace("--weights ", "train.init_weights=")) from error
            more = known.pop(option, None)
            if more is None:
                raise UserError(f"train.init: {error}: {convert_hint(path, error)}") from error
            logger.info("train.init = %s does not store %s: taken from the run's model section", path, option[2:])
            options |= more
    if not isinstance(found.cfg, ModelConfig):
        raise UserError(f"train.init = {path} is a tokenizer: name the weights of a network")
    return found


def _check_architecture(t: TrainConfig, theirs: Any, ours: ModelConfig) -> None:
    differ = [
        f"{n} {getattr(theirs, n)}, not {getattr(ours, n)}"
        for n in ARCHITECTURE
        if getattr(theirs, n) != getattr(ours, n)
    ]
    if differ:
        raise UserError(
            f"train.init = {t.init} is of another network than this run's model: {'; '.join(differ)}: set model to the "
            "file's architecture"
        )
    if theirs.target_position != ours.target_position and not t.init_any_order:
        raise UserError(
            f"train.init = {t.init} was trained in {_order_of(theirs)}, this run reads tokens in {_order_of(ours)}: set "
            "train.init_any_order=true to start from these weights nevertheless, or set token_order.kind and "
            "model.target_position to theirs"
        )
    if theirs.image_tokens != ours.image_tokens and not t.init_resize:
        raise UserError(
            f"train.init = {t.init} has {theirs.image_tokens} tokens per image ({theirs.grid} x {theirs.grid}), "
            f"model.image_tokens is {ours.image_tokens}: set train.init_resize=true to continue on another grid, or change it"
        )
    if t.init_classes == "same" and theirs.num_classes != ours.num_classes:
        raise UserError(
            f"train.init = {t.init} has {theirs.num_classes} classes, model.num_classes is {ours.num_classes}: set "
            "train.init_classes=fresh for new class embeddings, or map to take some of its"
        )


def _order_of(model: ModelConfig) -> str:
    target = model.target_position
    return "raster order" if target == "none" else f"random order (model.target_position {target})"


def _check_finite(init: str, network: WeightsFile) -> None:
    for name in network.shapes:
        if not bool(network.read(name).isfinite().all()):
            raise UserError(f"train.init = {init}: {name} is not finite (NaN or infinite): take an earlier checkpoint")


# Against the data --------------------------------------------------------------------------------------------------
def check_initial(initial: InitialWeights | None, cfg: RunConfig, data: RunData | None) -> None:
    """Compare with the run's shards and tokenizer, and decide the rows of the class table. ``data`` None: no shards yet.

    Raises ``UserError``.
    """
    if initial is None:
        return
    manifest, main = data.train.manifest if data else None, place_of(os.environ).rank == 0
    _check_tokenizer(initial, cfg, data, main)
    if manifest is not None:
        _check_downsample(cfg.train.init, initial.network.provenance, manifest)
    initial.rows = _rows(cfg, initial, list(manifest.classes) if manifest else None, main)


def _check_tokenizer(initial: InitialWeights, cfg: RunConfig, data: RunData | None, main: bool) -> None:
    t, name = cfg.train, cfg.data.tokenizer
    ours = data.tokenizer if data else identity_of(name) if name and Path(name).is_file() else ""
    theirs = initial.weights.identity
    if not theirs or not ours:
        if main:
            lacking = f"train.init = {t.init}" if not theirs else f"data.shards = {cfg.data.shards}"
            logger.warning(
                "%s records no tokenizer hash: that the codes of the run are those that the weights were trained on cannot "
                "be checked", lacking,
            )  # fmt: skip
    elif theirs != ours:
        sentence = (
            f"train.init = {t.init} was trained on codes of the tokenizer {theirs[:SHORT]}, this run's codes are of "
            f"{ours[:SHORT]}"
        )
        if not t.init_any_tokenizer:
            raise UserError(
                f"{sentence}: encode the images with that tokenizer, or set train.init_any_tokenizer=true to start from "
                "these weights nevertheless"
            )
        if main:
            logger.warning("%s: started from nevertheless", sentence)


def _check_downsample(init: str, provenance: Mapping[str, Any], manifest: Manifest) -> None:
    theirs, ours = provenance.get("downsample"), downsample_of(manifest)
    if isinstance(theirs, int) and ours and theirs != ours:
        raise UserError(
            f"train.init = {init} was trained on codes that downsample images by {theirs}, this run's codes downsample by "
            f"{ours}: encode the images with a tokenizer that downsamples by {theirs}"
        )


def _rows(cfg: RunConfig, initial: InitialWeights, ours: list[str] | None, main: bool) -> list[int | None]:
    t, old, new = cfg.train, initial.config.num_classes, cfg.model.num_classes
    recorded = initial.network.provenance.get("classes")
    theirs = list(recorded) if isinstance(recorded, list) and len(recorded) == old else None
    null = old if has_null_class(initial.network.provenance) else None
    if t.init_classes == "fresh":
        return [None] * new + [null]
    if t.init_classes == "map":
        if t.init_class_map:
            found = read_class_map(t.init_class_map, new, ours, old, theirs)
        else:
            found = match_classes(t.init, ours, theirs) if ours is not None else [None] * new
        fresh = [i for i, row in enumerate(found) if row is None]
        if main and ours is not None:
            names = ", ".join(ours[i] for i in fresh[:5]) + (f" and {len(fresh) - 5} more" if len(fresh) > 5 else "")
            logger.info(
                "train.init: %d of %d class embeddings are taken%s", new - len(fresh), new,
                f"; new ones: {names}" if fresh else "",
            )  # fmt: skip
        return [*found, null]
    if ours and theirs and ours != theirs:
        if sorted(ours) == sorted(theirs):
            raise UserError(
                f"train.init = {t.init} numbers the same classes in another order: set train.init_classes=map to match them "
                "by name"
            )
        if main:
            i = next(i for i in range(new) if ours[i] != theirs[i])
            logger.warning(
                "train.init_classes = same takes class embeddings by number, but the names differ: class %d is %s in %s, "
                "%s in the shards", i, theirs[i], t.init, ours[i],
            )  # fmt: skip
    return [*range(new), null]


# Loading -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def load_initial(initial: InitialWeights | None, init: str, ctx: Context, engines: Engines) -> dict[str, Any] | None:
    """Put the weights into the masters of student and average; returns what a checkpoint records of them, None without any.

    Every rank reads one whole tensor at a time. Raises ``UserError`` where ranks found different checkpoints of a run.
    """
    if initial is None:
        return None
    mine = str(initial.network.path)
    theirs = run_on_main(ctx, lambda: mine)
    on_all_ranks(ctx, lambda: _same_source(init, mine, theirs))
    for shard in engines.shards():
        name = shard.name.removeprefix(PREFIX)
        if not shard.name.startswith(PREFIX) or name not in initial.network.shapes:
            continue
        value = initial.network.read(name).float()
        if name == TARGETS.removeprefix(PREFIX) and value.shape[0] != shard.shape[0]:
            value = resized_table(value, shard.shape[0])
        master = shard.view("fp32")
        if name == CLASS_TABLE:
            value, taken = mapped_table(value, initial.rows)
            part = slice(shard.start, shard.stop)
            rows, take = value.reshape(-1)[part].to(master), taken.reshape(-1)[part].to(master.device)
            master.copy_(torch.where(take, rows, master))
        else:
            split = split_of(shard.name) if ctx.tensor > 1 else None
            local = split.cut(value, ctx.tensor, ctx.mesh.tensor_rank) if split else value
            master.copy_(local.reshape(-1)[shard.start : shard.stop])
        shard.view("ema").copy_(master)
    engines.publish_masters()
    return initial.record(init, ctx.main)


def _same_source(init: str, mine: str, theirs: str) -> None:
    if mine != theirs:
        raise UserError(f"train.init = {init} is {mine} on one rank, {theirs} on another: name one of its checkpoints")


def resized_table(table: Tensor, positions: int) -> Tensor:
    """A row per grid position, (g * g, D), interpolated (bicubic) to another square grid: (positions, D)."""
    old, new = round(table.shape[0] ** 0.5), round(positions**0.5)
    grid = table.T.reshape(1, -1, old, old)  # (1, D, g, g)
    resized = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.contiguous()


def mapped_table(table: Tensor, rows: list[int | None]) -> tuple[Tensor, Tensor]:
    """Rows ``rows`` of ``table`` (R, D) -> values (len(rows), D), and which of these are taken, a mask of that shape."""
    index = torch.tensor([0 if row is None else row for row in rows])
    taken = torch.tensor([row is not None for row in rows])
    return table[index], taken[:, None].expand(len(rows), table.shape[1])
