"""Tokenizer files: one safetensors with the architecture and its provenance inside."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megastar.config.schema import TokenizerConfig
from megastar.errors import UserError
from megastar.tokenizer.vq import VQModel

FORMAT = "megastar-tokenizer"


def save_tokenizer(
    model: VQModel, path: str | Path, provenance: dict[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write weights in ``dtype`` (half precision by default: half the size, codes computed in fp32 after loading)."""
    path = Path(path)
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()}
    about = {"format": FORMAT, "config": json.dumps(asdict(model.config)), "provenance": json.dumps(provenance)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=about)
    temporary.replace(path)


def read_tokenizer_metadata(path: str | Path) -> tuple[TokenizerConfig, dict[str, Any]]:
    """Architecture and provenance, without reading the weights."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"tokenizer {path} does not exist: train one with `megastar train-tokenizer`, or name an existing file"
        )
    try:
        with safe_open(path, "pt") as f:
            about = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"tokenizer {path} is not a safetensors file ({error}): copy or train it again") from error
    if about.get("format") != FORMAT:
        raise UserError(f"{path} holds {about.get('format', 'no format')!r}, not a megastar tokenizer")
    return TokenizerConfig(**json.loads(about["config"])), json.loads(about["provenance"])


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> VQModel:
    """The tokenizer in fp32, frozen, in eval mode."""
    config, _ = read_tokenizer_metadata(path)
    model = VQModel(config)
    with safe_open(path, "pt") as f:
        state = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118  (safe_open is no mapping)
    model.load_state_dict(state)
    return model.to(device).requires_grad_(False).eval()


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 of what makes codes: the encoder's tensors and the code book. Token shards carry it.

    The decoder is left out: one that was trained on with a frozen encoder keeps all shards and models valid.
    """
    read_tokenizer_metadata(path)
    digest = hashlib.sha256()
    with safe_open(path, "pt") as f:
        for name in sorted(f.keys()):
            if name.startswith(("encoder.", "quant_conv.", "quantize.")):
                tensor = f.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
