"""Scores of samples while a run trains: ``eval.every`` steps, all ranks sample from the whole weights and score.

Nothing of the training changes: the weights are read from the optimizer's shards into a network of their own, random
states are restored, and an evaluation that fails is a warning. A score that is finished is in evaluations.jsonl with a
key of all that it depends on; it is not computed again when its step is repeated.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megastar.config.schema import RunConfig
from megastar.engine.context import Context
from megastar.engine.evaluation.agreement import Agreement, EvaluationEnded
from megastar.engine.evaluation.checks import labels_of_run, open_reference_network, reference_of, size_of_samples
from megastar.engine.evaluation.random_state import any_algorithms, kept_random_state
from megastar.engine.evaluation.weights import WholeWeights
from megastar.engine.input_pipeline.data_checks import RunData
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.rank_sync import from_main
from megastar.engine.zero.engines import Engines
from megastar.errors import UserError
from megastar.evaluation.feature_statistics import Collector
from megastar.evaluation.frechet import frechet_distance
from megastar.evaluation.options import EvaluationOptions
from megastar.evaluation.reference import Reference, read_reference
from megastar.model.transformer import Transformer
from megastar.run_dir.evaluations import append_evaluation, describe_epochs, find_evaluation, read_evaluations
from megastar.run_dir.jsonl import iter_jsonl
from megastar.run_dir.layout import EVALUATING, METRICS, SAMPLES
from megastar.run_dir.rollbacks import read_rollbacks
from megastar.sampling.distributed import SamplingPipeline
from megastar.sampling.grid import Block, image_grid, save_grid
from megastar.sampling.options import SamplingOptions
from megastar.tokenizer.io import load_tokenizer
from megastar.utils.clock import utc_now
from megastar.utils.device import DTYPES
from megastar.utils.files import write_atomic

logger = logging.getLogger(__name__)
LINE_EVERY = 30.0  # seconds between log lines of an evaluation
SHOWN = 32  # images of a grid
PROGRESS_EVERY = 5.0  # and between updates of the progress file, which `megastar status` reads
INPUTS = (
    "samples",
    "metric",
    "against_subset",
    "against_images",
    "weights",
    "cfg_scale",
    "labels",
    "batch",
)  # of a score


class ScheduledEvaluation:
    """The evaluations of one run on this rank; all ranks call its methods alike."""

    def __init__(self, cfg: RunConfig, ctx: Context, engines: Engines, data: RunData, stop: Callable[[], int]):
        self.cfg, self.ctx, self.engines, self.data = cfg, ctx, engines, data
        self.run, self.agreement = Path(cfg.run), Agreement(ctx, stop)
        self.reference: Reference | None = None  # on rank 0, after the first evaluation
        self.failed = False
        self.shown: tuple[Any, list[int]] | None = None  # the first images of the last evaluation and their classes
        self._line_at = self._progress_at = 0.0

    def due(self, step: int, steps: int) -> bool:
        return self.cfg.eval.due(step, steps)

    def evaluate(self, step: int, metrics: MetricsLogger) -> int:
        """Score the weights after ``step`` steps: a row of metrics.jsonl, a line of evaluations.jsonl and an event, or a
        warning. Returns the number of the stop signal that ended it, or 0."""
        start = time.perf_counter()
        self._line_at, self._progress_at = time.monotonic(), 0.0
        try:
            with metrics.paused():
                try:
                    with kept_random_state(self.ctx.device), any_algorithms(), torch.no_grad():
                        found, new = self._evaluate(step, start)
                finally:
                    self._give_back()
        except EvaluationEnded as ended:
            if not ended.signal:
                text = f"the evaluation of step {step} failed ({ended}): the training continues"
                metrics.event("warning", text, situation="evaluation")
                self.failed = True
            return ended.signal
        self._report(step, found, new, metrics)
        return 0

    def _report(self, step: int, found: dict[str, Any], new: bool, metrics: MetricsLogger) -> None:
        e = self.cfg.eval
        if not (self.ctx.main and found):
            return
        if not new and not any(r["key"] == found["key"] for r in read_evaluations(self.run)):
            # a step that a rollback repeated with other weights and then with these, or only with these
            append_evaluation(self.run, found | {"rollbacks": len(read_rollbacks(self.run))})
        if not new and self._has_row(step):
            return
        row = {f"eval_{e.metric}": found["value"], "eval_epoch": found["epoch"], "eval_samples": found["samples"]}
        metrics.write(step, row | {"eval_cfg_scale": found["cfg_scale"], "eval_weights": found["weights"]})
        if new:
            self._draw(step, found, metrics)
        text = (
            f"step {step}, epoch {found['epoch']:.4g}: {found['metric']} {found['value']:.4g} of {found['samples']} samples of "
            f"the {found['weights']} weights, cfg_scale {found['cfg_scale']:g}, against {found['against']}"
        )
        if e.thresholds:
            text += f"; {describe_epochs(read_evaluations(self.run, step), e.thresholds)}"
        more: dict[str, Any] = {"situation": "evaluation", "over": True} if self.failed else {}
        metrics.event("evaluated", text + ("" if new else " (recorded by an earlier start)"), **more)
        self.failed = False

    def _draw(self, step: int, found: dict[str, Any], metrics: MetricsLogger) -> None:
        """A grid of the first samples, for RUN/samples and the trackers."""
        if self.shown is None:
            return
        (images, labels), self.shown = self.shown, None
        text = f"{len(labels)} samples of the {found['weights']} weights, step {step}, cfg_scale {found['cfg_scale']:g}"
        path = self.run / SAMPLES / f"eval-{step:08d}.png"
        try:
            names = self.data.train.manifest.classes
            grid = image_grid([Block(text, images, labels)], names, columns=max(Counter(labels).values()))
            save_grid(
                grid, path, {"caption": text} | {k: found[k] for k in ("step", "weights", "cfg_scale", "seed", "dtype")}
            )
            metrics.image("samples", path, text)
        except (OSError, UserError) as error:  # a full disk
            metrics.event("warning", f"the samples of step {step} are not written ({error})")

    def _has_row(self, step: int) -> bool:
        """Whether metrics.jsonl still has the row of the evaluation of ``step``."""
        name, path = f"eval_{self.cfg.eval.metric}", self.run / METRICS
        with suppress(OSError):
            return path.is_file() and any(r.get("step") == step and name in r for r in iter_jsonl(path))
        return False

    # One evaluation ----------------------------------------------------------------------------------------------
    def _evaluate(self, step: int, start: float) -> tuple[dict[str, Any], bool]:
        """The record of the score, empty on ranks other than 0, and whether it is new."""
        e, ctx, agreement = self.cfg.eval, self.ctx, self.agreement
        weights = WholeWeights(self.engines, ctx, e.weights)
        agreement.all(lambda: weights.reserve(ctx.dtype))
        net, digest = weights.network(self.cfg.model, ctx.dtype)
        inputs = agreement.on_main(lambda: self._inputs(digest))
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        known = find_evaluation(self.run, step, key) if ctx.main else None
        if from_main(ctx, known is not None):
            return known or {}, False
        if ctx.main:
            logger.info("step %d: evaluating %d samples of the %s weights", step, e.samples, e.weights)
        network = agreement.all(lambda: open_reference_network(e, ctx.device))
        if from_main(ctx, self.reference is None):
            self.reference = agreement.on_main(lambda: self._read_reference(network))
        made = Collector(network)
        pipeline = agreement.all(lambda: self._pipeline(net))
        for first in range(0, pipeline.chunks, ctx.world):
            agreement.all(lambda first=first: self._sample(pipeline, made, first + ctx.rank, step))  # type: ignore[misc]
        agreement.all(made.flush)
        made.finish(dist.group.WORLD if ctx.world > 1 else None, ctx.device)
        return agreement.on_main(lambda: self._score(made, step, key, start)) or {}, True

    def _inputs(self, digest: str) -> dict[str, Any]:
        """What a score depends on: weights, settings, and the files by name, size and time."""
        e = self.cfg.eval
        fields = {name: value for name, value in asdict(e).items() if name in INPUTS}
        files = {name: file_identity(getattr(e, name)) for name in ("against", "inception", "dinov2")}
        files["tokenizer"] = file_identity(self.cfg.data.tokenizer)
        own = {"seed": self.cfg.train.seed, "data": self.data.digests["data"], "dtype": str(self.ctx.dtype)}
        return fields | files | own | {"digest": digest}

    def _pipeline(self, net: Transformer) -> SamplingPipeline:
        e, ctx = self.cfg.eval, self.ctx
        tokenizer = load_tokenizer(self.cfg.data.tokenizer, ctx.device)
        labels, _ = labels_of_run(e, self.data.train.manifest, self.cfg.train.seed)
        options, batch = SamplingOptions(cfg_scale=e.cfg_scale), min(e.batch, e.samples)
        return SamplingPipeline(
            net, tokenizer, labels, seed=self.cfg.train.seed, options=options, batch=batch, rank=ctx.rank
        )

    def _sample(self, pipeline: SamplingPipeline, made: Collector, chunk: int, step: int) -> None:
        """One chunk of this rank, sampled and turned into features."""
        if chunk >= pipeline.chunks:
            return
        ids, batch = pipeline.indices(chunk), pipeline.batch

        def progress(share: float) -> None:
            self.agreement.here()
            done = round(chunk * batch + share * min(len(ids) * self.ctx.world, len(pipeline.labels) - chunk * batch))
            self._progress(step, min(done, len(pipeline.labels)), len(pipeline.labels))

        pixels = pipeline.sample_chunk(chunk, progress)
        if chunk == 0:  # of rank 0
            self.shown = pixels[:SHOWN].copy(), [pipeline.labels[i] for i in list(ids)[:SHOWN]]
        made.update(pixels, ids)

    def _read_reference(self, network: Any) -> Reference:
        real, tokenizer, limit = reference_of(self.cfg)
        o = EvaluationOptions(
            real_subset=self.cfg.eval.against_subset or None,
            real_tokenizer=tokenizer,
            data=self.cfg.data,
            on_batch=self.agreement.here,
        )
        return read_reference(real, size_of_samples(self.cfg), network, o, keep=False, spatial=False, limit=limit)

    def _score(self, made: Collector, step: int, key: str, start: float) -> dict[str, Any]:
        """Rank 0: the distance, recorded."""
        e, manifest = self.cfg.eval, self.data.train.manifest
        assert self.reference is not None and made.count == e.samples, (made.count, e.samples)
        _, plan = labels_of_run(e, manifest, self.cfg.train.seed)
        found = {
            "step": step,
            "epoch": round(step * self.cfg.train.global_batch / manifest.samples, 6),
            "metric": made.network.name(e.metric),
            "value": frechet_distance(self.reference.stats, made.stats),
            "samples": made.count,
            "cfg_scale": e.cfg_scale,
            "weights": e.weights,
            "against": str(self.reference.metadata["source"]),
            "key": key,
            "rollbacks": len(read_rollbacks(self.run)),
            "seconds": round(time.perf_counter() - start, 1),
            "time": utc_now(),
            "labels": plan,
            "seed": self.cfg.train.seed,
            "dtype": next(name for name, kind in DTYPES.items() if kind == self.ctx.dtype),
            "ranks": self.ctx.world,
            "reference": self.reference.metadata,
            "features": made.network.describe(),
        }
        append_evaluation(self.run, found)
        return found

    # Progress and memory -----------------------------------------------------------------------------------------
    def _progress(self, step: int, done: int, total: int) -> None:
        now = time.monotonic()
        if not self.ctx.main or now - self._progress_at < PROGRESS_EVERY:
            return
        self._progress_at = now
        with suppress(OSError):  # it is for `megastar status` only
            write_atomic(self.run / EVALUATING, json.dumps({"step": step, "done": done, "samples": total}).encode())
        if now - self._line_at >= LINE_EVERY:
            self._line_at = now
            logger.info("step %d: evaluation, %d of %d images", step, done, total)

    def _give_back(self) -> None:
        """Free the network, its caches and the features' network; the reference's statistics stay, in host memory."""
        gc.collect()
        if self.ctx.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.ctx.main:
            with suppress(OSError):
                (self.run / EVALUATING).unlink(missing_ok=True)


def file_identity(path: str) -> list[Any]:
    """Name, size and time of a file or folder; only the name if it does not exist."""
    if not path:
        return []
    try:
        status = Path(path).stat()
    except OSError:
        return [path]
    return [path, status.st_size, status.st_mtime_ns]
