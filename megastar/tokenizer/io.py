"""Tokenizer files: one safetensors with the architecture and its provenance inside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
    about = tokenizer_metadata(model.config, provenance)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=about)
    temporary.replace(path)


def tokenizer_metadata(config: TokenizerConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The safetensors metadata of a tokenizer file."""
    return {"format": FORMAT, "config": json.dumps(asdict(config)), "provenance": json.dumps(dict(provenance))}


def check_tokenizer_fits(path: Path, found: Mapping[str, tuple[int, ...]], config: TokenizerConfig) -> None:
    """Raises ``UserError`` unless names and shapes are this architecture's; it names the first three that are not."""
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in VQModel(config).state_dict().items()}
    wrong = [f"{k} is missing" for k in wanted if k not in found]
    wrong += [f"{k} is not of this network" for k in found if k not in wanted]
    wrong += [f"{k} is {found[k]}, not {s}" for k, s in wanted.items() if k in found and found[k] != s]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"tokenizer {path} does not fit its architecture: {', '.join(wrong[:3])}{more}")


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
        check_tokenizer_fits(Path(path), {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}, config)  # noqa: SIM118
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
