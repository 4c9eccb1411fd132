"""``megastar demo``: every step from images to scores on the included emoji; finished steps are not repeated."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megastar.checkpoint.find_weights import SHIPPED_WEIGHTS
from megastar.commands._shared.common import Parser, config_and_overrides, positive, processes
from megastar.commands._shared.outputs import check_outputs, run_folders
from megastar.config.files import REPOSITORY, find_file
from megastar.config.load import diff_configs, load_config
from megastar.config.schema import RunConfig
from megastar.errors import UserError
from megastar.run_dir import layout
from megastar.utils.json_file import ANY, FLOAT, dict_of, integer, read_json, record, text, validator
from megastar.utils.npz import NpzFile

CONFIG = "configs/run/demo.yaml"
PICTURES = "assets/emoji64/emoji64.tar"
EXAMPLES = """
megastar demo                                      12 to 25 minutes on two CPU cores
megastar demo train.steps=1000 run=runs/long/run   a longer run in another folder
Repeating an interrupted command resumes it.
"""


def parser() -> Parser:
    p = Parser("demo", f"Encode the included emoji, train {CONFIG}, generate images and score them.", EXAMPLES)
    p.add_argument("items", nargs="*", metavar="section.field=value", help=f"fields of {CONFIG} to override")
    p.add_argument("--samples", type=positive, default=2000, help="images to score")
    p.add_argument("--nproc", type=processes, help="processes (default: the number of GPUs, at most 2; 2 on a CPU)")
    return p


def main(words: list[str]) -> int:
    a = parser().parse(words)
    file, overrides = config_and_overrides(a.items)
    if file:
        raise UserError(f"megastar demo trains {CONFIG}: use megastar train {file}")
    os.chdir(clone())
    cfg = load_config(CONFIG, overrides)
    return Demo(cfg, overrides, a.samples, a.nproc).run()


def clone() -> Path:
    """The working directory or this package's repository, whichever holds the images. Raises ``UserError``."""
    for root in (Path.cwd(), REPOSITORY):
        if (root / PICTURES).is_file() and (root / CONFIG).is_file():
            return root
    raise UserError(
        f"the demo needs a clone of the repository: {PICTURES} is neither in {Path.cwd()} nor in {REPOSITORY}"
    )


class Demo:
    """The steps and their output folder."""

    def __init__(self, cfg: RunConfig, overrides: list[str], samples: int, nproc: int | None):
        from megastar.utils.logs import shared_console

        self.cfg, self.overrides, self.samples, self.nproc = cfg, overrides, samples, nproc
        self.folder = Path(cfg.run).parent
        self.scores_file, self.grid = self.folder / "scores.json", self.folder / "grid.png"
        self.console = shared_console()
        self.start = time.perf_counter()

    def run(self) -> int:
        scores = self.finished()
        if scores is None:
            data = self.cfg.data
            written = run_folders(self.cfg) | {"data.shards =": data.shards, "data.val_shards =": data.val_shards}
            check_outputs({}, folders=written)
            own = {f"the demo's {name}": self.folder / name for name in (layout.SAMPLES, "cache")}
            check_outputs({"the demo's scores": self.scores_file, "the demo's grid": self.grid}, folders=own)
            self.heading("1/4  tokenizing")
            self.pretokenize()
            self.heading("2/4  training")
            status = self.train()
            if status:
                return status
            self.heading("3/4  sampling")
            blocks = self.sample()
            self.heading("4/4  scores")
            scores = self.evaluate(blocks)
        else:
            self.console.print(f"the demo is complete; remove {self.folder} to start again", highlight=False)
        self.report(scores)
        return 0

    def heading(self, text: str) -> None:
        from rich.text import Text

        seconds = time.perf_counter() - self.start
        took = f"  {seconds // 60:.0f} min {seconds % 60:.0f} s"
        self.console.rule(Text.assemble((text, "bold"), (took, "dim")), align="left")

    def finished(self) -> dict[str, Any] | None:
        """The scores of a completed demo of the same configuration, if any."""
        if not (os.path.isfile(self.scores_file) and os.path.isfile(self.grid)):  # False also for an invalid name
            return None
        try:
            scores: dict[str, Any] = read_json(self.scores_file, SCORES)
        except UserError:  # damaged: it is created again
            return None
        wanted = {
            "config": asdict(self.cfg),
            "samples": self.samples,
            "shipped": fingerprint(find_file(SHIPPED_WEIGHTS)),
        }
        return scores if all(scores[name] == value for name, value in wanted.items()) else None

    def pretokenize(self) -> None:
        from megastar.data.pretokenize.runner import pretokenize

        for subset, out in (("train", self.cfg.data.shards), ("val", self.cfg.data.val_shards)):
            pretokenize(PICTURES, subset, self.cfg.data.tokenizer, out, console=self.console)

    def train(self) -> int:
        import torch

        from megastar.commands._shared.launch import launch
        from megastar.run_dir.checkpoint_dir import folder_of, latest, name_of

        saved, newest = Path(self.cfg.run) / layout.CONFIG, latest(folder_of(self.cfg.run))
        unchanged = saved.is_file() and not diff_configs(load_config(saved), self.cfg)
        if unchanged and newest is not None and newest.name == name_of(self.cfg.train.steps):
            self.console.print(f"{self.cfg.run} is complete: {self.cfg.train.steps} steps", highlight=False)
            return 0
        return launch(self.nproc or min(2, torch.cuda.device_count()) or 2, ["train", CONFIG, *self.overrides])

    def sample(self) -> list[tuple[str, Path, dict[str, Any]]]:
        """(name, .npz of images, provenance) of this run and of the shipped weights; writes the grid of both."""
        import numpy as np

        from megastar.checkpoint.find_tokenizer import identity_of
        from megastar.checkpoint.find_weights import class_names, find_weights, has_null_class, labels_of
        from megastar.sampling.grid import Block, image_grid, save_grid
        from megastar.sampling.npz import record_of, save_npz, write_record
        from megastar.sampling.pipeline import sample_images

        seed, options = self.cfg.train.seed, {"cfg_scale": 3.0, "temperature": 0.9}
        rng = np.random.default_rng([seed, 1])
        labels = rng.choice(labels_of(self.cfg.data.shards), self.samples).tolist()
        sources = {"this run": find_weights(self.cfg.run)}
        if find_file(SHIPPED_WEIGHTS):
            shipped = find_weights(None)
            if shipped.identity == identity_of(self.cfg.data.tokenizer):
                sources["shipped weights"] = shipped
            else:
                self.console.print(f"without the shipped weights: {self.cfg.data.tokenizer} is not their tokenizer")
        blocks, made = [], []
        for name, found in sources.items():
            weights, provenance = found.file, found.provenance
            own = options if has_null_class(provenance) else options | {"cfg_scale": 1.0}
            file = self.folder / layout.SAMPLES / f"{weights.stem}-{fingerprint(weights)}-{self.samples}.npz"
            if not file.is_file():
                self.console.print(f"{name}: {weights}", highlight=False)
                images = sample_images(found, self.cfg.data.tokenizer, labels, seed=seed, console=self.console, **own)
                origin = {"weights": str(weights), "tokenizer": self.cfg.data.tokenizer, "trained": provenance}
                origin["label_plan"] = f"like {self.cfg.data.shards}"
                write_record(record_of(file), own | {"dtype": "fp32", "seed": seed}, origin)
                save_npz(file, images.shape, [images], np.asarray(labels))
            archive = NpzFile(file)
            caption = f"{name}: {provenance['step']:,} steps"
            if former := provenance.get("init"):  # trained from other weights
                caption += f", after {former['step']:,}"
            blocks.append(Block(caption, archive.read("arr_0"), archive.read("arr_1").tolist()))
            names = class_names(found.config.num_classes, provenance)
            made.append((name, file, provenance))
        save_grid(image_grid(blocks, names), self.grid, {n: provenance for n, _, provenance in made})
        return made

    def evaluate(self, made: list[tuple[str, Path, dict[str, Any]]]) -> dict[str, Any]:
        from megastar.evaluation.runner import evaluate
        from megastar.utils.device import pick_device
        from megastar.utils.files import write_json

        rows = {}
        for name, file, provenance in made:
            out = file.with_suffix(".json")
            if not out.is_file():
                cache, device = self.folder / "cache", pick_device()
                evaluate(file, PICTURES, real_subset="train", out=out, device=device, console=self.console, cache=cache)
            result = read_json(out, remedy="remove it")
            rows[name] = {k: result[k] for k in ("metric", "value", "floor")} | {"step": provenance["step"]}
        scores = {"rows": rows, "samples": self.samples, "config": asdict(self.cfg)}
        scores["shipped"] = fingerprint(find_file(SHIPPED_WEIGHTS))
        write_json(self.scores_file, scores)
        return scores

    def report(self, scores: dict[str, Any]) -> None:
        from rich.table import Table
        from rich.text import Text

        first, last = ends_of(Path(self.cfg.run) / layout.METRICS)
        training = Table("this run", "step", *SHOWN, title="training")
        for name, row in (("first", first), ("last", last)):
            training.add_row(name, str(row.get("step", "")), *(f"{row[k]:.4g}" if k in row else "" for k in SHOWN))
        metric = next(iter(scores["rows"].values()))["metric"]
        title = f"{scores['samples']} images compared with the training set"
        table = Table("weights", "steps", metric, "floor", title=title)
        for name, row in scores["rows"].items():
            table.add_row(name, f"{row['step']:,}", f"{row['value']:.2f}", f"{row['floor']:.2f}")
        self.console.rule(Text("results", "bold"), align="left")
        self.console.print(training, table)
        for what, path in (("image grid", self.grid), ("run folder", self.cfg.run), ("scores", self.scores_file)):
            self.console.print(f"{what + ':':<14}{Path(path).resolve()}", highlight=False, soft_wrap=True, markup=False)


ROW = record({"metric": text(100), "value": FLOAT, "floor": FLOAT, "step": integer()})
SCORES = validator(record({"rows": dict_of(text(100), ROW), "samples": integer(), "config": ANY, "shipped": ANY}))
SHOWN = ("loss", "loss_ar", "loss_mim", "acc_step", "acc_view")


def ends_of(metrics: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and last row of training metrics."""
    from megastar.run_dir.jsonl import read_jsonl

    rows = [r for r in read_jsonl(metrics) if "loss" in r] or [{}]
    return rows[0], rows[-1]


def fingerprint(path: Path | None) -> str:
    """The first digits of a file's SHA-256, so that samples of other weights are not reused."""
    from megastar.utils.files import sha256

    return sha256(path)[:12] if path else ""
