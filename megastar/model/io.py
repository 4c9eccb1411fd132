"""Weights files: one safetensors file with the network's configuration and its provenance in the metadata.

Torch is imported only where tensors are read or written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.config.env_text import recorded
from megastar.config.from_file import check_section
from megastar.config.rules.model import model_problems
from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.parallel.budget import parameter_shapes
from megastar.utils.json_file import ANY, dict_of, integer, list_of, optional, parse_json, record, text, validator
from megastar.utils.weights.safetensors_header import open_tensors, read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megastar.model.transformer import Transformer

FORMAT = "megastar-model"
PROVENANCE = record({}, {"classes": optional(list_of(text(10_000))), "step": optional(integer())})
_CONTENT = validator(record({"model": dict_of(text(200), ANY), "provenance": PROVENANCE}))


def metadata_of(cfg: ModelConfig, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The safetensors metadata of a weights file."""
    return {"format": FORMAT, "megastar": json.dumps({"model": recorded(asdict(cfg)), "provenance": dict(provenance)})}


def read_model_metadata(path: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and provenance, without reading the weights. Raises ``UserError``."""
    cfg, provenance, _ = read_model_header(path)
    return cfg, provenance


def read_model_header(path: str | Path) -> tuple[ModelConfig, dict[str, Any], dict[str, tuple[int, ...]]]:
    """Configuration, provenance and shapes, checked against each other. Raises ``UserError``."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"weights {path} do not exist: name a .safetensors file written by megastar")
    metadata, entries = read_header(path)
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise UserError(f"{path}: format {found!r:.80}, not megastar weights ({FORMAT!r}): run megastar convert")
    content = parse_json(
        metadata.get("megastar", ""), f"megastar in the header of {path}", _CONTENT, "convert it again"
    )
    cfg = ModelConfig(**check_section(ModelConfig, content["model"], f"weights {path}: model"))
    if problem := next(model_problems(cfg), None):
        raise UserError(f"weights {path}: {problem.text}; convert the file again")
    shapes = {name: entry.shape for name, entry in entries.items()}
    check_fits(path, shapes, cfg)
    return cfg, content["provenance"], shapes


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, dict[str, Any]]:
    """The network in ``dtype`` (default fp32), frozen, in eval mode, and the file's provenance.

    Raises ``UserError`` if the file is missing, has another format, or its weights do not match its configuration.
    """
    cfg, provenance, shapes = read_model_header(path)
    with open_tensors(path) as f:
        return build_model(cfg, shapes, f.get_tensor, device, dtype), provenance


def build_model(
    cfg: ModelConfig,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The network of the weights ``read(name)``, frozen, in eval mode, in ``dtype`` (default fp32)."""
    import torch

    from megastar.model.transformer import Transformer

    state = {k: read(k).to(device, dtype or torch.float32) for k in names}
    with torch.device("meta"):  # no initial weights are drawn: the file's replace them
        model = Transformer(cfg)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def check_fits(path: Path, found: Mapping[str, tuple[int, ...]], cfg: ModelConfig) -> None:
    """Compare names and shapes with the network's.

    The ``UserError`` lists the fields of the architecture that differ, or each kind of mismatch with three examples.
    """
    wanted = {name: getattr(cfg, name) for name in ("n_layer", "vocab_size", "dim", "num_classes", "ffn_dim")}
    wanted["qkv_dim"] = 3 * cfg.dim
    actual = shape_fields(found)
    differ = [f"{k} {actual[k]}, not {wanted[k]}" for k in actual if actual[k] != wanted[k]]
    if cfg.n_layer > len(found) and not differ:  # before the shapes of that many blocks are listed
        differ = [f"{len(found)} tensors, too few for {cfg.n_layer} blocks"]
    if differ:
        raise UserError(f"weights {path} have a different architecture: {'; '.join(differ)}")
    expected = {k.removeprefix("transformer."): shape for k, shape in parameter_shapes(cfg).items()}
    missing = [k for k in expected if k not in found]
    extra = [k for k in found if k not in expected]
    shapes = [f"{k} is {found[k]}, not {s}" for k, s in expected.items() if k in found and found[k] != s]
    problems = []
    for kind, names in (("missing", missing), ("unexpected", extra), ("with a different shape", shapes)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{len(names)} {kind} ({shown})")
    if problems:
        raise UserError(f"weights {path} do not match their configuration: {'; '.join(problems)}")


def shape_fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The architecture's fields that follow from the weights' shapes; ``qkv_dim`` is 3 D for multi-head attention."""
    out: dict[str, int] = {}
    blocks = {int(m.group(1)) for n in shapes if (m := re.match(r"layers\.([0-9]{1,9})\.", n))}
    if blocks:
        out["n_layer"] = max(blocks) + 1

    def matrix(name: str) -> tuple[int, ...]:
        shape = shapes.get(name, ())
        return shape if len(shape) == 2 else ()

    if table := matrix("tok_embeddings.weight"):
        out["vocab_size"], out["dim"] = table
    if table := matrix("cls_embedding.embedding_table.weight"):
        out["num_classes"] = table[0] - 1  # the last row is the null class
    if w1 := matrix("layers.0.feed_forward.w1.weight"):
        out["ffn_dim"] = w1[0]
    if qkv := matrix("layers.0.attention.wqkv.weight"):
        out["qkv_dim"] = qkv[0]
    return out
