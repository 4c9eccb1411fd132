"""What DINOv2's and DINOv3's vision transformers share: their layers, the forward pass, and reading them from named tensors.

Sources: facebookresearch/dinov2, dinov2/models/vision_transformer.py; facebookresearch/dinov3, the file of the same name.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.errors import UserError
from megastar.utils.json_file import shown

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
MOST_WIDTH, MOST_BLOCKS, MOST_REGISTERS, MOST_PATCH, MOST_RATIO = 4096, 100, 64, 64, 8


@dataclass(frozen=True)
class VitShape(ABC):
    """An architecture. ``hidden``: width of the feed-forward; ``patch``: pixels of a patch's side."""

    dim: int
    blocks: int
    hidden: int
    swiglu: bool
    registers: int
    patch: int

    @property
    @abstractmethod
    def name(self) -> str:
        """As the released files are named."""

    @property
    def possible(self) -> bool:
        """Whether the numbers are those of a network that could have been trained."""
        limits = (
            (self.dim, MOST_WIDTH),
            (self.blocks, MOST_BLOCKS),
            (self.patch, MOST_PATCH),
            (self.hidden, MOST_RATIO * self.dim),
        )
        return all(0 < value <= most for value, most in limits) and 0 <= self.registers <= MOST_REGISTERS


class VitAttention(nn.Module):
    """Self-attention of heads of width ``head_dim``; queries and keys are rotated if a rotation is given."""

    def __init__(self, dim: int, head_dim: int, qkv_bias: bool):
        super().__init__()
        self.head_dim = head_dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        B, S, D = x.shape
        heads = self.qkv(x).view(B, S, 3, D // self.head_dim, self.head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, S, D/H)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, S, D))
        return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., S, D/H), whose element i and i + D/2H are a pair, rotated by the angles of ``cos`` and ``sin`` (S, D/H)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GeluMlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGluMlp(nn.Module):
    """``w12`` holds the gate's rows and then those of the value."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VitBlock(nn.Module):
    def __init__(self, shape: VitShape, head_dim: int, qkv_bias: bool, eps: float):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(shape.dim, eps=eps) for _ in range(2))
        self.attn = VitAttention(shape.dim, head_dim, qkv_bias)
        self.mlp = (SwiGluMlp if shape.swiglu else GeluMlp)(shape.dim, shape.hidden)
        self.ls1, self.ls2 = LayerScale(shape.dim), LayerScale(shape.dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, shape: VitShape):
        super().__init__()
        self.proj = nn.Conv2d(3, shape.dim, shape.patch, shape.patch)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)
        return out


class FrozenVit(nn.Module):
    """A vision transformer, frozen and in eval mode. ``dim``: D; ``patch``: pixels of a patch's side."""

    def __init__(self, shape: VitShape, head_dim: int, qkv_bias: bool, eps: float):
        super().__init__()
        self.shape, self.dim, self.patch = shape, shape.dim, shape.patch
        D = shape.dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_tokens = nn.Parameter(torch.zeros(1, shape.registers, D)) if shape.registers else None
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(VitBlock(shape, head_dim, qkv_bias, eps) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(D, eps=eps)

    def train(self, mode: bool = True) -> FrozenVit:
        """Always in eval mode: the network is frozen."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1], H and W multiples of the patch: class tokens (B, D), patches (B, h*w, D).

        Both are after the final norm, in the type of the weights; patches are in raster order. Raises ``UserError``.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch or not height * width:
            side = 224 // self.patch * self.patch or self.patch
            raise UserError(
                f"images of {width} x {height} pixels: {self.shape.name} requires multiples of {self.patch}, such as "
                f"{side} x {side}"
            )
        h, w = height // self.patch, width // self.patch
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
        x = self.patch_embed(((images.float() - mean) / std).to(self.cls_token.dtype))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        if (positions := self.positions(h, w)) is not None:
            x = x + positions
        R = self.shape.registers
        if self.register_tokens is not None:  # without position embeddings, between the class token and the patches
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        rotation = self.rotation(h, w)
        for block in self.blocks:
            x = block(x, rotation)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + R :]

    def positions(self, height: int, width: int) -> Tensor | None:
        """Position embeddings (1, 1 + height * width, D) that are added to the class token and the patches."""
        return None

    def rotation(self, height: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine (1 + R + height * width, D/H) of the angles by which queries and keys are rotated."""
        return None


Net = TypeVar("Net", bound=FrozenVit)


def filled(make: Callable[[], Net], state: Mapping[str, Tensor], source: str | Path, wanted: str) -> Net:
    """The network of ``make`` with the tensors of ``state``, in fp32 on the CPU. ``UserError`` for any other tensors."""
    with torch.device("meta"):
        net = make()
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    wrong = [f"{k} is missing" for k in shapes if k not in state]
    wrong += [f"{shown(k)} is unexpected" for k in state if k not in shapes]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, not {s}" for k, s in shapes.items() if k in state and state[k].shape != s
    ]
    wrong += [f"{k} is {v.dtype}" for k, v in state.items() if k in shapes and not v.is_floating_point()]
    wrong += [f"{k} is {v.layout}" for k, v in state.items() if k in shapes and v.layout != torch.strided]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} is not {net.shape.name}: {', '.join(wrong[:3])}{more}; use {wanted}")
    net.load_state_dict({k: state[k].float() for k in shapes}, assign=True)
    return net.requires_grad_(False).eval()


def check_present(
    state: Mapping[str, Tensor], dims: Mapping[str, int], source: str | Path, family: str, wanted: str
) -> None:
    """Raise ``UserError`` if a tensor is missing, empty, or has another number of dimensions than ``dims`` gives."""
    if bad := [k for k, n in dims.items() if k not in state or state[k].ndim != n or not state[k].numel()]:
        raise UserError(f"{source} is not a {family} network, which has {', '.join(bad)}: use {wanted}")


def block_numbers(state: Iterable[str]) -> set[int]:
    """The numbers of the blocks that the names mention."""
    return {int(m.group(1)) for k in state if (m := re.match(r"blocks\.([0-9]{1,3})\.", k))}


def count_registers(state: Mapping[str, Tensor]) -> int:
    tokens = state.get("register_tokens")
    return tokens.shape[1] if tokens is not None and tokens.ndim == 3 else 0


def renamed(tensors: Mapping[str, Tensor], patterns: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors with each pattern of a name replaced, in this order."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in patterns:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out


def join(state: dict[str, Tensor], parts: Sequence[str], joined: str) -> None:
    """Replace tensors ``...PART...`` of equal shape by one ``...JOINED...``, stacked along the first dimension, in ``state``.

    ``parts`` and ``joined`` as in ``(".query.", ".key.")`` and ``".qkv."``. Where a part is missing nothing changes: the caller reports the names.
    """
    for name in [k for k in state if parts[0] in k]:
        names = [name.replace(parts[0], part) for part in parts]
        found = [state[n] for n in names if n in state and state[n].shape == state[name].shape and state[n].ndim]
        if len(found) == len(parts):
            state[name.replace(parts[0], joined)] = torch.cat([state.pop(n) for n in names])
