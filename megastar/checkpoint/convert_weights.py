"""`megastar convert FILE`: weights files from LlamaGen's layout to megastar's and back, networks and tokenizers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from megastar.checkpoint.atomic_output import byte_bar, settle, staged
from megastar.checkpoint.llamagen_reader import load_pickled, model_config, tokenizer_config, tokens_in, weights_in
from megastar.checkpoint.llamagen_writer import check_written, how_to_load, save_streaming
from megastar.checkpoint.safetensors_stream import TensorWriter
from megastar.config.files import read_yaml, require_file
from megastar.config.load import config_from_dict
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import check_fits, metadata_of, read_model_metadata
from megastar.tokenizer.io import FORMAT as TOKENIZER_FORMAT
from megastar.tokenizer.io import check_tokenizer_fits, read_tokenizer_metadata, tokenizer_hash, tokenizer_metadata
from megastar.utils.device import DTYPES
from megastar.utils.files import sha256, write_atomic

USED = 65536  # LlamaGen's tokenizer keeps the last codes it used in a buffer of this size
VQ_MULTIPLIERS = {(1, 1, 2, 2, 4): "VQ-16", (1, 2, 2, 4): "VQ-8"}


@dataclass
class WeightsFile:
    """A network's or a tokenizer's weights; ``tensors`` are read when they are asked for."""

    path: Path
    cfg: ModelConfig | TokenizerConfig
    tensors: Mapping[str, Tensor]
    about: dict[str, Any]
    foreign: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        if isinstance(self.tensors, _Lazy):
            return self.tensors.shapes
        return {k: tuple(v.shape) for k, v in self.tensors.items()}


class _Lazy(Mapping[str, Tensor]):
    """The tensors of a safetensors file, one at a time."""

    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")
        self.shapes = {k: tuple(self.file.get_slice(k).get_shape()) for k in self.file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Any:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_weights(
    path: Path, *, config: Path | None = None, image_tokens: int | None = None, image_size: int = 256
) -> WeightsFile:
    """A weights file of LlamaGen (.pt) or of megastar (.safetensors), of a network or of a tokenizer.

    ``config`` (a model's YAML), ``image_tokens`` and ``image_size`` say what LlamaGen's files do not. ``UserError``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path} do not exist: name a run, a .safetensors file or a .pt file of LlamaGen")
    if path.suffix == ".safetensors":
        return _open_own(path)
    content = load_pickled(path)
    weights = weights_in(path, content)
    about = {"weights": "llamagen", "source": path.name, "source_sha256": sha256(path), "step": content.get("steps")}
    if isinstance(content.get("megastar"), dict):  # it was one of ours
        about = content["megastar"] | {"source": path.name, "source_sha256": about["source_sha256"]}
    cfg: ModelConfig | TokenizerConfig
    if "quantize.embedding.weight" in weights:
        cfg = tokenizer_config(path, weights, image_size)
        check_tokenizer_fits(path, {k: tuple(v.shape) for k, v in weights.items()}, cfg)
    else:
        asked = read_architecture(config) if config else None
        cfg = model_config(path, weights, asked, tokens_in(path, content), image_tokens)
        check_fits(path, {k: tuple(v.shape) for k, v in weights.items()}, cfg)
    return WeightsFile(path, cfg, weights, about, True)


def read_architecture(path: Path) -> ModelConfig:
    """The network that a YAML describes, a model's own (configs/model/) or a whole run's."""
    file = require_file(path, "configuration")
    content = read_yaml(file)
    plain = {"enabled": False, "contrastive_block": 1}  # training's own fields have no say here
    run = {"model": content.get("model", content), "data": {"shards": "none"}, "self_guided": plain}
    return config_from_dict(run, file).model


def _open_own(path: Path) -> WeightsFile:
    try:
        with safe_open(path, "pt") as f:
            kind = (f.metadata() or {}).get("format")
    except Exception as error:  # its own type, or an OSError
        raise UserError(f"{path} is not a readable safetensors file ({error}): copy it again") from error
    if kind == TOKENIZER_FORMAT:
        tokenizer, about = read_tokenizer_metadata(path)
        return WeightsFile(path, tokenizer, _Lazy(path), about, False)
    model, about = read_model_metadata(path)
    opened = WeightsFile(path, model, _Lazy(path), about, False)
    check_fits(path, opened.shapes, model)
    return opened


def convert_file(
    source: WeightsFile,
    to: str,
    out: Path,
    *,
    dtype: str = "fp32",
    tokenizer: Path | None = None,
    force: bool = False,
    console: Console | None = None,
) -> str:
    """Write ``source`` as ``to`` (safetensors or llamagen); returns one sentence on what is now in ``out``.

    ``tokenizer``: the one whose codes the network draws; its hash is kept. Raises ``UserError``, ``out`` is as before.
    """
    start, kind, shapes = time.perf_counter(), DTYPES[dtype], source.shapes
    what = "network" if isinstance(source.cfg, ModelConfig) else "tokenizer"
    about = dict(source.about)
    if tokenizer is not None:
        about["tokenizer"] = tokenizer_hash(tokenizer)
    size = sum(torch.Size(s).numel() for s in shapes.values()) * kind.itemsize

    def read(name: str) -> Tensor:
        whole = source.tensors[name]
        if dtype == "fp16" and bool((whole.abs().amax() > torch.finfo(kind).max) & whole.isfinite().all()):
            raise UserError(f"{name} reaches {whole.abs().amax():.3g}, beyond fp16's 65504: use --dtype bf16")
        return whole.to(kind)

    with staged(out, size + 512 * len(shapes), force) as path:
        if to == "safetensors":
            cfg = source.cfg
            metadata = metadata_of(cfg, about) if isinstance(cfg, ModelConfig) else tokenizer_metadata(cfg, about)
            with (
                byte_bar(console, "writing", size) as advance,
                TensorWriter(path, {n: (kind, s) for n, s in shapes.items()}, metadata) as writer,
            ):
                for name in shapes:
                    writer.write(name, read(name))
                    advance(torch.Size(shapes[name]).numel() * kind.itemsize)
            settle(path)
            if sha256(path) != writer.sha256:
                raise UserError(f"{path} was written but reads back otherwise: check the disk")
            how = f"SHA-256 {writer.sha256[:16]} read back as written"
        else:
            assert to == "llamagen", to
            if what == "tokenizer":  # LlamaGen loads it with every name, this one too
                shapes = shapes | {"quantize.codebook_used": (USED,)}

            def all_of(name: str) -> Tensor:
                return torch.zeros(USED, dtype=kind) if name == "quantize.codebook_used" else read(name)

            digests = save_streaming(path, shapes, kind, all_of, {"megastar": about})
            settle(path)
            check_written(path, shapes, kind, digests, lambda count: None)
            how = f"each tensor's SHA-256 read back as written; LlamaGen: {_how(source.cfg)}"
    if to == "safetensors":
        write_about(out, source.cfg, about, writer.sha256)
    seconds, mb = time.perf_counter() - start, out.stat().st_size / 1e6
    return f"{out}: {what} of {source.path.name}, {dtype} ({mb:.1f} MB in {seconds:.1f} s); {how}"


def _how(cfg: ModelConfig | TokenizerConfig) -> str:
    if isinstance(cfg, ModelConfig):
        return how_to_load(cfg)
    name = VQ_MULTIPLIERS.get(tuple(cfg.channel_multipliers)) if (cfg.channels, cfg.norm_groups) == (128, 32) else None
    if name is None:
        return "no tokenizer that LlamaGen names"
    return f"--vq-model {name} --codebook-size {cfg.codebook_size} --codebook-embed-dim {cfg.codebook_embed_dim}"


def write_about(out: Path, cfg: ModelConfig | TokenizerConfig, about: Mapping[str, Any], digest: str) -> None:
    """``OUT.json`` beside ``OUT.safetensors``: what it is, for people and scripts, and the SHA-256 of the file."""
    section = "model" if isinstance(cfg, ModelConfig) else "config"
    known = {"file": out.name, "sha256": digest, "step": about.get("step"), "tokenizer": about.get("tokenizer")}
    text = json.dumps(known | {section: asdict(cfg), "provenance": dict(about)}, indent=1)
    write_atomic(out.with_suffix(".json"), (text + "\n").encode())


def inspect_file(path: Path, verify: bool, console: Console, **given: Any) -> bool:
    """Print what a weights file holds; with ``verify`` compare the file's hash with its .json. False if damaged."""
    source = open_weights(path, **given)
    count = sum(torch.Size(s).numel() for s in source.shapes.values())
    known = {"parameters": count, "architecture": asdict(source.cfg), "provenance": source.about}
    console.print_json(json.dumps(known))
    if not verify:
        return True
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise UserError(f"{beside} is missing, which holds the hash of {path}: --verify compares with it")
    if same := json.loads(beside.read_text()).get("sha256") == sha256(path):
        console.print("whole: SHA-256 as written")
    else:
        console.print(f"{path} is damaged: its SHA-256 differs from {beside.name}'s; copy it again", markup=False)
    return same
