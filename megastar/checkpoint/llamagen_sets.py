"""The sets of weights in a file of torch.save: which there are, which one is read, and what a trainer recorded beside them.

LlamaGen's trainers write {"model", "ema", "optimizer", "discriminator", "args", ...} (autoregressive/train/train_c2i.py,
tokenizer/tokenizer_image/vq_train.py), its FSDP trainer one flat dictionary. Of several sets none is taken silently.
"""

from __future__ import annotations

import logging
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.checkpoint.llamagen_reader import CLASS_TABLE, NeedsOption
from megastar.errors import UserError
from megastar.utils.json_file import shown

logger = logging.getLogger(__name__)
MARKERS = ("tok_embeddings.weight", "quantize.embedding.weight")  # of a network, of a tokenizer
IGNORED = ("freqs_cis", "causal_mask", "quantize.codebook_used")  # computed buffers and counters
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # of FSDP, torch.compile: anywhere
STEMS = ("module.", "model.")  # of DDP and others: at the beginning
DEPTH = 4  # of dictionaries in dictionaries that are searched
IMAGENET = 1000


@dataclass(frozen=True)
class WeightSet:
    """One set of named tensors. ``name``: its place, as "ema" or "state_dict.model"; empty at the top level."""

    name: str
    tensors: Mapping[Any, Any]

    @property
    def is_known(self) -> bool:
        """Whether it is a network or a tokenizer of LlamaGen, and not, for example, a discriminator."""
        return any(plain_name(n) in MARKERS for n in self.tensors if isinstance(n, str))


def plain_name(name: str) -> str:
    """A weight's name without what FSDP, DDP and torch.compile add to it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while stem := next((s for s in STEMS if name.startswith(s)), None):
        name = name.removeprefix(stem)
    return name


def find_sets(content: Mapping[Any, Any]) -> list[WeightSet]:
    """Every dictionary of named tensors in ``content``; dictionaries may contain each other."""
    return list(_search(content, "", set()))


def _search(content: Mapping[Any, Any], place: str, seen: set[int]) -> Iterator[WeightSet]:
    if id(content) in seen or place.count(".") >= DEPTH:
        return
    seen.add(id(content))
    if any(isinstance(v, Tensor) and "." in str(k) for k, v in content.items()):
        yield WeightSet(place.removeprefix("."), content)
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield from _search(value, f"{place}.{key}", seen)


def choose_set(path: Path, content: Mapping[Any, Any], wanted: str | None = None) -> WeightSet:
    """The only set of a network or a tokenizer, or of several the one named ``wanted``. Raises ``UserError``."""
    found = find_sets(content)
    known = [s for s in found if s.is_known] or found
    if not known:
        keys = ", ".join(shown(str(key)) for key in list(content)[:6]) or "nothing"
        raise UserError(
            f"{path} contains {keys}: expected weights at the top level or in a dictionary such as model, ema, module or "
            "state_dict"
        )
    names = [shown(s.name) or "the top level" for s in known]
    if wanted is None:
        if len(known) == 1:
            return known[0]
        options = " or ".join(f"--weights {shown(s.name)}" for s in known if s.name)
        raise NeedsOption(
            f"{path} contains {len(known)} sets of weights, {' and '.join(names)}: give {options}",
            f"--weights {shown(next(s.name for s in known if s.name))}",
        )
    if chosen := [s for s in known if wanted in (s.name, s.name.rpartition(".")[2])]:
        if len(chosen) == 1:
            return chosen[0]
        raise UserError(
            f"{path}: --weights {wanted} names {' and '.join(shown(s.name) for s in chosen)}: give the whole name"
        )
    if len(known) == 1 and not known[0].name:
        raise UserError(f"{path} contains one set of weights, without a name: leave out --weights {wanted}")
    raise UserError(f"{path} contains no weights named {wanted}: it has {' and '.join(names)}; give one of them")


def weights_in(path: Path, chosen: WeightSet) -> dict[str, Tensor]:
    """Plain name -> tensor, without computed buffers. Raises ``UserError`` for what is no set of finite plain tensors."""
    out: dict[str, Tensor] = {}
    size = left = path.stat().st_size
    for given, tensor in chosen.tensors.items():
        if not isinstance(given, str) or not isinstance(tensor, Tensor):
            if isinstance(given, str) and isinstance(tensor, Mapping) and not chosen.name:
                continue  # another entry beside weights at the top level
            raise UserError(
                f"{path}: {shown(given)} is a {type(tensor).__name__}, not a named tensor: use a file of weights only"
            )
        name = plain_name(given)
        if name.endswith("flat_param"):
            raise UserError(f"{path} contains FSDP's flat parameters: save the model with a full state dict first")
        if tensor.layout != torch.strided or not tensor.dtype.is_floating_point and name not in IGNORED:
            raise UserError(
                f"{path}: {shown(given)} is {tensor.dtype} in {tensor.layout} layout, expected plain floats"
            )
        left -= tensor.numel() * tensor.itemsize
        if left < 0:
            raise UserError(
                f"{path}: {shown(given)} has the shape {shown(str(tuple(tensor.shape)))}, with the others more than the "
                f"{size} bytes of the file: its elements repeat; ask its author for another file"
            )
        if name in IGNORED or name.endswith(("k_cache", "v_cache")):
            continue
        if name in out:
            raise UserError(f"{path} contains {shown(name)} twice, with different prefixes: save it without them")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {shown(given)} is not finite (NaN or infinite): take an earlier checkpoint")
        out[name] = tensor
    if any(n.startswith("cls_embedding.") and ("cap_proj" in n or "uncond_embedding" in n) for n in out):
        raise UserError(
            f"{path} is a text-to-image network of LlamaGen (t2i: caption embedding, no class table): megastar reads "
            "class-conditional networks (c2i) only"
        )
    return out


def recorded_args(content: Mapping[str, Any]) -> dict[str, int]:
    """The integers of the command line that LlamaGen's trainer stores."""
    args = content.get("args")
    values = vars(args) if isinstance(args, types.SimpleNamespace) else args if isinstance(args, Mapping) else {}
    return {str(k): v for k, v in values.items() if type(v) is int and 0 < v < 1 << 31}


def tokens_in(path: Path, content: Mapping[str, Any], chosen: WeightSet) -> int | None:
    """T from the rows of a stored ``freqs_cis``, else from the trainer's command line or a released file's name
    (c2i_B_384.pt), else None."""
    for name, table in chosen.tensors.items():
        if isinstance(name, str) and plain_name(name) == "freqs_cis" and isinstance(table, Tensor) and table.ndim:
            return table.shape[0] - 1
    if sides := _sides(path, content):
        return (sides[0] // sides[1]) ** 2
    return None


def downsample_in(path: Path, content: Mapping[str, Any]) -> int | None:
    """Pixels per token and side, where the file or its name tell it."""
    sides = _sides(path, content)
    return sides[1] if sides else None


def _sides(path: Path, content: Mapping[str, Any]) -> tuple[int, int] | None:
    args = recorded_args(content)
    if "image_size" in args and "downsample_size" in args:
        return args["image_size"], args["downsample_size"]
    found = re.search(r"_(256|384|512)$", path.stem)
    return (int(found.group(1)), 16) if found else None


def with_null_class(
    path: Path, weights: dict[str, Tensor], stated: int | None = None, given: int | None = None
) -> tuple[dict[str, Tensor], bool]:
    """``weights`` with a class table of N + 1 rows, and whether the file's has the null class.

    A network that LlamaGen trained without dropping labels has N rows; a row of zeros is added. ``stated``: N according
    to the trainer's command line, ``given``: according to the user. Raises ``UserError`` where N is not known.
    """
    table = weights.get(CLASS_TABLE)
    if table is None or table.ndim != 2:
        return weights, True
    rows, classes = table.shape[0], given or stated
    if classes is None and rows == IMAGENET:
        raise NeedsOption(
            f"{path} has a class table of {rows} rows: give --num-classes {rows} if it has no null class, or "
            f"--num-classes {rows - 1}",
            f"--num-classes {rows}",
        )
    if classes is None:
        if rows != IMAGENET + 1:
            logger.info(
                "%s: class table of %d rows read as %d classes and the null class; --num-classes %d of megastar convert "
                "reads it without one", path, rows, rows - 1, rows,
            )  # fmt: skip
        return weights, True
    if rows == classes + 1:
        return weights, True
    if rows != classes:
        who = "--num-classes" if given else "its recorded command line"
        raise UserError(
            f"{path} has a class table of {rows} rows, but {who} gives {classes} classes: expected {classes + 1}, or "
            f"{classes} without the null class"
        )
    return weights | {CLASS_TABLE: torch.cat([table, table.new_zeros(1, table.shape[1])])}, False
