"""``megastar train-tokenizer``: train a VQ tokenizer on random crops of images."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands._common import Parser, config_and_overrides, terminal_width
from megastar.config.env_text import recorded
from megastar.config.help import fields_text
from megastar.config.load import config_yaml, load_tokenizer_config, save_config
from megastar.config.schema import TokenizerTrainConfig
from megastar.errors import UserError
from megastar.run_dir import layout
from megastar.run_dir.lease import hold
from megastar.utils.printable import say
from megastar.utils.redact import redact
from megastar.utils.signals import Preempted, StopFlag

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.console import Console

    from megastar.data.images.dataset import ImageSet

logger = logging.getLogger(__name__)
EXAMPLES = """
megastar train-tokenizer configs/tokenizer/emoji64.yaml
megastar train-tokenizer configs/tokenizer/emoji64.yaml steps=2000 out=runs/try tokenizer.codebook_size=1024
megastar train-tokenizer pictures=photos/ out=runs/vq16 tokenizer.image_size=256
megastar train-tokenizer configs/tokenizer/emoji64.yaml init=assets/tokenizer/emoji64-vq.safetensors \
    continuous_steps=0 lr=5e-4 out=runs/tokenizer-more
Repeating a command resumes it; the result is OUT/tokenizer.safetensors.
"""


def parser() -> Parser:
    p = Parser(
        "train-tokenizer",
        "Train a VQ tokenizer, which encodes images into codes and decodes codes into images.",
        EXAMPLES,
        fields_text(TokenizerTrainConfig, terminal_width()),
    )
    p.add_argument("items", nargs="*", metavar="CONFIG | field=value", help="a YAML file, fields to override")
    p.add_argument("--print-config", action="store_true", help="print every field as YAML and exit")
    return p


def main(words: list[str]) -> int:
    args = parser().parse(words)
    path, overrides = config_and_overrides(args.items)
    cfg = load_tokenizer_config(path, overrides)
    if args.print_config:
        say(config_yaml(cfg).rstrip("\n"))
        return 0
    from megastar.utils.logs import shared_console

    command = redact(" ".join(["megastar train-tokenizer", *([path] if path else []), *overrides]))
    result, scores = train_tokenizer(cfg, shared_console(), command)
    say(f"{result}: " + "; ".join(f"{k}: {v['psnr']:.2f} dB, {v['codes_used']:.1%} codes" for k, v in scores.items()))
    return 0


def train_tokenizer(cfg: TokenizerTrainConfig, console: Console, command: str = "") -> tuple[Path, dict[str, Any]]:
    """Train to ``cfg.steps``, resuming, and write ``out/tokenizer.safetensors``; returns its path and scores by subset.

    Raises ``Preempted`` after a stop signal, when the state is saved.
    """
    import torch

    from megastar.data.images.dataset import ImageSet
    from megastar.evaluation.image_sources import load_images
    from megastar.tokenizer.io import read_tokenizer_metadata, save_tokenizer
    from megastar.tokenizer.lpips import check_files
    from megastar.tokenizer.train import TokenizerTrainer
    from megastar.utils.device import pick_device, pick_dtype
    from megastar.utils.files import check_output, write_json

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device, out = pick_device(), Path(cfg.out)
    check_output(out, "out =", folder=True)  # before the images are listed
    if cfg.perceptual and cfg.lpips_vgg:
        check_files(cfg.lpips_vgg, cfg.lpips_linear)
    pictures = ImageSet(cfg.pictures, cfg.subset or None, choice=None)
    for note in pictures.notes:
        logger.info("%s: %s", cfg.pictures, note)
    if len(pictures) < cfg.batch:
        raise UserError(f"{cfg.pictures} holds {len(pictures)} images, fewer than batch {cfg.batch}: lower batch")
    subsets = [s for s in (cfg.val_subset, cfg.test_subset) if s]
    size = cfg.tokenizer.image_size
    held_out = {s: torch.from_numpy(load_images(cfg.pictures, subset=s, size=size)) for s in subsets}
    with hold(out, "megastar train-tokenizer", "out") as lease:
        with Batches(pictures, cfg) as batches:
            trainer = TokenizerTrainer(cfg, device, pick_dtype(cfg.dtype, device), batches)
            stop = StopFlag()
            try:
                trainer.fit(held_out.get(cfg.val_subset), out, console, lambda: bool(stop.signal), lease.check)
            finally:
                stop.restore()
        if trainer.step < cfg.steps:
            logger.warning(
                "signal %d: the state after step %d of %d is saved in %s; the same command resumes",
                stop.signal, trainer.step, cfg.steps, out,
            )  # fmt: skip
            raise Preempted(stop.signal)
        if batches.broken:
            names = ", ".join(sorted(batches.broken)[:3])
            logger.warning("%d unreadable images were replaced by the next one: %s", len(batches.broken), names)
        scores = {s: trainer.score(crops) for s, crops in held_out.items()}
        provenance: dict[str, Any] = {"command": command, "seed": cfg.seed, "steps": cfg.steps}
        provenance |= {"pictures": len(pictures), "scores": scores}
        if cfg.init:
            provenance["init"] = read_tokenizer_metadata(cfg.init)[1]  # provenance of the initial weights
        lease.check()
        save_config(cfg, out / layout.CONFIG)
        result = out / "tokenizer.safetensors"
        save_tokenizer(trainer.average, result, provenance | {"config": recorded(asdict(cfg))})
        write_json(out / "scores.json", provenance)
    return result, scores


class Batches:
    """step -> uint8 (B, H, W, 3): a pure function of the step and the seed, computed one step ahead.

    An unreadable image is replaced by the next one and recorded in ``broken``.
    """

    def __init__(self, pictures: ImageSet, cfg: TokenizerTrainConfig):
        self.pictures, self.cfg = pictures, cfg
        self.broken: set[str] = set()
        self.ahead: dict[int, Future[torch.Tensor]] = {}
        self.maker, self.decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(4)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.maker.shutdown(cancel_futures=True)
        self.decoders.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> torch.Tensor:
        wanted = self.ahead.pop(step, None) or self.maker.submit(self.make, step)
        self.ahead = {step + 1: self.maker.submit(self.make, step + 1)}
        return wanted.result()

    def make(self, step: int) -> torch.Tensor:
        import numpy as np
        import torch

        from megastar.data.images.dataset import random_crop

        c = self.cfg
        epoch, k = divmod(step, len(self.pictures) // c.batch)
        order = np.random.default_rng([c.seed, epoch]).permutation(len(self.pictures))
        chosen = order[k * c.batch : (k + 1) * c.batch]
        rng = np.random.default_rng([c.seed, step, 1])
        images = self.decoders.map(self.read, chosen.tolist())
        return torch.from_numpy(np.stack([random_crop(i, c.tokenizer.image_size, rng, c.max_scale) for i in images]))

    def read(self, i: int) -> Image.Image:
        from megastar.data.images.image_files import ImageError

        for k in range(len(self.pictures)):
            j = (i + k) % len(self.pictures)
            try:
                return self.pictures.read(j)
            except ImageError:
                self.broken.add(self.pictures[j].key)
        raise UserError(f"no image of {self.pictures.source} can be read: check the files")
