"""The loop of the tokenizer's training: ``train_tokenizer`` is what `megastar train-tokenizer` calls on every rank."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from megastar.config.env_text import recorded
from megastar.config.load import save_config
from megastar.config.schema import DataConfig, FaultsConfig, RunConfig, TokenizerTrainConfig
from megastar.data.images.dataset import ImageSet
from megastar.engine.checkpointer.async_saver import grace_period
from megastar.engine.fault_tolerance.errors import CorruptReplica
from megastar.engine.fault_tolerance.step_consensus import any_stop_signal
from megastar.engine.fault_tolerance.watchdog import watch
from megastar.engine.metrics.environment import process_environment
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.metrics.trackers.packages import check_installed
from megastar.engine.metrics.trackers.tracker import public_config
from megastar.engine.phase import DATA, ENDING, PHASE, SAVING, VALIDATION
from megastar.engine.rank_sync import error_of_any_rank, from_main, gather, on_all_ranks, retry, run_on_main
from megastar.engine.tokenizer.batches import Batches, HeldOut
from megastar.engine.tokenizer.folder import RESULT, SCORES, STATE, hold_out_folder
from megastar.engine.tokenizer.setup import join, one_set_of_pictures, read_by_main, reported_once
from megastar.engine.tokenizer.validation import SHOWN, Validator, open_networks, save_reconstructions
from megastar.errors import UserError
from megastar.parallel.replicas import Replicas
from megastar.run_dir import layout
from megastar.run_dir.checkpoint_dir import name_of
from megastar.run_dir.tokenizer_run import read_rows
from megastar.tokenizer.io import read_tokenizer_metadata, save_tokenizer
from megastar.tokenizer.lpips import check_files
from megastar.tokenizer.train import TokenizerTrainer, learning_rate
from megastar.tokenizer.vq import to_images
from megastar.utils.files import check_output, write_json
from megastar.utils.signals import Preempted, StopFlag

logger = logging.getLogger(__name__)
PATIENCE = 600.0  # seconds that the last save is retried


def train_tokenizer(
    cfg: TokenizerTrainConfig,
    command: str = "",
    *,
    inception: str | None = None,
    stop: StopFlag | None = None,
    watchdog: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Train to ``cfg.steps``, resuming, and write ``out/tokenizer.safetensors``; returns its path and scores by subset.

    Called on every rank. ``inception``: the file of FID's network, for rFID. ``stop``: a flag that has caught signals since
    the process began. ``watchdog``: end the process when a rank hangs or is lost. Raises ``UserError``, and ``Preempted``
    after a stop signal, when the state is saved.
    """
    flag = stop or StopFlag()
    try:
        return _Run(cfg, command, inception, flag, watchdog).run()
    finally:
        if stop is None:
            flag.restore()


class _Run:
    """One run on this rank."""

    def __init__(self, cfg: TokenizerTrainConfig, command: str, inception: str | None, stop: StopFlag, watchdog: bool):
        self.cfg, self.command, self.inception, self.stop, self.watchdog = cfg, command, inception, stop, watchdog
        self.out = Path(cfg.out)
        self.saved = -1  # steps in the newest checkpoint
        self.scored: tuple[int, dict[str, float]] = (-1, {})  # step, and scores of val_subset

    def run(self) -> tuple[Path, dict[str, Any]]:
        cfg = self.cfg
        check_installed(cfg.trackers, "trackers")
        PHASE.reset()
        self.ctx = join(cfg, lambda: self.stop.signal)
        run_on_main(self.ctx, lambda: check_output(self.out, "out =", folder=True))  # before the images are listed
        self.replicas = Replicas(self.ctx.rank, self.ctx.world, self.ctx.data_group)
        with hold_out_folder(self.out, self.ctx, self.stop) as self.lease, self._watched(), ExitStack() as opened:
            self._leave_if_stopped()
            self._open_pictures()
            self._leave_if_stopped()
            batches = opened.enter_context(Batches(self.pictures, cfg, self.replicas))
            self._build(batches)
            self._train(batches)
            return self._finish(batches)

    def _watched(self) -> Any:
        if not self.watchdog:
            return nullcontext()
        faults = replace(FaultsConfig(), **asdict(self.cfg.faults))
        data = DataConfig(shards=self.cfg.pictures)  # a remote store may take longer
        as_run = RunConfig(run=self.cfg.out, faults=faults, data=data)  # what the watchdog reads
        return watch(as_run, self.ctx.rank, self.ctx.world, self.ctx.secret)

    # Set-up ------------------------------------------------------------------------------------------------------
    def _open_pictures(self) -> None:
        cfg, size = self.cfg, self.cfg.tokenizer.image_size

        def open_sets() -> tuple[ImageSet, dict[str, HeldOut]]:
            if cfg.perceptual and cfg.lpips_vgg:
                check_files(cfg.lpips_vgg, cfg.lpips_linear)
            pictures = ImageSet(cfg.pictures, cfg.subset or None, choice=None)
            if len(pictures) < cfg.batch:
                raise UserError(
                    f"{cfg.pictures} holds {len(pictures)} images, fewer than batch {cfg.batch}: lower batch"
                )
            subsets = [s for s in (cfg.val_subset, cfg.test_subset) if s]
            return pictures, {s: HeldOut(ImageSet(cfg.pictures, s, choice=None), size, self.replicas) for s in subsets}

        self.pictures, self.held_out = reported_once(self.ctx, open_sets)
        for note in self.pictures.notes if self.ctx.main else ():
            logger.info("%s: %s", cfg.pictures, note)
        self.facts = one_set_of_pictures(self.ctx, self.pictures, cfg.pictures)

    def _build(self, batches: Batches) -> None:
        cfg, ctx, last = self.cfg, self.ctx, self.out / STATE

        def fetch(step: int) -> torch.Tensor:  # for k-means
            PHASE.at(DATA)
            return on_all_ranks(ctx, lambda: batches(step))

        def build() -> tuple[TokenizerTrainer, Validator]:
            trainer = TokenizerTrainer(cfg, ctx.device, ctx.dtype, fetch, self.replicas)
            networks = open_networks(ctx.device, self.inception) if self.held_out else []
            validator = Validator(self.replicas, ctx.device, trainer.perceptual, networks, self._stopping)
            for name, images in self.held_out.items():
                validator.check(images, name)
            return trainer, validator

        self.trainer, self.validator = reported_once(ctx, build)
        self.trainer.start_equal()
        if found := read_by_main(ctx, last):
            reported_once(ctx, lambda: self.trainer.load(last, found.content))
            self.saved = self.trainer.step
        before = self.trainer.pictures
        if before is not None and before != self.facts:
            raise UserError(
                f"{last} was trained on other images ({before['count']}, now {self.facts['count']} in {cfg.pictures}): "
                "restore them, or choose another out=...",
                reported=not ctx.main,
            )
        self.trainer.pictures = self.facts
        run_on_main(ctx, lambda: save_config(cfg, self.out / layout.CONFIG))

    def _leave_if_stopped(self) -> None:
        """Before the first step there is nothing to save. Called by all ranks alike."""
        if number := any_stop_signal(self.ctx, self.stop.signal):
            if self.ctx.main:
                logger.warning(
                    "signal %d before the first step: nothing to save; the same command starts again", number
                )
            raise Preempted(number)

    # The loop ----------------------------------------------------------------------------------------------------
    def _train(self, batches: Batches) -> None:
        cfg, ctx, trainer = self.cfg, self.ctx, self.trainer
        first = trainer.step
        with closing(
            MetricsLogger(
                self.out,
                first,
                cfg.steps,
                cfg.log_every,
                ctx.main,
                trackers=cfg.trackers,
                config=public_config(cfg),
            )  # fmt: skip
        ) as self.metrics:
            text = f"{self.out}: {cfg.steps} steps on {ctx.world} rank(s)"
            if self.saved >= 0:
                text = f"resumed {self.out / STATE} at step {first}"
            environment = process_environment(ctx.device) if ctx.main else {}
            kind = "resumed" if self.saved >= 0 else "started"
            if first < cfg.steps or self.saved < 0:
                self.metrics.event(kind, text, steps=cfg.steps, ranks=ctx.world, **environment)
            if self._lacks_validation():
                self._validate()
            while trainer.step < cfg.steps:
                PHASE.begin(trainer.step + 1)
                images = self._next_batch(batches)
                PHASE.at("step")
                self._log(trainer.train_step(to_images(images, ctx.device)))
                PHASE.finish(trainer.step)
                with self.metrics.paused():
                    if trainer.step == cfg.steps or trainer.step % cfg.save_every == 0:
                        self._save(PATIENCE if trainer.step == cfg.steps else 0.0)
                    self._validate()
            if first < cfg.steps:
                self.metrics.event("finished", f"{cfg.steps} steps are done", note=False)

    def _next_batch(self, batches: Batches) -> torch.Tensor:
        """This rank's part of the step's batch. All ranks leave here if one has a stop signal or no batch."""
        PHASE.at(DATA)
        images, error = None, None
        if not self.stop.signal:
            try:
                images = batches.wait(self.trainer.step, lambda: bool(self.stop.signal))
            except Exception as failure:
                error = failure
        number, failed = self._maximum(self.stop.signal, error is not None)
        if failed:
            error = error_of_any_rank(self.ctx, error)
            assert error is not None
            kept = self._save_steps(PATIENCE)
            self.metrics.note(f"no batch for step {self.trainer.step + 1}: {kept}", logging.WARNING)
            raise error
        if number:
            self._stop_for(number)
        assert images is not None
        return images

    def _maximum(self, *numbers: int) -> list[int]:
        """The maximum of each number over the ranks."""
        found = torch.tensor([int(n) for n in numbers], device=self.ctx.device)
        if self.ctx.world > 1:
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return [int(n) for n in found.tolist()]

    def _log(self, found: dict[str, torch.Tensor]) -> None:
        cfg, step = self.cfg, self.trainer.step
        row: dict[str, Any] = {}
        if step % cfg.log_every == 0 or step == cfg.steps:
            means = self.replicas.sum(torch.stack([v.double() for v in found.values()])) / self.ctx.world
            row = dict(zip(found, means.tolist(), strict=True)) | self.trainer.batch_codes()
            row |= {"lr": learning_rate(step - 1, cfg), "dead": self.trainer.dead}
        self.metrics.step(step, cfg.batch, row)

    def _validate(self) -> None:
        """Scores of val_subset, and a grid of reconstructions, every ``eval_every`` steps and at the end."""
        cfg, step = self.cfg, self.trainer.step
        if not self._validation_due():
            return
        PHASE.at(VALIDATION)
        scores = {}
        if images := self.held_out.get(cfg.val_subset):
            scores = self._scores_of(images)
            self.scored = step, scores
            self.metrics.write(step, scores)
            named = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
            self.metrics.note(f"step {step}: validation {named}")
        if self.ctx.main:
            self._draw(step, scores)

    def _validation_due(self) -> bool:
        cfg, step = self.cfg, self.trainer.step
        return step > cfg.continuous_steps and (step == cfg.steps or step % cfg.eval_every == 0)

    def _lacks_validation(self) -> bool:
        """Whether the run was stopped within the validation of the step that it resumes at."""
        if self.saved < 0 or not self._validation_due() or not self.cfg.val_subset:
            return False
        step = self.trainer.step
        return not run_on_main(self.ctx, lambda: any(r["step"] == step and "psnr" in r for r in read_rows(self.out)))

    def _scores_of(self, images: HeldOut) -> dict[str, float]:
        """The scores of ``images``; all ranks leave, with the state saved, if one has a stop signal meanwhile."""
        if (scores := self.validator.scores(self.trainer.average, images)) is None:
            self._stop_for(self._maximum(self.stop.signal)[0])
        return scores

    def _stopping(self) -> bool:
        PHASE.at(VALIDATION)
        return bool(self._maximum(self.stop.signal)[0])

    def _draw(self, step: int, scores: dict[str, float]) -> None:
        size = self.cfg.tokenizer.image_size
        images = self.held_out.get(self.cfg.val_subset) or HeldOut(self.pictures, size, Replicas())
        where = self.cfg.val_subset or "the training images"
        text = f"originals above their reconstructions, averaged weights, {where}"
        text += f", PSNR {scores['psnr']:.2f} dB" if scores else ""
        try:
            if len(shown := images.first(SHOWN)):
                path = self.out / layout.SAMPLES / f"{name_of(step)}.png"
                save_reconstructions(self.trainer.average, shown, path, {"caption": text, "step": step})
                self.metrics.image("reconstructions", path, text)
        except OSError as error:  # a full disk
            self.metrics.event("warning", f"the reconstructions of step {step} are not written ({error})")

    # Saving ------------------------------------------------------------------------------------------------------
    def _save(self, patience: float) -> None:
        """Save unless this step is saved. A failure is retried for ``patience`` seconds, then raised as ``UserError``; with
        0 it is a warning, and the next save is the next attempt."""
        trainer, path = self.trainer, self.out / STATE
        if trainer.step == self.saved:
            return
        PHASE.at(SAVING)
        if not trainer.replicas_agree():
            raise CorruptReplica(
                f"weights or optimizer states differ between ranks at step {trainer.step}: nothing is saved; exclude the "
                "faulty host and run the same command again"
            )
        start, state = time.perf_counter(), trainer.state()

        def write() -> str:
            self.lease.check()
            try:
                trainer.save(path, state)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
                return " ".join(str(error).split())[:300]
            return ""

        if problem := retry(self.ctx, lambda: run_on_main(self.ctx, write), patience):
            text = f"{path} could not be written at step {trainer.step} ({problem}); the previous one stays valid"
            if patience:
                raise UserError(f"{text}: free space or make it writable, and run the same command again")
            self.metrics.event("warning", f"{text}; the training continues", situation="save")
            return
        self.saved = trainer.step
        self.metrics.write(trainer.step, {"save_blocked_s": time.perf_counter() - start})
        self.metrics.event("saved", f"saved {path}", note=False)

    def _save_steps(self, patience: float) -> str:
        """Save the steps that were done, if any; says what is kept."""
        if not self.trainer.step:
            return "no step was done"
        self._save(patience)
        return f"the state after step {self.trainer.step} of {self.cfg.steps} is saved in {self.out / STATE}"

    def _stop_for(self, number: int) -> NoReturn:
        kept = self._save_steps(grace_period(number))
        self.metrics.event("signal", f"signal {number}: {kept}; the same command resumes")
        raise Preempted(number)

    # The end -----------------------------------------------------------------------------------------------------
    def _finish(self, batches: Batches) -> tuple[Path, dict[str, Any]]:
        """Score the subsets and write the tokenizer."""
        cfg, ctx, trainer = self.cfg, self.ctx, self.trainer
        PHASE.at(ENDING)
        scores: dict[str, Any] = {}
        for name, images in self.held_out.items():
            done, found = self.scored
            known = name == cfg.val_subset and done == trainer.step
            scores[name] = found if known else self._scores_of(images)
        broken = self._broken(batches)
        if broken and ctx.main:
            logger.warning("%d unreadable images were replaced by the next one: %s", len(broken), ", ".join(broken[:3]))
        provenance: dict[str, Any] = {
            "command": self.command,
            "seed": cfg.seed,
            "steps": trainer.step,
            "ranks": ctx.world,
        }
        provenance |= {"pictures": len(self.pictures), "scores": scores}
        if cfg.init:
            provenance["init"] = read_tokenizer_metadata(cfg.init)[1]  # provenance of the initial weights
        result = self.out / RESULT

        def write() -> None:
            self.lease.check()
            save_tokenizer(trainer.average, result, provenance | {"config": recorded(asdict(cfg))})
            write_json(self.out / SCORES, provenance)

        PHASE.at(SAVING)
        run_on_main(ctx, write)
        return result, from_main(ctx, scores)

    def _broken(self, batches: Batches) -> list[str]:
        """The unreadable training images of all ranks."""
        return sorted({key for keys in gather(self.ctx, sorted(batches.broken)) for key in keys})
