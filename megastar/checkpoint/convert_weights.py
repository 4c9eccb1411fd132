"""`megastar convert FILE`: weights files between LlamaGen's layout and megastar's, networks and tokenizers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megastar.checkpoint.atomic_output import READS_BACK, settle, staged
from megastar.checkpoint.find_tokenizer import recorded_identity
from megastar.checkpoint.hub.layout import is_hub_folder
from megastar.checkpoint.hub.reader import check_undamaged, folder_tensors, read_folder
from megastar.checkpoint.inspect import Shapes, read_weights_header, require_weights
from megastar.checkpoint.llamagen_reader import CLASS_TABLE, model_config, tokenizer_config
from megastar.checkpoint.llamagen_sets import (
    choose_set,
    downsample_in,
    find_sets,
    recorded_args,
    tokens_in,
    weights_in,
    with_null_class,
)
from megastar.checkpoint.llamagen_writer import check_expressible, check_written, how_to_load, save_streaming
from megastar.checkpoint.safetensors_stream import TensorWriter
from megastar.checkpoint.source import elements_of
from megastar.config.env_text import recorded
from megastar.config.files import read_yaml, require_file
from megastar.config.load import config_from_dict
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import PROVENANCE, check_fits, metadata_of
from megastar.tokenizer.io import check_tokenizer_fits, read_tokenizer_metadata, tokenizer_hash, tokenizer_metadata
from megastar.utils.device import DTYPES
from megastar.utils.files import sha256, write_atomic
from megastar.utils.json_file import check, validator
from megastar.utils.progress_bar import progress_bar
from megastar.utils.weights.safetensors_header import open_tensors
from megastar.utils.weights.weight_file import load_pickled

USED = 65536  # size of the buffer in which LlamaGen's tokenizer keeps the last used codes


@dataclass
class WeightsFile:
    """The weights of a network or a tokenizer; ``read`` returns one tensor.

    Of a network that was trained without dropping labels ``provenance["null_class"]`` is False, also if the file was
    written before that was recorded: its architecture has ``class_dropout_prob`` 0.
    """

    path: Path
    cfg: ModelConfig | TokenizerConfig
    shapes: Shapes
    read: Callable[[str], Tensor]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if isinstance(self.cfg, ModelConfig) and not self.cfg.class_dropout_prob:
            self.provenance = {**self.provenance, "null_class": False}


def open_weights(
    path: Path,
    *,
    config: Path | ModelConfig | None = None,
    image_tokens: int | None = None,
    image_size: int = 256,
    weights: str | None = None,
    num_classes: int | None = None,
) -> WeightsFile:
    """A weights file of LlamaGen (.pt) or of megastar (.safetensors), of a network or of a tokenizer; or a network's folder
    in the Hub's layout.

    ``config`` (an architecture or a model's YAML), ``image_tokens``, ``num_classes`` and ``image_size`` supply what
    LlamaGen's files do not store; ``weights`` names one of several sets in a .pt file, such as "ema". Raises ``UserError``.
    """
    path = Path(path)
    if is_hub_folder(path):
        if weights is not None:
            raise UserError(f"--weights {weights} does not apply to {path}: it has one set of weights, leave it out")
        model, provenance, shapes = read_folder(path)
        return WeightsFile(path, model, shapes, folder_tensors(path), provenance)
    if path.suffix == ".safetensors":
        if weights is not None:
            raise UserError(
                f"--weights {weights} does not apply to {path}: it has only one set of weights, leave it out"
            )
        cfg, provenance, shapes = read_weights_header(path)
        return WeightsFile(path, cfg, shapes, open_tensors(path).get_tensor, provenance)
    require_weights(path)
    content = load_pickled(path)
    chosen = choose_set(path, content, weights)
    tensors = weights_in(path, chosen)
    digest, written_here = sha256(path), isinstance(content.get("megastar"), dict)
    if written_here:  # by megastar convert
        written = check(content["megastar"], f"megastar in {path}", validator(PROVENANCE), "download it again")
        provenance = json.loads(json.dumps(written, default=str)) | {"source": path.name, "source_sha256": digest}
    else:
        provenance = {"weights": "llamagen", "source": path.name, "source_sha256": digest, "step": None}
        if type(content.get("steps")) is int:
            provenance["step"] = content["steps"]
        if sum(s.is_known for s in find_sets(content)) > 1:
            provenance["set"] = chosen.name
        if downsample := downsample_in(path, content):
            provenance["downsample"] = downsample
    if "quantize.embedding.weight" in tensors:
        shapes = {k: tuple(v.shape) for k, v in tensors.items()}
        cfg = tokenizer_config(path, tensors, image_size)
        check_tokenizer_fits(path, shapes, cfg)
        return WeightsFile(path, cfg, shapes, tensors.__getitem__, provenance)
    expected = read_architecture(config) if isinstance(config, Path) else config
    stated = recorded_args(content).get("num_classes")
    if not written_here:
        rows = next((len(t) for n, t in tensors.items() if n == CLASS_TABLE and t.ndim), 0)
        if expected and rows - expected.num_classes in (0, 1):  # else the differing fields are listed below
            stated = expected.num_classes
        tensors, has_null = with_null_class(path, tensors, stated, num_classes)
        if not has_null:
            provenance["null_class"] = False
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    cfg = model_config(path, tensors, expected, tokens_in(path, content, chosen), image_tokens)
    check_fits(path, shapes, cfg)
    return WeightsFile(path, cfg, shapes, tensors.__getitem__, provenance)


def read_architecture(path: Path) -> ModelConfig:
    """The network that a YAML file describes: a model's (configs/model/) or a run's."""
    file = require_file(path, "configuration")
    content = read_yaml(file)
    plain = {"enabled": False, "contrastive_block": 1}  # training fields do not matter here
    run = {"model": content.get("model", content), "data": {"shards": "none"}, "self_guided": plain}
    return config_from_dict(run, file).model


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
    """Write ``source`` as ``to`` (safetensors or llamagen); returns one sentence about the output.

    ``tokenizer``: the tokenizer of the network's codes, whose hash is recorded. Raises ``UserError`` and leaves ``out``
    unchanged.
    """
    start = time.perf_counter()
    what = "network" if isinstance(source.cfg, ModelConfig) else "tokenizer"
    provenance = dict(source.provenance)
    if tokenizer is not None:
        provenance |= {"tokenizer": tokenizer_of_codes(source, tokenizer)}
    if is_hub_folder(source.path):  # damaged weights would get a hash of their own
        check_undamaged(source.path, "copy or download the folder again", tokenizer=False)
    checked = write_weights(
        out, to, source.cfg, provenance, source.shapes, source.read,
        dtype=dtype, force=force, console=console,
    )  # fmt: skip
    seconds, mb = time.perf_counter() - start, out.stat().st_size / 1e6
    return f"{out}: {what} of {source.path.name}, {dtype} ({mb:.1f} MB in {seconds:.1f} s); {checked}"


def tokenizer_of_codes(source: WeightsFile, tokenizer: Path) -> str:
    """The hash of ``tokenizer``. Raises ``UserError`` if the codes of ``source`` cannot be its codes."""
    found, before = tokenizer_hash(tokenizer), recorded_identity(source.provenance)
    if before and found != before:
        raise UserError(
            f"{source.path} was trained on codes of the tokenizer {before[:12]}, but --tokenizer {tokenizer} has the hash "
            f"{found[:12]}: name the tokenizer of the training, or leave the option out"
        )
    config, _ = read_tokenizer_metadata(tokenizer)
    if isinstance(source.cfg, ModelConfig) and config.codebook_size != source.cfg.vocab_size:
        raise UserError(
            f"{source.path} has {source.cfg.vocab_size} codes, but --tokenizer {tokenizer} has {config.codebook_size}: name "
            "the tokenizer of the training"
        )
    return found


def write_weights(
    out: Path,
    to: str,
    cfg: ModelConfig | TokenizerConfig,
    provenance: dict[str, Any],
    shapes: Shapes,
    read: Callable[[str], Tensor],
    *,
    dtype: str,
    force: bool,
    console: Console | None,
    verify: Callable[[], None] = lambda: None,
    tokenizer: str | None = None,
) -> str:
    """Write ``read(name)`` of all ``shapes`` as ``to`` (safetensors or llamagen); returns how the file was checked.

    ``verify`` checks the source once there is room for ``out``. ``tokenizer`` is named in the .json beside the file.
    """
    if to == "llamagen":
        check_expressible(cfg, out)
    kind = DTYPES[dtype]
    size = elements_of(shapes) * kind.itemsize

    def cast(name: str) -> Tensor:
        whole = read(name)
        if dtype == "fp16" and bool((whole.abs().amax() > torch.finfo(kind).max) & whole.isfinite().all()):
            raise UserError(f"{name} reaches {whole.abs().amax():.3g}, beyond fp16's 65504: use --dtype bf16")
        bar.advance(whole.numel() * kind.itemsize)
        return whole.to(kind)

    with staged(out, size + 512 * len(shapes), force) as path:
        verify()
        with progress_bar(console, "writing", size, bytes=True, transient=True) as bar:
            if to == "llamagen":
                # LlamaGen's tokenizer requires every name, this buffer included.
                extra = {"quantize.codebook_used": (USED,)} if isinstance(cfg, TokenizerConfig) else {}
                shapes = shapes | extra
                zeros = torch.zeros(USED, dtype=kind)
                digests = save_streaming(
                    path, shapes, kind, lambda n: zeros if n in extra else cast(n), {"megastar": provenance}
                )
            else:
                assert to == "safetensors", to
                if isinstance(cfg, TokenizerConfig):
                    metadata = tokenizer_metadata(cfg, provenance)
                else:
                    metadata = metadata_of(cfg, provenance)
                with TensorWriter(path, {n: (kind, s) for n, s in shapes.items()}, metadata) as writer:
                    for name in shapes:
                        writer.write(name, cast(name))
        settle(path)
        if to == "llamagen":
            with progress_bar(console, "reading back", size, bytes=True, transient=True) as bar:
                check_written(path, shapes, kind, digests, bar)
            return f"each tensor's SHA-256 read back as written; LlamaGen: {how_to_load(cfg)}"
        if sha256(path) != writer.sha256:
            raise UserError(f"{path} {READS_BACK}")
    write_json(out, cfg, provenance | ({} if tokenizer is None else {"tokenizer": tokenizer}), writer.sha256)
    return f"SHA-256 {writer.sha256[:16]} read back as written"


def write_json(out: Path, cfg: ModelConfig | TokenizerConfig, provenance: dict[str, Any], digest: str) -> None:
    """``OUT.json`` beside ``OUT.safetensors``: configuration, provenance, and the SHA-256 of the file."""
    section = "model" if isinstance(cfg, ModelConfig) else "config"
    head = {"file": out.name, "sha256": digest} | {k: provenance.get(k) for k in ("step", "tokenizer")}
    text = json.dumps(head | {section: recorded(asdict(cfg)), "provenance": provenance}, indent=1)
    write_atomic(out.with_suffix(".json"), (text + "\n").encode())
