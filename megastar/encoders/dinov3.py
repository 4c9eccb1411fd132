"""DINOv3's vision transformers (ViT-S, S+, B, L, L+, H+ and 7B, 16-pixel patches), from a file.

Sources: Simeoni et al. 2025 (arXiv 2508.10104), facebookresearch/dinov3: dinov3/models/vision_transformer.py,
dinov3/layers/rope_position_encoding.py, dinov3/hub/backbones.py. Reads the released .pth files, and safetensors with their names
or with those of Hugging Face's ``DINOv3ViTModel``. Nothing is downloaded. Its ConvNeXts are refused: they have no patch tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megastar.encoders.vit import (
    FrozenVit,
    VitShape,
    block_numbers,
    check_present,
    count_registers,
    filled,
    join,
    renamed,
)
from megastar.errors import UserError
from megastar.utils.weights.weight_file import read_tensors

EPS = 1e-5  # of the norms: "layernormbf16" of the released models
ROPE_BASE = 100.0
MOST_HEAD_DIM = 256
SIZES = {
    (384, False): "vits16",
    (384, True): "vits16plus",
    (768, False): "vitb16",
    (1024, False): "vitl16",
    (1024, True): "vitl16plus",
    (1280, True): "vith16plus",
    (4096, True): "vit7b16",
}  # (width, SwiGLU)
WANTED = (
    "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth or another ViT of github.com/facebookresearch/dinov3, "
    "or the model.safetensors of facebook/dinov3-vit* on the Hugging Face Hub; for the 7B, model.safetensors.index.json with its files beside it"
)
# Names of Hugging Face's files, as patterns, and the released ones
_RENAMED = (
    (r"^(dinov3_vit\.)?(model\.)?", ""),
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_GATED = ((r"\.mlp\.gate_proj\.", ".mlp.w1."), (r"\.mlp\.up_proj\.", ".mlp.w2."), (r"\.mlp\.down_proj\.", ".mlp.w3."))
_PLAIN = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))


@dataclass(frozen=True)
class Dino3Shape(VitShape):
    """An architecture. ``head_dim``: width of a head; ``qkv_bias``: whether queries, keys and values have biases."""

    head_dim: int
    qkv_bias: bool

    @property
    def name(self) -> str:
        """dinov3_vitb16, as the released files are named."""
        return f"dinov3_{SIZES.get((self.dim, self.swiglu), f'vit{self.dim}x{self.blocks}p{self.patch}')}"


class _Rope(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.periods: Tensor
        self.register_buffer("periods", torch.ones(head_dim // 4))


class DINOv3(FrozenVit):
    """The network, frozen and in eval mode. ``dim``: D; ``patch``: pixels of a patch's side."""

    def __init__(self, shape: Dino3Shape):
        super().__init__(shape, shape.head_dim, shape.qkv_bias, EPS)
        self.rope_embed = _Rope(shape.head_dim)

    def rotation(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine (1 + R + height * width, D/H), computed in fp32; the class token and the registers are not rotated.

        The centre of a patch has coordinates (y, x) in [-1, 1], each axis normalised by its own size; the first quarter of
        a head's width is rotated with the third by 2 pi y / period, the second with the fourth by 2 pi x / period.
        """
        periods = self.rope_embed.periods.float()
        axes = [2 * torch.arange(0.5, n, device=periods.device) / n - 1 for n in (height, width)]
        centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (h*w, 2)
        angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1).tile(2)  # (h*w, D/H)
        angles = torch.cat((angles.new_zeros(1 + self.shape.registers, angles.shape[1]), angles))
        return angles.cos().to(self.cls_token.dtype), angles.sin().to(self.cls_token.dtype)


def load(path: str | Path) -> DINOv3:
    """The network of a file, in fp32 on the CPU. Raises ``UserError`` for a file that is not one of DINOv3's ViTs."""
    return from_tensors(read_tensors(path), path)


def from_tensors(tensors: Mapping[str, Tensor], source: str | Path = "weights") -> DINOv3:
    """The network of named tensors; its architecture is read from their shapes. Raises ``UserError``."""
    _check_family(tensors, source)
    state = _released_names(tensors)
    # local_cls_norm is of the training's small crops; the released models do not use it
    unused = ("head.", "classifier.", "local_cls_norm.")
    state = {k: v for k, v in state.items() if k != "mask_token" and not k.startswith(unused)}
    if "storage_tokens" in state:
        state["register_tokens"] = state.pop("storage_tokens")
    _apply_bias_masks(state, source)
    join(state, (".mlp.w1.", ".mlp.w2."), ".mlp.w12.")
    shape = _shape(state, source)
    return filled(lambda: DINOv3(shape), state, source, WANTED)


def _check_family(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ``UserError`` for DINOv2 and for a ConvNeXt."""
    if any(k == "pos_embed" or k.endswith("embeddings.position_embeddings") for k in tensors):
        raise UserError(f"{source} has position embeddings, as DINOv2 (--features dinov2); dinov3 requires {WANTED}")
    if any(k.removeprefix("model.").startswith(("downsample_layers.", "stages.")) for k in tensors):
        raise UserError(f"{source} is a ConvNeXt, which has no patch tokens: use {WANTED}")


def _shape(state: Mapping[str, Tensor], source: str | Path) -> Dino3Shape:
    """The architecture of the released names. Raises ``UserError``."""
    swiglu = "blocks.0.mlp.w3.weight" in state
    out = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    dims = {"rope_embed.periods": 1, "patch_embed.proj.weight": 4, out: 2, "cls_token": 3}
    check_present(state, dims, source, "DINOv3", WANTED)
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    numbers, registers, periods = block_numbers(state), count_registers(state), state["rope_embed.periods"]
    hidden, head_dim = state[out].shape[1], 4 * len(periods)
    made = Dino3Shape(dim, len(numbers), hidden, swiglu, registers, patch, head_dim, "blocks.0.attn.qkv.bias" in state)
    fits = made.possible and head_dim <= MOST_HEAD_DIM and dim % head_dim == 0
    if not fits or numbers != set(range(len(numbers))):
        raise UserError(
            f"{source} is not a DINOv3 network: width {dim}, heads of {head_dim}, {len(numbers)} blocks, feed-forward "
            f"{hidden}, {registers} registers, patches of {patch} pixels; use {WANTED}"
        )
    known = periods.float() if periods.is_floating_point() else torch.zeros(1)
    if not (known.isfinite() & (known > 0)).all():
        raise UserError(f"{source} is damaged: rope_embed.periods must be positive numbers; use {WANTED}")
    return made


def _apply_bias_masks(state: dict[str, Tensor], source: str | Path) -> None:
    """Multiply the biases of queries, keys and values by the stored masks, which remove those of the keys. In place."""
    for name in [k for k in state if k.endswith(".attn.qkv.bias_mask")]:
        mask, bias = state.pop(name), state.get(name.removesuffix("_mask"))
        known = mask.float() if not mask.is_complex() else torch.full((1,), math.nan)
        if bias is None or bias.shape != mask.shape or not ((known == 0) | (known == 1)).all():
            raise UserError(
                f"{source} is damaged: {name} is not a mask of zeros and ones of the shape of its bias; use {WANTED}"
            )
        state[name.removesuffix("_mask")] = bias.float() * known if bias.is_floating_point() else bias


def _released_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names as the released ones, with query, key and value joined; other names as they are.

    Keys without biases get zeros. The periods, which these files do not hold, are those of all released models; heads
    are 64 wide, 128 in the network of width 4096.
    """
    if not any(".attention.q_proj." in k for k in tensors):
        return dict(tensors)
    gated = any(".mlp.gate_proj." in k for k in tensors)
    out = renamed(tensors, _RENAMED + (_GATED if gated else _PLAIN))
    for name in [k for k in out if k.endswith(".attn.q.bias")]:
        out.setdefault(name.replace(".attn.q.", ".attn.k."), torch.zeros_like(out[name]))
    join(out, (".attn.q.", ".attn.k.", ".attn.v."), ".attn.qkv.")
    width = out["cls_token"].shape[-1] if "cls_token" in out and out["cls_token"].ndim else 0
    head_dim = 128 if width == 4096 else 64
    out.setdefault("rope_embed.periods", ROPE_BASE ** (torch.arange(head_dim // 4) * 4 / head_dim))
    return out
