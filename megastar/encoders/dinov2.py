"""DINOv2's vision transformers (ViT-S, B, L and g, 14-pixel patches, with and without registers), from a file.

Sources: Oquab et al. 2023 (arXiv 2304.07193), Darcet et al. 2023 (registers, arXiv 2309.16588), facebookresearch/dinov2:
dinov2/models/vision_transformer.py, hub/backbones.py. Reads the released .pth files, and safetensors with their names
or with those of Hugging Face's ``Dinov2Model`` and ``Dinov2WithRegistersModel``. Nothing is downloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.errors import UserError
from megastar.utils.json_file import shown
from megastar.utils.weights.weight_file import read_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
HEAD_DIM = 64  # in every size
OFFSET = 0.1  # patches, added to the grid's size where position embeddings are resized by a factor
SIZES = {384: "vits14", 768: "vitb14", 1024: "vitl14", 1536: "vitg14"}
WANTED = "dinov2_vitl14_pretrain.pth or another dinov2_vit{s,b,l,g}14[_reg4]_pretrain.pth of github.com/facebookresearch/dinov2"
MOST_WIDTH, MOST_BLOCKS, MOST_REGISTERS, MOST_GRID = 4096, 100, 64, 256
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
class DinoShape:
    """An architecture. ``grid``: side of the position embeddings in patches; ``hidden``: width of the feed-forward."""

    dim: int
    blocks: int
    hidden: int
    swiglu: bool
    registers: int
    patch: int
    grid: int

    @property
    def name(self) -> str:
        """dinov2_vitl14 or dinov2_vitl14_reg4, as the released files are named."""
        size = SIZES.get(self.dim, f"vit{self.dim}x{self.blocks}p{self.patch}")
        return f"dinov2_{size}" + (f"_reg{self.registers}" if self.registers else "")


class _SelfAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, D // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)  # each (B, H, S, D/H)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, S, D))
        return out


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class _LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, shape: DinoShape):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(shape.dim, eps=1e-6) for _ in range(2))
        self.attn = _SelfAttention(shape.dim)
        self.mlp = (_SwiGLU if shape.swiglu else _Mlp)(shape.dim, shape.hidden)
        self.ls1, self.ls2 = _LayerScale(shape.dim), _LayerScale(shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class _PatchEmbed(nn.Module):
    def __init__(self, shape: DinoShape):
        super().__init__()
        self.proj = nn.Conv2d(3, shape.dim, shape.patch, shape.patch)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)
        return out


class DINOv2(nn.Module):
    """The network, frozen and in eval mode. ``dim``: D; ``patch``: pixels of a patch's side."""

    def __init__(self, shape: DinoShape):
        super().__init__()
        self.shape, self.dim, self.patch = shape, shape.dim, shape.patch
        D = shape.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.grid**2, D))
        self.register_tokens = nn.Parameter(torch.zeros(1, shape.registers, D)) if shape.registers else None
        self.patch_embed = _PatchEmbed(shape)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def train(self, mode: bool = True) -> DINOv2:
        """Always in eval mode: the network is frozen."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1], H and W multiples of the patch: class tokens (B, D), patches (B, h*w, D).

        Both are after the final norm, in the type of the weights; patches are in raster order. Raises ``UserError``.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch or not height * width:
            raise UserError(
                f"images of {width} x {height} pixels: {self.shape.name} requires multiples of {self.patch}, such as 224 x 224"
            )
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
        x = self.patch_embed(((images.float() - mean) / std).to(self.cls_token.dtype))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(height // self.patch, width // self.patch)
        R = self.shape.registers
        if self.register_tokens is not None:  # without position embeddings, between the class token and the patches
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + R :]

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + height * width, D), bicubically resized to a grid of other sides.

        As in the released models: those without registers are resized by the factor (side + 0.1) / grid without
        antialiasing, those with registers to the size, with antialiasing.
        """
        grid = self.shape.grid
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
    with torch.device("meta"):
        net = DINOv2(shape)
    wanted = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    wrong = [f"{k} is missing" for k in wanted if k not in state]
    wrong += [f"{shown(k)} is unexpected" for k in state if k not in wanted]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, not {s}" for k, s in wanted.items() if k in state and state[k].shape != s
    ]
    wrong += [f"{k} is {v.dtype}" for k, v in state.items() if k in wanted and not v.is_floating_point()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} is not {shape.name}: {', '.join(wrong[:3])}{more}; use {WANTED}")
    net.load_state_dict({k: state[k].float() for k in wanted}, assign=True)
    return net.requires_grad_(False).eval()


def _shape(state: Mapping[str, Tensor], source: str | Path) -> DinoShape:
    """The architecture of the released names. Raises ``UserError``."""
    if "rope_embed.periods" in state:
        raise UserError(f"{source} is a DINOv3 file, which has rotary positions: use {WANTED}")
    swiglu = "blocks.0.mlp.w3.weight" in state
    out = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    dims = {"patch_embed.proj.weight": 4, "pos_embed": 3, out: 2, "cls_token": 3}
    if bad := [k for k, n in dims.items() if k not in state or state[k].ndim != n or not state[k].numel()]:
        raise UserError(f"{source} is not a DINOv2 network, which has {', '.join(bad)}: use {WANTED}")
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    numbers = {int(m.group(1)) for k in state if (m := re.match(r"blocks\.([0-9]{1,3})\.", k))}
    registers = (
        state["register_tokens"].shape[1] if "register_tokens" in state and state["register_tokens"].ndim == 3 else 0
    )
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    hidden = state[out].shape[1]
    made = DinoShape(dim, len(numbers), hidden, swiglu, registers, patch, grid)
    limits = (
        (dim, MOST_WIDTH),
        (len(numbers), MOST_BLOCKS),
        (registers, MOST_REGISTERS),
        (grid, MOST_GRID),
        (patch, 64),
    )
    fits = all(value <= most for value, most in limits) and hidden <= 8 * dim and grid > 0 and dim % HEAD_DIM == 0
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
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    for name in [k for k in out if ".attn.query." in k]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        found = [out[p] for p in parts if p in out and out[p].shape == out[name].shape and out[p].ndim]
        if len(found) == 3:  # else the caller reports the names
            out[name.replace("query", "qkv")] = torch.cat([out.pop(p) for p in parts])
    return out
