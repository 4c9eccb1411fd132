"""Probe, samples and scores of one run, each kept under the hash of what it depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.comparison import CompareConfig
from megastar.errors import UserError
from megastar.experiments.plan import PlannedRun, codes_of

if TYPE_CHECKING:
    from rich.console import Console

VERSION = 1  # of what a result means: another one is never read


@dataclass(frozen=True)
class Part:
    """One result: ``what`` (probe or score) of the ``weights`` of a run after ``step`` steps."""

    run: PlannedRun
    what: str
    weights: str
    step: int
    count: int = 0  # pictures drawn for a score
    curve: bool = False

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoints" / f"step-{self.step:08d}"


class Evaluation:
    """What is measured of each run, and where the results are kept: OUT/evaluation."""

    def __init__(self, cfg: CompareConfig):
        self.cfg, self.folder = cfg, Path(cfg.out) / "evaluation"

    def parts(self, run: PlannedRun) -> list[Part]:
        """All that is measured of ``run``; the curve is of the leading weights, split and metric alone."""
        c, last = self.cfg, run.steps
        out = []
        for weights in c.weights:
            out += [Part(run, "probe", weights, last), Part(run, "score", weights, last, c.sample.count)]
        if c.curve.every:
            for step in range(c.curve.every, last + 1, c.curve.every):
                out.append(Part(run, "score", c.weights[0], step, c.curve.count, curve=True))
                if c.curve.probe:
                    out.append(Part(run, "probe", c.weights[0], step, curve=True))
        return out

    def check(self) -> None:
        """Raise ``UserError`` now for what would stop a measurement after hours of training."""
        from megastar.data.shards.manifest import load_manifest
        from megastar.evaluation.features import open_network
        from megastar.evaluation.figure import require_matplotlib
        from megastar.evaluation.scores import choose_metrics

        c = self.cfg
        require_matplotlib()
        choose_metrics(c.score.metrics or None, open_network("efflite0", inception=c.score.inception or None))
        stored = load_manifest(codes_of(c, c.probe.fit_on)).views
        if c.probe.fit_crops > stored:
            raise UserError(f"probe.fit_crops = {c.probe.fit_crops}: the codes hold {stored} crops of each picture")
        assert self.sources  # the pictures and the tokenizer are there

    @cached_property
    def sources(self) -> dict[str, Any]:
        """The hashes of everything but the weights that a result depends on."""
        from megastar.data.storage.shard_info import MANIFEST
        from megastar.evaluation.image_sources import source_hash
        from megastar.utils.files import sha256

        c = self.cfg
        splits = {c.probe.fit_on, c.probe.score_on, c.sample.like}
        codes = {s: sha256(Path(codes_of(c, s)) / MANIFEST) for s in splits}
        real = {s: source_hash(c.pictures, subset=s) for s in c.score.against}
        inception = sha256(Path(c.score.inception)) if c.score.inception else ""
        return {"codes": codes, "real": real, "inception": inception, "tokenizer": sha256(Path(tokenizer_of(c)))}

    def file(self, part: Part) -> Path | None:
        """Where the result of ``part`` belongs; None while its checkpoint is not there."""
        from megastar.run_dir.checkpoint_dir import MANIFEST
        from megastar.utils.files import sha256

        about = part.checkpoint / MANIFEST
        if not about.is_file():
            return None
        c, d = self.cfg, self.sources
        depends: dict[str, Any] = {"version": VERSION, "checkpoint": sha256(about), "weights": part.weights}
        if part.what == "probe":
            depends |= {"probe": asdict(c.probe), "codes": [d["codes"][s] for s in (c.probe.fit_on, c.probe.score_on)]}
        else:
            depends |= {
                "sample": asdict(c.sample) | {"count": part.count},
                "score": asdict(c.score),
                "curve": part.curve,
            }
            depends |= {"like": d["codes"][c.sample.like]} | {k: d[k] for k in ("real", "inception", "tokenizer")}
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{part.run.name}-{part.step:08d}-{part.weights}-{part.what}-{key}.json"

    def read(self, part: Part) -> dict[str, Any] | None:
        """An earlier result, or None."""
        file = self.file(part)
        try:
            return json.loads(file.read_text()) if file else None
        except (FileNotFoundError, ValueError):  # a damaged one is made again
            return None

    def missing(self, run: PlannedRun) -> list[Part]:
        return [p for p in self.parts(run) if self.read(p) is None]

    def work(self, run: PlannedRun, console: Console) -> None:
        """Measure what is missing of ``run``. Raises ``UserError``."""
        from megastar.utils.files import write_atomic

        for part in self.missing(run):
            file = self.file(part)
            if file is None:
                raise UserError(
                    f"{part.checkpoint} is not there: train {run.name} to its end first, or, where it was removed since, "
                    f"remove {run.folder} so that it is trained again"
                )
            console.print(f"{run.name} step {part.step}: {part.what} of the {part.weights} weights", highlight=False)
            result = (self.probe if part.what == "probe" else self.score)(part, console)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, (json.dumps(result, indent=1) + "\n").encode())

    def probe(self, part: Part, console: Console) -> dict[str, Any]:
        from megastar.checkpoint.find_weights import find_weights
        from megastar.evaluation.linear_probe import linear_probe
        from megastar.model.io import load_model
        from megastar.utils.device import pick_device
        from megastar.utils.files import sha256

        p = self.cfg.probe
        weights = find_weights(part.checkpoint, part.weights).file
        model, _ = load_model(weights, pick_device("auto"))
        result = linear_probe(
            model,
            *crops(codes_of(self.cfg, p.fit_on), p.fit_crops),
            *crops(codes_of(self.cfg, p.score_on), 1),
            block=p.block, positions=p.positions, epochs=p.epochs, batch=p.batch, lr=p.lr, optimizer=p.optimizer,
            seed=p.seed, console=console,
        )  # fmt: skip
        return result | {"weights_sha256": sha256(weights), "fit_on": p.fit_on, "score_on": p.score_on}

    def score(self, part: Part, console: Console) -> dict[str, Any]:
        """Split -> scores of one set of pictures; its features are computed once."""
        from megastar.checkpoint.find_weights import find_weights, labels_of
        from megastar.evaluation.feature_statistics import Collector
        from megastar.evaluation.features import open_network
        from megastar.evaluation.runner import evaluate_collected
        from megastar.evaluation.scores import Settings, choose_metrics, needs
        from megastar.sampling.distributed import iterate_images
        from megastar.sampling.pipeline import open_pipeline
        from megastar.utils.device import pick_device
        from megastar.utils.files import sha256

        c, s = self.cfg, self.cfg.sample
        weights, device = find_weights(part.checkpoint, part.weights).file, pick_device("auto")
        labels = like(labels_of(codes_of(c, s.like)), part.count, s.seed)
        painter = open_pipeline(
            weights, tokenizer_of(c), labels, seed=s.seed, batch=s.batch, cfg_scale=s.cfg_scale,
            temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
        )  # fmt: skip
        network = open_network("efflite0", device, inception=c.score.inception or None)
        metrics = choose_metrics(c.score.metrics or None, network)[: 1 if part.curve else None]
        made = Collector(network, **needs(metrics, real=False))
        for ids, pixels in iterate_images(painter, console=console):
            made.update(pixels, ids)
        made.finish()
        told = painter.identity() | {"weights": str(weights), "weights_sha256": sha256(weights)}
        told["label_plan"] = f"like {s.like}"
        results = {}
        for split in c.score.against[: 1 if part.curve else None]:
            results[split] = evaluate_collected(
                made, c.pictures, real_subset=split, metrics=metrics, settings=Settings(allow_few=True),
                batch=c.score.batch, cache=self.folder / "real", console=console, provenance=told,
            )  # fmt: skip
        return results


def tokenizer_of(cfg: CompareConfig) -> str:
    """Raises ``UserError``."""
    from megastar.config.files import find_file

    name = cfg.base.data.tokenizer
    found = find_file(name) if name else None
    if found is None:
        raise UserError(f"base.data.tokenizer = {name!r} is not there: name the tokenizer that makes the codes")
    return str(found)


def like(pool: list[int], count: int, seed: int) -> list[int]:
    """Classes of ``count`` pictures, as frequent as in ``pool``; the same for all runs."""
    import numpy as np

    order = np.random.default_rng([seed, 1]).permutation(len(pool))
    return np.asarray(pool)[order[np.arange(count) % len(pool)]].tolist()


def crops(shards: str, count: int) -> tuple[Any, Any]:
    """Codes (N * count, T) of ``count`` stored crops of each picture, the centre one first, and classes."""
    import numpy as np

    from megastar.data.shards.reader import ShardSet

    tokens = ShardSet(shards)
    centre, stored = tokens.manifest.centre_view, tokens.manifest.views
    views = [centre, *(v for v in range(stored) if v != centre)][:count]
    codes, labels = tokens.gather(np.arange(len(tokens)), np.tile(views, (len(tokens), 1)))  # (N, count, T)
    return codes.reshape(-1, codes.shape[-1]), np.repeat(labels, count)
