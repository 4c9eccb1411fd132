"""Weights files: one safetensors file with the network's configuration and its provenance in the metadata.

Torch is imported only where tensors are read or written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.parallel.budget import parameter_shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megastar.model.transformer import Transformer

FORMAT = "megastar-model"


def save_model(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    cfg: ModelConfig,
    provenance: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights atomically, in ``dtype`` if given, with the configuration and the provenance (JSON values).

    Raises ``UserError`` if names or shapes do not match the configuration.
    """
    from safetensors.torch import save_file

    path = Path(path)
    check_fits(path, {k: tuple(v.shape) for k, v in state_dict.items()}, cfg)
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in state_dict.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata_of(cfg, provenance))
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def metadata_of(cfg: ModelConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The safetensors metadata of a weights file."""
    return {"format": FORMAT, "megastar": json.dumps({"model": asdict(cfg), "provenance": dict(provenance)})}


def read_model_metadata(path: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and provenance, without reading the weights. Raises ``UserError``."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path} do not exist: name a .safetensors file written by megastar")
    try:
        with safe_open(path, "np") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights {path}: not a readable safetensors file ({error}); copy or convert it again"
        ) from error
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise UserError(
            f"{path}: format {found!r}, not megastar weights ({FORMAT!r}); convert them with megastar convert"
        )
    content = json.loads(metadata["megastar"])
    unknown = sorted(set(content["model"]) - {f.name for f in fields(ModelConfig)})
    if unknown:
        raise UserError(
            f"weights {path}: unknown fields {', '.join(unknown)}, written by a newer megastar; update megastar"
        )
    return ModelConfig(**content["model"]), content["provenance"]


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """The network in ``dtype`` (default fp32), frozen, in eval mode, and the file's provenance.

    Raises ``UserError`` if the file is missing, has another format, or its weights do not match its configuration.
    """
    import torch

    from megastar.model.transformer import Transformer

    cfg, provenance = read_model_metadata(path)
    with safe_open(path, "pt") as f:
        names = list(f.keys())
        check_fits(Path(path), {k: tuple(f.get_slice(k).get_shape()) for k in names}, cfg)
        state = {k: f.get_tensor(k).to(device, dtype or torch.float32) for k in names}
    with torch.device("meta"):  # no initial weights are drawn: the file's replace them
        model = Transformer(cfg)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval(), provenance


def check_fits(path: Path, found: Mapping[str, tuple[int, ...]], cfg: ModelConfig) -> None:
    """Compare names and shapes with the network's.

    The ``UserError`` lists the fields of the architecture that differ, or each kind of mismatch with three examples.
    """
    expected = {k.removeprefix("transformer."): shape for k, shape in parameter_shapes(cfg).items()}
    actual, wanted = shape_fields(found), shape_fields(expected)
    differ = [f"{k} {actual[k]}, not {wanted[k]}" for k in actual if actual[k] != wanted[k]]
    if differ:
        raise UserError(f"weights {path} are of another architecture: {'; '.join(differ)}")
    missing = [k for k in expected if k not in found]
    extra = [k for k in found if k not in expected]
    shapes = [f"{k} is {found[k]}, not {s}" for k, s in expected.items() if k in found and found[k] != s]
    problems = []
    for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{len(names)} {kind} ({shown})")
    if problems:
        raise UserError(f"weights {path} do not match their configuration: {'; '.join(problems)}")


def shape_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The architecture's fields that follow from the weights' shapes; ``qkv_dim`` is 3 D for multi-head attention."""
    out: dict[str, int] = {}
    blocks = {int(m.group(1)) for n in shapes if (m := re.match(r"layers\.(\d+)\.", n))}
    if blocks:
        out["n_layer"] = max(blocks) + 1
    if table := shapes.get("tok_embeddings.weight"):
        out["vocab_size"], out["dim"] = table
    if table := shapes.get("cls_embedding.embedding_table.weight"):
        out["num_classes"] = table[0] - 1  # the last row is the null class
    if w1 := shapes.get("layers.0.feed_forward.w1.weight"):
        out["ffn_dim"] = w1[0]
    if qkv := shapes.get("layers.0.attention.wqkv.weight"):
        out["qkv_dim"] = qkv[0]
    return out
