"""Probe and scores of one run; each result is stored under the hash of its inputs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.comparison import CompareConfig
from megastar.config.files import require_file
from megastar.errors import UserError
from megastar.experiments.plan import PlannedRun, codes_folder
from megastar.experiments.samplers import options_of, recorded_sampler, sampler_of
from megastar.experiments.training_scores import wanted_scores
from megastar.run_dir.checkpoint_dir import name_of
from megastar.run_dir.layout import CHECKPOINTS, MANIFEST
from megastar.utils.files import sha256, write_atomic
from megastar.utils.json_file import ANY, dict_of, read_json, text, validator

if TYPE_CHECKING:
    from rich.console import Console

_RESULT = validator(dict_of(text(1000), ANY))
VERSION = 1  # of the meaning of results; those of another version are not read


@dataclass(frozen=True)
class Part:
    """One result: ``what`` (probe or score) of the ``weights`` of a run after ``step`` steps."""

    run: PlannedRun
    what: str
    weights: str
    step: int
    count: int = 0  # images drawn for a score
    curve: bool = False

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / CHECKPOINTS / name_of(self.step)


class Evaluation:
    """Measures the runs; results are stored in OUT/evaluation."""

    def __init__(self, cfg: CompareConfig):
        self.cfg, self.folder = cfg, Path(cfg.out) / "evaluation"

    def parts(self, run: PlannedRun) -> list[Part]:
        """All measurements of ``run``; the curve uses only the first of the weights, splits and metrics."""
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
        """Raise ``UserError`` for problems that would otherwise stop a measurement after hours of training."""
        from megastar.data.shards.manifest import load_manifest
        from megastar.evaluation.features import open_network
        from megastar.evaluation.figure import require_matplotlib
        from megastar.evaluation.scores import choose_metrics

        c = self.cfg
        require_matplotlib()
        choose_metrics(c.score.metrics or None, open_network("efflite0", inception=c.score.inception or None))
        stored = load_manifest(codes_folder(c, c.probe.fit_on)).views
        if c.probe.fit_crops > stored:
            raise UserError(
                f"probe.fit_crops = {c.probe.fit_crops}: the codes contain {stored} crops per image; reduce it"
            )
        assert self.sources  # raises if images or tokenizer are missing
        if c.base.eval.every:
            assert self.wanted  # hashes the reference, which may take long: not between jobs

    @cached_property
    def sources(self) -> dict[str, Any]:
        """The hashes of all inputs of a result except the weights."""
        from megastar.data.storage.shard_info import MANIFEST as SHARDS
        from megastar.evaluation.image_sources import source_hash

        c = self.cfg
        splits = {c.probe.fit_on, c.probe.score_on, c.sample.like}
        codes = {s: sha256(Path(codes_folder(c, s)) / SHARDS) for s in splits}
        real = {s: source_hash(c.pictures, subset=s) for s in c.score.against}
        inception = sha256(Path(c.score.inception)) if c.score.inception else ""
        return {"codes": codes, "real": real, "inception": inception, "tokenizer": sha256(Path(find_tokenizer(c)))}

    @cached_property
    def wanted(self) -> dict[str, Any]:
        """The settings of scores while training (``training_scores.wanted_scores``); hashes their reference."""
        return wanted_scores(self.cfg)

    def file(self, part: Part) -> Path | None:
        """The file of the result of ``part``; None without its checkpoint."""
        manifest = part.checkpoint / MANIFEST
        if not manifest.is_file():
            return None
        c, hashes = self.cfg, self.sources
        inputs: dict[str, Any] = {"version": VERSION, "checkpoint": sha256(manifest), "weights": part.weights}
        if part.what == "probe":
            codes = [hashes["codes"][s] for s in (c.probe.fit_on, c.probe.score_on)]
            inputs |= {"probe": asdict(c.probe), "codes": codes}
        else:
            sample = recorded_sampler(sampler_of(c, part.run.variant)) | {"count": part.count}
            inputs |= {"sample": sample, "score": asdict(c.score), "curve": part.curve}
            inputs |= {"like": hashes["codes"][c.sample.like]}
            inputs |= {name: hashes[name] for name in ("real", "inception", "tokenizer")}
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"{part.run.name}-{part.step:08d}-{part.weights}-{part.what}-{key}.json"

    def read(self, part: Part) -> dict[str, Any] | None:
        """A stored result, or None."""
        file = self.file(part)
        try:
            return read_json(file, _RESULT) if file else None
        except UserError:  # a damaged file is measured again
            return None

    def missing(self, run: PlannedRun) -> list[Part]:
        return [p for p in self.parts(run) if self.read(p) is None]

    def run(self, run: PlannedRun, console: Console) -> None:
        """Measure the missing parts of ``run``. Raises ``UserError``."""
        for part in self.missing(run):
            file = self.file(part)
            if file is None:
                raise UserError(
                    f"{part.checkpoint} does not exist: train {run.name} to its end first; if the checkpoint was removed, "
                    f"remove {run.folder} to train the run again"
                )
            console.print(f"{run.name} step {part.step}: {part.what} of the {part.weights} weights", highlight=False)
            result = (self.probe if part.what == "probe" else self.score)(part, console)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, (json.dumps(result, indent=1) + "\n").encode())

    def probe(self, part: Part, console: Console) -> dict[str, Any]:
        from megastar.checkpoint.find_weights import check_codes, find_weights
        from megastar.data.shards.class_names import check_same_classes
        from megastar.data.shards.manifest import load_manifest
        from megastar.evaluation.linear_probe import linear_probe, load_crops
        from megastar.utils.device import pick_device

        p = self.cfg.probe
        found = find_weights(part.checkpoint, part.weights)
        found.require_null_class("a probe needs")
        for split in (p.fit_on, p.score_on):
            check_codes(part.run.name, found.identity, codes_folder(self.cfg, split))
        fitted, scored = (codes_folder(self.cfg, split) for split in (p.fit_on, p.score_on))
        check_same_classes(fitted, load_manifest(fitted).classes, scored, load_manifest(scored).classes)
        weights, model = found.file, found.load(pick_device("auto"))
        result = linear_probe(
            model,
            *load_crops(fitted, p.fit_crops),
            *load_crops(scored, 1),
            block=p.block, positions=p.positions, epochs=p.epochs, batch=p.batch, lr=p.lr, optimizer=p.optimizer,
            seed=p.seed, console=console,
        )  # fmt: skip
        return result | {"weights_sha256": sha256(weights), "fit_on": p.fit_on, "score_on": p.score_on}

    def score(self, part: Part, console: Console) -> dict[str, Any]:
        """Split -> scores of one set of images, whose features are computed once."""
        from megastar.checkpoint.find_weights import find_weights, labels_of
        from megastar.data.shards.class_names import check_same_classes
        from megastar.data.shards.manifest import load_manifest
        from megastar.evaluation.feature_statistics import Collector
        from megastar.evaluation.features import open_network
        from megastar.evaluation.options import Settings
        from megastar.evaluation.runner import evaluate_collected
        from megastar.evaluation.scores import choose_metrics, needs
        from megastar.sampling.distributed import iterate_images, labels_like
        from megastar.sampling.pipeline import open_pipeline
        from megastar.utils.device import pick_device

        c, s = self.cfg, sampler_of(self.cfg, part.run.variant)
        found, device = find_weights(part.checkpoint, part.weights), pick_device("auto")
        weights, like = found.file, codes_folder(c, s.like)
        if names := found.provenance.get("classes"):
            check_same_classes(weights, names, like, load_manifest(like).classes)
        labels = labels_like(labels_of(like), part.count, s.seed)
        pipeline = open_pipeline(
            found, find_tokenizer(c), labels, seed=s.seed, batch=s.batch, **vars(options_of(s))
        )  # fmt: skip
        network = open_network("efflite0", device, inception=c.score.inception or None)
        metrics = choose_metrics(c.score.metrics or None, network)[: 1 if part.curve else None]
        generated = Collector(network, **needs(metrics, real=False))
        for ids, pixels in iterate_images(pipeline, console=console):
            generated.update(pixels, ids)
        generated.finish()
        provenance = pipeline.identity() | {"weights": str(weights), "weights_sha256": sha256(weights)}
        provenance["label_plan"] = f"like {s.like}"
        results = {}
        for split in c.score.against[: 1 if part.curve else None]:
            results[split] = evaluate_collected(
                generated, c.pictures, real_subset=split, metrics=metrics, settings=Settings(allow_few=True),
                batch=c.score.batch, cache=self.folder / "real", console=console, provenance=provenance,
            )  # fmt: skip
        return results


def find_tokenizer(cfg: CompareConfig) -> str:
    """The file ``base.data.tokenizer``. Raises ``UserError``."""
    return str(require_file(cfg.base.data.tokenizer, "base.data.tokenizer"))
