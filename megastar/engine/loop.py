"""The training loop. ``train`` is what `megastar train` calls on every rank."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megastar.config.load import diff_configs, load_config, resolve_batch, save_config
from megastar.config.schema import RunConfig
from megastar.data.loader import TokenLoader, check_enough, check_manifest, validation_batches
from megastar.data.manifest import Manifest, load_manifest
from megastar.data.order import VERSION as ORDER
from megastar.data.store import is_remote
from megastar.engine import checkpoint, folders
from megastar.engine.build import Context, Engines, build, start
from megastar.engine.errors import NonFiniteLoss
from megastar.engine.faults import PREEMPTED, Question, StopFlag, check_moved
from megastar.engine.metrics import Metrics
from megastar.engine.schedule import learning_rate, total_steps
from megastar.engine.step import average_over_ranks, losses, set_schedules, validation_loss
from megastar.engine.supply import Starved, Supply, leave, on_all_ranks
from megastar.errors import UserError
from megastar.model.io import read_model_metadata
from megastar.tokenizer.io import tokenizer_hash


def train(cfg: RunConfig, *, dry_run: bool = False) -> None:
    """Train to the end, resuming from the run folder's newest checkpoint. Exits with 85 when a signal asked to stop."""
    there = is_remote(cfg.data.shards) or Path(cfg.data.shards).exists()
    manifest, validation = open_data(cfg) if not dry_run or there else (None, None)
    if cfg.train.init and not folders.latest(folders.folder_of(cfg)):
        read_model_metadata(cfg.train.init)  # it exists, before anything is built
    stop = StopFlag()  # a signal while the engines are built is heeded at the first step
    ctx = start(cfg)
    resolve_batch(cfg, ctx.world)  # before the run folder exists
    if not dry_run:
        claim_run_folder(cfg, ctx)
    engines = build(cfg, ctx)
    if dry_run:
        from megastar.engine.dry_run import describe

        describe(cfg, ctx, engines, manifest)
        return
    assert manifest is not None
    found = checkpoint.newest(ctx, folders.folder_of(cfg))
    done, data = 0, {"data": digest_of(manifest), "val_data": digest_of(validation)}
    if found:
        restored = checkpoint.load(cfg, ctx, engines, found)
        done, origin = restored["step"], restored.get("init")
        check_same_data(cfg, restored, data, found)
        check_same_order(cfg, manifest, restored, found)
    else:
        origin = checkpoint.load_initial(cfg, ctx, engines) if cfg.train.init else None
        checkpoint.seed_dropout(cfg, ctx, 0)
    steps = total_steps(cfg, manifest.samples)
    if done >= steps:
        if ctx.main:
            Console().print(f"{cfg.run} is done: {done} of {steps} steps; raise train.steps to go on")
        return
    loader = on_all_ranks(ctx, lambda: make_loader(cfg, ctx, engines, done))
    metrics = Metrics(Path(cfg.run), done, steps, cfg.train.log_every, ctx.main)
    text = f"resumed {found} at step {done}" if found else f"{cfg.run}: {steps} steps on {ctx.world} rank(s)"
    metrics.event("resumed" if found else "started", text, steps=steps, ranks=ctx.world)
    if not manifest.tokenizer_sha256:
        metrics.note(f"{cfg.data.shards} does not say which tokenizer made it: that it fits is taken on trust")
    about = {
        "steps": steps,
        **data,
        "order": ORDER,
        "classes": manifest.classes,
        "init": origin,
        "command": " ".join(["megastar", *sys.argv[1:]]),
    }
    try:
        run(cfg, ctx, engines, loader, metrics, done, about, stop)
    except (Exception, KeyboardInterrupt) as error:
        metrics.event("error", " ".join(f"{type(error).__name__}: {error}".split()), note=False)
        raise
    finally:
        loader.close()
        metrics.close()


def run(
    cfg: RunConfig,
    ctx: Context,
    engines: Engines,
    loader: TokenLoader,
    metrics: Metrics,
    done: int,
    about: dict[str, Any],
    stop: StopFlag,
) -> None:
    """The loop itself: batch -> losses -> backward -> agree -> step -> teacher. ``about`` goes into each checkpoint."""
    supply, steps = Supply(loader, ctx, lambda: bool(stop.signal)), about["steps"]
    saver = checkpoint.Saver(cfg, ctx, engines)
    validation = on_all_ranks(ctx, lambda: make_validation(cfg, ctx, engines))
    engines.student.train()
    for step in range(done, steps):
        try:
            sums, signal_number, waited = train_step(cfg, ctx, engines, saver, supply, stop, step, steps)
        except NonFiniteLoss:
            saver.finish()  # the save under way is good
            raise
        except Starved as starved:
            leave(saver, supply, metrics, about, done, step, starved.signal)
        about.pop("val_loss_ar", None)
        metrics.waited(waited)
        if (step + 1) % cfg.train.log_every == 0 or step + 1 == steps:
            row = average_over_ranks(ctx, sums)
            row |= {"grad_norm": engines.grad_norm(), "lr": learning_rate(cfg, step, steps)}
        else:
            row = {}
        metrics.step(step + 1, cfg.train.global_batch, row)
        metrics.saved(saver.done)
        last = step + 1 == steps
        if validation and (last or (step + 1) % cfg.train.val_every == 0):
            about["val_loss_ar"] = value = validation_loss(cfg, engines, ctx, validation)
            metrics.write(step + 1, {"val_loss_ar": value})
            metrics.note(f"step {step + 1}: validation next-token loss {value:.4f}")
        if last or signal_number or (step + 1) % cfg.train.save_every == 0:
            metrics.write(step + 1, {"save_blocked_s": saver.save(step + 1, about)})
        if signal_number and not last:
            metrics.saved(saver.finish())
            metrics.event("signal", f"signal {signal_number}: saved {saver.done}; the same command resumes")
            raise SystemExit(PREEMPTED)  # the next run's uploads catch up
    if problem := saver.close():
        metrics.event("warning", problem)
    metrics.saved(saver.done)
    metrics.event("finished", f"{steps} steps are done", note=False)


def train_step(
    cfg: RunConfig,
    ctx: Context,
    engines: Engines,
    saver: checkpoint.Saver,
    supply: Supply,
    stop: StopFlag,
    step: int,
    steps: int,
) -> tuple[dict[str, torch.Tensor], int, float]:
    """One optimizer step over its micro-batches; returns the mean of its metrics, the stop signal, if any, and the
    seconds that it waited for data."""
    sums: dict[str, torch.Tensor] = {}
    total = 0.0
    supply.begin_step()
    for _ in range(engines.accumulation):
        loss, parts = losses(cfg, engines, ctx, supply.next(), step)
        question = Question(ctx, loss, stop.signal, saver.failed, supply.dry, supply.waited())
        engines.student.backward(loss)
        finite, signal_number, lost, dry, waited = question.answer()
        total += waited
        if dry:
            raise Starved(signal_number)
        if not finite:
            raise NonFiniteLoss(
                f"step {step}: the loss is not finite; resume from the last checkpoint with a lower optim.lr"
            )
        if lost:
            saver.finish()  # raises
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach().float() / engines.accumulation
        if engines.student.is_gradient_accumulation_boundary():
            set_schedules(cfg, engines, step, steps)
        skipped = engines.student.skipped_steps
        engines.student.step()
        check_moved(skipped, engines.student.skipped_steps, step)
    engines.refresh_teacher()
    return sums, signal_number, total


# Data ------------------------------------------------------------------------------------------------------------
def open_data(cfg: RunConfig) -> tuple[Manifest, Manifest | None]:
    """Check everything about the shards that can be known before anything is built; training's and validation's."""
    expected = tokenizer_hash(cfg.data.tokenizer) if cfg.data.tokenizer and Path(cfg.data.tokenizer).is_file() else None
    if cfg.data.tokenizer and expected is None:
        raise UserError(f"data.tokenizer={cfg.data.tokenizer} does not exist: name the tokenizer that made the shards")
    manifest = load_manifest(cfg.data.shards, cfg.data)
    check_manifest(manifest, cfg.model, expected, cfg.views)
    check_enough(cfg.data.shards, manifest, cfg.train.global_batch)
    if not cfg.data.val_shards:
        return manifest, None
    validation = load_manifest(cfg.data.val_shards, cfg.data)
    check_manifest(validation, cfg.model, expected, 1)
    if validation.classes != manifest.classes:
        raise UserError(
            f"{cfg.data.val_shards} and {cfg.data.shards} name other classes: make both from folders of the same names"
        )
    hashes = [m.tokenizer_sha256 for m in (manifest, validation)]
    if all(hashes) and hashes[0] != hashes[1]:
        raise UserError(
            f"{cfg.data.shards} was made with the tokenizer {hashes[0][:12]}..., {cfg.data.val_shards} with {hashes[1][:12]}...: pretokenize both with one"
        )
    return manifest, validation


def check_same_data(cfg: RunConfig, restored: dict[str, Any], digests: dict[str, str], found: Path) -> None:
    """Raise ``UserError`` for other shards than the checkpoint's, wherever they lie now."""
    for name, what, where in (
        ("data", "was trained on", f"data.shards = {cfg.data.shards}"),
        ("val_data", "was validated on", f"data.val_shards = {cfg.data.val_shards}"),
    ):
        if restored.get(name, digests[name]) != digests[name]:
            raise UserError(f"{where} holds other shards than {found} {what}: restore them, or choose another run=...")


def check_same_order(cfg: RunConfig, manifest: Manifest, restored: dict[str, Any], found: Path) -> None:
    """Raise ``UserError`` where the checkpoint's samples came in another order: some would come twice, some never.

    With no more shards than are mixed, all versions of the order are one.
    """
    shards, order = sum(n > 0 for n in manifest.shard_sizes), restored.get("order", 1)
    if order != ORDER and shards > cfg.data.window:
        raise UserError(
            f"{found} was trained in order {order} of the samples, this version of megastar knows order {ORDER}: finish that run with the version that began it, or begin another run=... from it with train.init={found}"
        )


def digest_of(manifest: Manifest | None) -> str:
    """SHA-256 over the shards' own: a run resumes on the samples it was trained on, or not at all."""
    if manifest is None:
        return ""
    return hashlib.sha256("".join(s.sha256 for s in manifest.shards).encode()).hexdigest()


def make_loader(cfg: RunConfig, ctx: Context, engines: Engines, done: int) -> TokenLoader:
    return TokenLoader(
        cfg.data.shards,
        seed=cfg.train.seed,
        global_batch=cfg.train.global_batch,
        rank=ctx.mesh.data_rank,
        world=ctx.mesh.data,
        accumulation=engines.accumulation,
        views=cfg.views,
        class_dropout_prob=cfg.model.class_dropout_prob,
        num_classes=cfg.model.num_classes,
        vocab_size=cfg.model.vocab_size,
        tokens=cfg.model.image_tokens,
        window=cfg.data.window,
        start_step=done,
        data=cfg.data,
        device=ctx.device,
    )


def make_validation(cfg: RunConfig, ctx: Context, engines: Engines) -> list[dict[str, Any]]:
    if not cfg.data.val_shards or not cfg.train.val_every:
        return []
    batches: Iterator[dict[str, Any]] = validation_batches(
        cfg.data.val_shards,
        cfg.train.val_images,
        engines.micro_batch,
        ctx.mesh.data_rank,
        ctx.mesh.data,
        data=cfg.data,
    )
    return list(batches)


# The run folder ----------------------------------------------------------------------------------------------------
RESUMABLE = (
    "model.name",
    "attention.",
    "data.shards",  # the same shards in another place: the checkpoint's digests tell
    "data.val_shards",
    "data.cache",
    "data.patience",
    "faults.",
    "optim.lr",  # what a loss that is not finite asks for
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.val_every",
    "train.save_every",
    "train.keep",
    "train.threads",
    "train.compile",
    "train.fused_ops",
    "train.upload",
    "train.micro_batch",
    "parallel.",
)


def claim_run_folder(cfg: RunConfig, ctx: Context) -> None:
    """Write config.yaml, or compare with the one there. Raises ``UserError`` naming the differing fields.

    Only length, the split over ranks and housekeeping may differ when a run is resumed.
    """
    path = Path(cfg.run) / "config.yaml"
    problem = ""
    if path.is_file():
        differing = [d for d in diff_configs(load_config(path), cfg) if not d.startswith(RESUMABLE)]
        if differing:
            problem = f"{cfg.run} holds a run of another configuration: {'; '.join(differing)}: choose another run=... or restore the fields"
    if problem:
        raise UserError(problem)
    if ctx.main:
        save_config(cfg, path)
