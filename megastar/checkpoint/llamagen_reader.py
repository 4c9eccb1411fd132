"""Reading LlamaGen's files: the AR network's checkpoints and the VQ tokenizers, pickled by torch.save.

Sources: LlamaGen's autoregressive/sample/sample_c2i.py (location of the weights in a checkpoint), autoregressive/models/
gpt.py (names, sizes), tokenizer/tokenizer_image/vq_model.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megastar.checkpoint.llamagen_writer import SIZES
from megastar.config.rules.tokenizer import tokenizer_problems
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.io import shape_fields
from megastar.utils.json_file import shown

CLASS_TABLE = "cls_embedding.embedding_table.weight"
USUAL_TOKENS = "256 (256x256 images by VQ-16), 576 (384x384) or 1024 (512x512)"


class NeedsOption(UserError):
    """The file does not store something that an option of ``megastar convert`` supplies."""

    def __init__(self, sentence: str, option: str):
        super().__init__(sentence)
        self.option = option


def model_config(
    path: Path,
    weights: Mapping[str, Tensor],
    expected: ModelConfig | None = None,
    tokens: int | None = None,
    image_tokens: int | None = None,
) -> ModelConfig:
    """The architecture of an AR checkpoint from its shapes, completed by LlamaGen's table of sizes or ``expected``.

    ``tokens`` is T according to the file, ``image_tokens`` according to the user. Raises ``UserError``; for a file whose
    architecture is not ``expected`` it lists every field that differs.
    """
    found = shape_fields({k: tuple(v.shape) for k, v in weights.items()})
    if not {"vocab_size", "dim", "num_classes", "n_layer", "ffn_dim", "qkv_dim"} <= found.keys():
        raise UserError(f"{path} is not an AR network of LlamaGen: its first names are {', '.join(list(weights)[:3])}")
    if found["qkv_dim"] != 3 * found["dim"]:
        raise UserError(f"{path} has fewer key/value heads than query heads, which megastar does not support")
    del found["qkv_dim"]
    if expected is not None:
        actual = found | ({} if tokens is None else {"image_tokens": tokens})
        if differ := [f"{k} {v}, not {getattr(expected, k)}" for k, v in actual.items() if v != getattr(expected, k)]:
            raise UserError(f"{path} has a different architecture: {'; '.join(differ)}")
        return expected
    T = image_tokens or tokens
    if T is None:
        sentence = f"{path} does not store the number of tokens per image: give --image-tokens, {USUAL_TOKENS}"
        raise NeedsOption(sentence, "--image-tokens 256")
    if math.isqrt(T) ** 2 != T:
        raise UserError(f"--image-tokens {T} is not a square number: usual values are {USUAL_TOKENS}")
    if tokens is not None and tokens != T:
        raise UserError(
            f"{path} was trained on {tokens} tokens per image, not --image-tokens {T}: leave the option out"
        )
    known = {(layers, dim): (heads, name) for (layers, heads, dim), name in SIZES.items()}
    size = (found["n_layer"], found["dim"])
    if size not in known:
        named = ", ".join(f"{n} {layers} x {dim}" for (layers, _, dim), n in SIZES.items())
        sentence = (
            f"{path} has {size[0]} blocks of width {size[1]}, which is not one of LlamaGen's sizes ({named}), and the "
            "weights do not show the number of heads: give --config with a model's YAML, such as configs/model/b.yaml"
        )
        raise NeedsOption(sentence, "--config MODEL.yaml")
    heads, name = known[size]
    ffn = found.pop("ffn_dim")
    fields: dict[str, Any] = {**found}
    made = ModelConfig(name=name.lower(), n_head=heads, image_tokens=T, **fields)
    if made.ffn_dim != ffn:
        made.multiple_of = ffn
    return made


def tokenizer_config(path: Path, weights: Mapping[str, Tensor], image_size: int) -> TokenizerConfig:
    """The architecture of a VQ tokenizer from its shapes (LlamaGen: 32 norm groups, unit-length codes)."""
    try:
        channels = weights["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.conv_blocks."))
        outs = [weights[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
        res = len({n.split(".")[4] for n in weights if n.startswith("encoder.conv_blocks.0.res.")})
        z_channels = weights["encoder.conv_out.weight"].shape[0]
        size, width = weights["quantize.embedding.weight"].shape
        multipliers = [c // channels for c in outs]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a VQ tokenizer of LlamaGen: {shown(str(error))} is missing") from error
    made = TokenizerConfig(
        image_size, channels, multipliers, res, z_channels, codebook_size=size, codebook_embed_dim=width
    )
    if problem := next(tokenizer_problems(made), None) if image_size % made.downsample == 0 else None:
        raise UserError(f"{path} is not a VQ tokenizer of LlamaGen: {problem.text}; download it again")
    if image_size % made.downsample:
        raise UserError(
            f"--image-size {image_size} is not a multiple of {made.downsample}, the tokenizer's downsampling factor"
        )
    return made
