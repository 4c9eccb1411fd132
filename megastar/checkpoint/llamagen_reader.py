"""Reading LlamaGen's files: the AR network's checkpoints and the VQ tokenizers, pickled by torch.save.

Sources: LlamaGen's autoregressive/sample/sample_c2i.py (where the weights lie in a checkpoint), autoregressive/models/
gpt.py (names, sizes), tokenizer/tokenizer_image/vq_model.py. A pickle can run any code when it is read: only torch's
restricted reader (``weights_only=True``) opens one here, and what it refuses stays unread.
"""

from __future__ import annotations

import math
import pickle
import re
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megastar.checkpoint.llamagen_writer import SIZES
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import shape_fields

WRAPPERS = ("model", "module", "state_dict")
IGNORED = ("freqs_cis", "causal_mask", "quantize.codebook_used")  # buffers that are computed, or only count
STEMS = ("module.", "_orig_mod.", "model.")  # what DDP, torch.compile and others put before every name
USUAL_TOKENS = "256 (pictures of 256 pixels by VQ-16), 576 (384) or 1024 (512)"


def load_pickled(path: Path) -> dict[str, Any]:
    """What torch.save wrote, tensors mapped, not read. ``UserError`` for anything but plain data, read or not."""
    # LlamaGen's trainer keeps its command line there, a bag of values: it is read as another one.
    bags = torch.serialization.safe_globals([(types.SimpleNamespace, "argparse.Namespace")])
    try:
        with bags:
            mapped = zipfile.is_zipfile(path)  # older files are one pickle
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {found.group(1)}" if found else "what no weights file holds"
        raise UserError(
            f"{path} holds {what}, which could run code when it is read: it was refused unread; "
            "ask its author for the tensors alone, or for safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path} is cut off or no file of torch.save ({said}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def weights_in(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name -> tensor: flat, or under model, module or state_dict; wrappers' stems and computed buffers left out."""
    inner: Any = content
    while not _is_flat(inner):
        name = next((n for n in WRAPPERS if isinstance(inner.get(n), dict)), None)
        if name is None:
            keys = ", ".join(map(str, list(inner)[:6])) or "nothing"
            raise UserError(f"{path} holds {keys}: its weights should lie flat or under {', '.join(WRAPPERS)}")
        inner = inner[name]
    out = {}
    for name, tensor in inner.items():
        while stem := next((s for s in STEMS if name.startswith(s)), None):
            name = name.removeprefix(stem)
        if name not in IGNORED and not name.endswith(("k_cache", "v_cache")):
            out[name] = tensor
    return out


def _is_flat(content: Mapping[str, Any]) -> bool:
    return any(isinstance(v, Tensor) and "." in str(k) for k, v in content.items())


def tokens_in(path: Path, content: Mapping[str, Any]) -> int | None:
    """T as the rows of a kept ``freqs_cis`` tell it, else as the released files' names do (c2i_B_384.pt), else None."""
    inner: Any = content
    while isinstance(inner, Mapping):
        if isinstance(table := inner.get("freqs_cis"), Tensor):
            return table.shape[0] - 1
        inner = next((inner[n] for n in WRAPPERS if isinstance(inner.get(n), Mapping)), None)
    found = re.search(r"_(256|384|512)$", path.stem)
    return (int(found.group(1)) // 16) ** 2 if found else None


def model_config(
    path: Path,
    weights: Mapping[str, Tensor],
    asked: ModelConfig | None = None,
    tokens: int | None = None,
    image_tokens: int | None = None,
) -> ModelConfig:
    """The architecture of an AR checkpoint: by its shapes, and what they do not tell by LlamaGen's table or ``asked``.

    ``tokens`` is T as the file tells it, ``image_tokens`` as the user does. Raises ``UserError``; for a file that is
    not of the architecture ``asked`` for it lists every field that differs.
    """
    if any(name.startswith("cls_embedding.") and "cap_proj" in name for name in weights):
        raise UserError(f"{path} is a text-conditional network: megastar reads class-conditional ones")
    found = shape_fields({k: tuple(v.shape) for k, v in weights.items()})
    if not {"vocab_size", "dim", "num_classes", "n_layer", "ffn_dim", "qkv_dim"} <= found.keys():
        raise UserError(f"{path} holds no AR network of LlamaGen: its first names are {', '.join(list(weights)[:3])}")
    if found["qkv_dim"] != 3 * found["dim"]:
        raise UserError(f"{path} has keys and values of fewer heads than queries, which megastar's network has not")
    del found["qkv_dim"]
    if asked is not None:
        check_architecture(path, found | ({} if tokens is None else {"image_tokens": tokens}), asked)
        return asked
    T = image_tokens or tokens
    if T is None:
        raise UserError(f"{path} does not tell how many tokens a picture has: give --image-tokens, {USUAL_TOKENS}")
    if math.isqrt(T) ** 2 != T:
        raise UserError(f"--image-tokens {T} is no square number: it is usually {USUAL_TOKENS}")
    if tokens is not None and tokens != T:
        raise UserError(f"{path} is of pictures of {tokens} tokens, not of --image-tokens {T}")
    known = {(layers, dim): (heads, name) for (layers, heads, dim), name in SIZES.items()}
    size = (found["n_layer"], found["dim"])
    if size not in known:
        named = ", ".join(f"{n} {layers} x {dim}" for (layers, _, dim), n in SIZES.items())
        raise UserError(
            f"{path} has {size[0]} blocks of width {size[1]}, which is none of LlamaGen's sizes ({named}), and the number "
            "of heads does not show in its weights: give --config with a model's YAML, as configs/model/b.yaml"
        )
    heads, name = known[size]
    ffn = found.pop("ffn_dim")
    made = ModelConfig(name=name.lower(), n_head=heads, image_tokens=T, **found)
    if made.ffn_dim != ffn:
        made.multiple_of = ffn
    return made


def check_architecture(path: Path, found: Mapping[str, int], asked: ModelConfig) -> None:
    """Raises ``UserError`` with every field in which the file and the configuration differ."""
    differ = [f"{k} {v}, not {getattr(asked, k)}" for k, v in found.items() if v != getattr(asked, k)]
    if differ:
        raise UserError(f"{path} is of another architecture: {'; '.join(differ)}")


def tokenizer_config(path: Path, weights: Mapping[str, Tensor], image_size: int) -> TokenizerConfig:
    """The architecture of a VQ tokenizer by its shapes; LlamaGen's norms have 32 groups, its codes unit length."""
    try:
        channels = weights["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.conv_blocks."))
        outs = [weights[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
        res = len({n.split(".")[4] for n in weights if n.startswith("encoder.conv_blocks.0.res.")})
        z_channels = weights["encoder.conv_out.weight"].shape[0]
        size, width = weights["quantize.embedding.weight"].shape
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} holds no VQ tokenizer of LlamaGen: {error} is missing") from error
    made = TokenizerConfig(image_size, channels, [c // channels for c in outs], res, z_channels, size, width)
    if image_size % made.downsample:
        raise UserError(
            f"--image-size {image_size} is no multiple of {made.downsample}, by which this tokenizer shrinks"
        )
    return made
