"""Tokenizer files: one safetensors file with the architecture and its provenance in the metadata.

Torch is imported only where tensors are read or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megastar.config.schema import TokenizerConfig
from megastar.errors import UserError

if TYPE_CHECKING:
    import torch

    from megastar.tokenizer.vq import VQModel

FORMAT = "megastar-tokenizer"


def save_tokenizer(
    model: VQModel, path: str | Path, provenance: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write weights in ``dtype`` (default fp16: half the size; codes are computed in fp32 after loading)."""
    import torch
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {k: v.detach().to("cpu", dtype or torch.float16).contiguous() for k, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=tokenizer_metadata(model.config, provenance))
    temporary.replace(path)


def tokenizer_metadata(config: TokenizerConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The safetensors metadata of a tokenizer file."""
    return {"format": FORMAT, "config": json.dumps(asdict(config)), "provenance": json.dumps(dict(provenance))}


def check_tokenizer_fits(path: Path, found: Mapping[str, tuple[int, ...]], config: TokenizerConfig) -> None:
    """Raises ``UserError`` if names or shapes differ from the architecture's; it lists the first three."""
    import torch

    from megastar.tokenizer.vq import VQModel

    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in VQModel(config).state_dict().items()}
    wrong = [f"{k} is missing" for k in wanted if k not in found]
    wrong += [f"{k} is not of this network" for k in found if k not in wanted]
    wrong += [f"{k} is {found[k]}, not {s}" for k, s in wanted.items() if k in found and found[k] != s]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"tokenizer {path} does not fit its architecture: {', '.join(wrong[:3])}{more}")


def read_tokenizer_metadata(path: str | Path) -> tuple[TokenizerConfig, dict[str, Any]]:
    """Architecture and provenance, without reading the weights. Raises ``UserError``."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist: name another file, or run `megastar train-tokenizer`")
    try:
        with safe_open(path, "np") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"tokenizer {path}: not a safetensors file ({error}); copy or train it again") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format', 'none')!r}, not a megastar tokenizer ({FORMAT!r})")
    return TokenizerConfig(**json.loads(metadata["config"])), json.loads(metadata["provenance"])


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> VQModel:
    """The tokenizer in fp32, frozen, in eval mode."""
    from megastar.tokenizer.vq import VQModel

    config, _ = read_tokenizer_metadata(path)
    model = VQModel(config)
    with safe_open(path, "pt") as f:
        names = list(f.keys())
        check_tokenizer_fits(Path(path), {k: tuple(f.get_slice(k).get_shape()) for k in names}, config)
        state = {k: f.get_tensor(k).float() for k in names}
    model.load_state_dict(state)
    return model.to(device).requires_grad_(False).eval()


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 of the tensors that determine the codes: encoder and code book. Token shards record it.

    The decoder is excluded: after further training of the decoder alone, all shards and models remain valid.
    """
    import torch

    read_tokenizer_metadata(path)
    digest = hashlib.sha256()
    with safe_open(path, "pt") as f:
        for name in sorted(f.keys()):
            if name.startswith(("encoder.", "quant_conv.", "quantize.")):
                tensor = f.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
