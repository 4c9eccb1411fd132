"""Tokenizer files: one safetensors file with the architecture and its provenance in the metadata.

Torch is imported only where tensors are read or written.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.env_text import recorded
from megastar.config.from_file import check_section
from megastar.config.rules.tokenizer import tokenizer_problems
from megastar.config.schema import TokenizerConfig
from megastar.errors import UserError
from megastar.utils.files import atomic_file
from megastar.utils.json_file import ANY, dict_of, parse_json, text, validator
from megastar.utils.weights.safetensors_header import open_tensors, read_header

if TYPE_CHECKING:
    import torch

    from megastar.tokenizer.vq import VQModel

FORMAT = "megastar-tokenizer"
IN_FOLDER = "tokenizer/tokenizer.safetensors"  # of a folder in the Hub's layout
_PROVENANCE = validator(dict_of(text(1000), ANY))


def save_tokenizer(
    model: VQModel, path: str | Path, provenance: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write weights in ``dtype`` (default fp16: half the size; codes are computed in fp32 after loading)."""
    import torch
    from safetensors.torch import save

    tensors = {k: v.detach().to("cpu", dtype or torch.float16).contiguous() for k, v in model.state_dict().items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, tokenizer_metadata(model.config, provenance)))


def tokenizer_metadata(config: TokenizerConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The safetensors metadata of a tokenizer file."""
    return {
        "format": FORMAT,
        "config": json.dumps(recorded(asdict(config))),
        "provenance": json.dumps(dict(provenance)),
    }


def check_tokenizer_fits(path: Path, found: Mapping[str, tuple[int, ...]], config: TokenizerConfig) -> None:
    """Raises ``UserError`` if names or shapes differ from the architecture's; it lists the first three."""
    import torch

    from megastar.tokenizer.vq import VQModel

    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in VQModel(config).state_dict().items()}
    wrong = [f"{k} is missing" for k in wanted if k not in found]
    wrong += [f"{k} is unexpected" for k in found if k not in wanted]
    wrong += [f"{k} is {found[k]}, not {s}" for k, s in wanted.items() if k in found and found[k] != s]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"tokenizer {path} does not fit its architecture: {', '.join(wrong[:3])}{more}")


def read_tokenizer_metadata(path: str | Path) -> tuple[TokenizerConfig, dict[str, Any]]:
    """Architecture and provenance, without reading the weights. Raises ``UserError``."""
    config, provenance, _ = read_tokenizer_header(path)
    return config, provenance


def no_tokenizer_file(path: str | Path) -> str:
    """Why ``path`` is no file, and which to name, where a folder or a hf:// source is given in place of one; else empty."""
    if str(path).lower().startswith("hf:/"):
        return f"{path} is not a file: run megastar convert hf://... --to hf --out DIR, and name DIR/{IN_FOLDER}"
    if Path(path).is_dir():
        inside = Path(path) / IN_FOLDER
        return f"{path} is a folder: name {inside if inside.is_file() else 'a tokenizer .safetensors file'}"
    return ""


def read_tokenizer_header(path: str | Path) -> tuple[TokenizerConfig, dict[str, Any], dict[str, tuple[int, ...]]]:
    """Architecture, provenance and shapes; ``check_tokenizer_fits`` compares them. Raises ``UserError``."""
    if reason := no_tokenizer_file(path):
        raise UserError(f"tokenizer {reason}")
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist: name another file, or run `megastar train-tokenizer`")
    if path.suffix in (".pt", ".pth", ".ckpt"):
        command = (
            f"megastar convert {shlex.quote(str(path))} --to safetensors --out {shlex.quote(path.stem)}.safetensors"
        )
        raise UserError(f"{path} is not a megastar tokenizer; if it is LlamaGen's: {command}")
    metadata, entries = read_header(path)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: format {metadata.get('format', 'none')!r:.80}, not a megastar tokenizer ({FORMAT!r}): name another file"
        )
    where, remedy = f"in the header of {path}", "copy or train it again"
    data = parse_json(metadata.get("config", ""), f"config {where}", None, remedy)
    config = TokenizerConfig(**check_section(TokenizerConfig, data, f"tokenizer {path}: config"))
    if problem := next(tokenizer_problems(config), None):
        raise UserError(f"tokenizer {path}: {problem.text}; {remedy}")
    blocks = len(config.channel_multipliers) * config.res_blocks
    if blocks > len(entries):  # before that many blocks are built
        raise UserError(f"tokenizer {path}: {len(entries)} tensors are too few for {blocks} residual blocks; {remedy}")
    provenance = parse_json(metadata.get("provenance", ""), f"provenance {where}", _PROVENANCE, remedy)
    return config, provenance, {name: entry.shape for name, entry in entries.items()}


def load_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> VQModel:
    """The tokenizer in fp32, frozen, in eval mode."""
    import torch

    from megastar.tokenizer.vq import VQModel

    config, _, shapes = read_tokenizer_header(path)
    check_tokenizer_fits(Path(path), shapes, config)
    with torch.device("meta"):  # no initial weights: those of the file replace them
        model = VQModel(config)
    with open_tensors(path) as f:
        model.load_state_dict({k: f.get_tensor(k).float() for k in shapes}, assign=True)
    return model.to(device).requires_grad_(False).eval()


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 of what determines the codes: the tensors of encoder and codebook, and a quantizer other than vq with its
    fields. Token shards record it.

    The decoder is excluded: after further training of the decoder alone, all shards and models remain valid.
    """
    import torch

    config, _, shapes = read_tokenizer_header(path)
    check_tokenizer_fits(Path(path), shapes, config)
    digest = hashlib.sha256()
    if config.quantizer != "vq":  # two quantizers may have equal tensors, or none
        digest.update(f"{config.quantizer} {config.codebook_size} {config.fsq_levels}".encode())
    with open_tensors(path) as f:
        for name in sorted(shapes):
            if name.startswith(("encoder.", "quant_conv.", "quantize.")):
                tensor = f.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
