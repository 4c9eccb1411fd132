"""DINOv2's vision transformers (ViT-S, B, L and g, 14-pixel patches, with and without registers), from a file.

Sources: Oquab et al. 2023 (arXiv 2304.07193), Darcet et al. 2023 (registers, arXiv 2309.16588), facebookresearch/dinov2:
dinov2/models/vision_transformer.py, hub/backbones.py. Reads the released .pth files, and safetensors with their names
or with those of Hugging Face's ``Dinov2Model`` and ``Dinov2WithRegistersModel``. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
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

HEAD_DIM = 64  # in every size
OFFSET = 0.1  # patches, added to the grid's size where position embeddings are resized by a factor
SIZES = {384: "vits14", 768: "vitb14", 1024: "vitl14", 1536: "vitg14"}
WANTED = "dinov2_vitl14_pretrain.pth or another dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth of github.com/facebookresearch/dinov2"
MOST_GRID = 256
# Names of Hugging Face's files, as patterns, and DINOv2's
_RENAMED = (
    (r"^dinov2(_with_registers)?\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)


@dataclass(frozen=True)
class DinoShape(VitShape):
    """An architecture. ``grid``: side of the position embeddings in patches."""

    grid: int

    @property
    def name(self) -> str:
        """dinov2_vitl14 or dinov2_vitl14_reg4, as the released files are named."""
        size = SIZES.get(self.dim, f"vit{self.dim}x{self.blocks}p{self.patch}")
        return f"dinov2_{size}" + (f"_reg{self.registers}" if self.registers else "")


class DINOv2(FrozenVit):
    """The network, frozen and in eval mode. ``dim``: D; ``patch``: pixels of a patch's side."""

    def __init__(self, shape: DinoShape):
        super().__init__(shape, HEAD_DIM, qkv_bias=True, eps=1e-6)
        self.grid = shape.grid
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.grid**2, shape.dim))

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + height * width, D), bicubically resized to a grid of other sides.

        As in the released models: those without registers are resized by the factor (side + 0.1) / grid without
        antialiasing, those with registers to the size, with antialiasing.
        """
        grid = self.grid
        if (height, width) == (grid, grid):
            return self.pos_embed
        table = self.pos_embed.float()
        patches = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)  # (1, D, grid, grid)
        if self.shape.registers:
            patches = F.interpolate(patches, size=(height, width), mode="bicubic", antialias=True)
        else:
            factors = ((height + OFFSET) / grid, (width + OFFSET) / grid)
            patches = F.interpolate(patches, scale_factor=factors, mode="bicubic")
        assert patches.shape[-2:] == (height, width)
        patches = patches.flatten(2).transpose(1, 2)  # (1, h*w, D)
        return torch.cat((table[:, :1], patches), dim=1).to(self.pos_embed.dtype)


def load(path: str | Path) -> DINOv2:
    """The network of a file, in fp32 on the CPU. Raises ``UserError`` for a file that is not DINOv2's."""
    return from_tensors(read_tensors(path), path)


def from_tensors(tensors: Mapping[str, Tensor], source: str | Path = "weights") -> DINOv2:
    """The network of named tensors; its architecture is read from their shapes. Raises ``UserError``."""
    state = _released_names(tensors)
    state = {k: v for k, v in state.items() if k != "mask_token" and not k.startswith(("head.", "classifier."))}
    shape = _shape(state, source)
    return filled(lambda: DINOv2(shape), state, source, WANTED)


def _shape(state: Mapping[str, Tensor], source: str | Path) -> DinoShape:
    """The architecture of the released names. Raises ``UserError``."""
    if any(k in state for k in ("rope_embed.periods", "storage_tokens")) or any(
        ".attention.q_proj." in k for k in state
    ):
        raise UserError(
            f"{source} is a DINOv3 file, which has rotary positions: use {WANTED} (pretokenize reads it with --features dinov3)"
        )
    swiglu = "blocks.0.mlp.w3.weight" in state
    out = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    check_present(
        state, {"patch_embed.proj.weight": 4, "pos_embed": 3, out: 2, "cls_token": 3}, source, "DINOv2", WANTED
    )
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    numbers, registers = block_numbers(state), count_registers(state)
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    hidden = state[out].shape[1]
    made = DinoShape(dim, len(numbers), hidden, swiglu, registers, patch, grid)
    fits = made.possible and 0 < grid <= MOST_GRID and dim % HEAD_DIM == 0
    if not fits or grid**2 + 1 != state["pos_embed"].shape[1] or numbers != set(range(len(numbers))):
        raise UserError(
            f"{source} is not a DINOv2 network: width {dim}, {len(numbers)} blocks, feed-forward {hidden}, {registers} "
            f"registers, {state['pos_embed'].shape[1]} positions, patches of {patch} pixels; use {WANTED}"
        )
    return made


def _released_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names as the released ones, with query, key and value joined; other names as they are."""
    if not any(".attention.attention.query." in k for k in tensors):
        return dict(tensors)
    out = renamed(tensors, _RENAMED)
    join(out, (".attn.query.", ".attn.key.", ".attn.value."), ".attn.qkv.")
    return out
