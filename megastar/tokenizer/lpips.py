"""LPIPS on VGG-16 (arXiv 1801.03924), version 0.1, as LlamaGen's and taming-transformers' perceptual loss, from files that
the user names; nothing is downloaded.

``lpips_vgg``: torchvision's VGG-16 (vgg16-397923af.pth: features.0.weight ...). ``lpips_linear``: the learned weights of the
five layers (vgg.pth of LPIPS 0.1, the same in the PyPI package ``lpips`` as lpips/weights/v0.1/vgg.pth: lin0.model.1.weight ...).
Both may be safetensors files with the same names.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastar.errors import UserError
from megastar.utils.files import open_regular
from megastar.utils.json_file import shown
from megastar.utils.weights.safetensors_header import open_tensors, read_header

# Channels of the convolutions between two max pools; LPIPS compares the last output of each group, after its ReLU.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
EPSILON = 1e-10
VGG_FILE = "lpips_vgg: torchvision's VGG-16, vgg16-397923af.pth"
LINEAR_FILE = "lpips_linear: vgg.pth of LPIPS 0.1"


class LPIPS(nn.Module):
    """Frozen. Dropout on the differences, which LlamaGen's training leaves on by accident of ``train()``, is left out."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels, place = [], 3, 0
        self.places: list[list[int]] = []  # of each group's convolutions in torchvision's ``features``
        for group in GROUPS:
            self.places.append([])
            for width in group:
                layers.append((f"features_{place}", nn.Conv2d(channels, width, 3, padding=1)))
                self.places[-1].append(place)
                channels, place = width, place + 2  # a convolution and its ReLU
            place += 1  # the pool
        self.convolutions = nn.ModuleDict(dict(layers))
        self.linear = nn.ParameterList(nn.Parameter(torch.ones(group[-1])) for group in GROUPS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    shift: Tensor
    scale: Tensor

    def taps(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> unit-length features (B, C_i, H_i, W_i) of the five groups, at least fp32."""
        h, out = (images - self.shift) / self.scale, []
        for i, group in enumerate(self.places):
            if i:
                h = F.max_pool2d(h, 2)
            for place in group:
                h = F.relu(self.convolutions[f"features_{place}"](h))
            wide = h if h.dtype == torch.float64 else h.float()
            out.append(wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + EPSILON))
        return out

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """real, fake (B, 3, H, W) in [-1, 1] -> scalar, the mean over the images."""
        with torch.no_grad():
            wanted = self.taps(real)
        loss = wanted[0].new_zeros(())
        for a, b, weight in zip(wanted, self.taps(fake), self.linear, strict=True):
            loss = loss + ((a - b).square() * weight.view(1, -1, 1, 1)).sum(1).mean()
        return loss


def check_files(vgg: str | Path, linear: str | Path) -> None:
    """Raises ``UserError`` for a file that does not exist."""
    for path, what in ((vgg, VGG_FILE), (linear, LINEAR_FILE)):
        if not Path(path).exists():
            raise UserError(f"{path} does not exist: name the file of {what}")


def load_lpips(vgg: str | Path, linear: str | Path) -> LPIPS:
    """The loss from two files. Raises ``UserError`` if one is missing, damaged or holds other weights."""
    check_files(vgg, linear)
    net = LPIPS()
    vgg_names = {
        f"features.{p}.{kind}": (f"features_{p}", kind) for g in net.places for p in g for kind in ("weight", "bias")
    }
    found = _tensors(Path(vgg), list(vgg_names), VGG_FILE)
    state: dict[str, Tensor] = {f"convolutions.{a}.{b}": found[name] for name, (a, b) in vgg_names.items()}
    lin_names = [f"lin{i}.model.1.weight" for i in range(len(GROUPS))]
    found = _tensors(Path(linear), lin_names, LINEAR_FILE)
    state |= {f"linear.{i}": found[name].flatten() for i, name in enumerate(lin_names)}
    wrong = [
        f"{name} has {tuple(state[name].shape)}, not {tuple(p.shape)}"
        for name, p in net.state_dict().items()
        if state[name].shape != p.shape
    ]
    if wrong:
        raise UserError(f"{vgg} and {linear} are not LPIPS on VGG-16: {'; '.join(wrong[:3])}; name other files")
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return net.eval()


def _tensors(path: Path, names: list[str], what: str) -> Mapping[str, Tensor]:
    """The tensors ``names`` of a torch.save or safetensors file."""
    if path.suffix == ".safetensors":
        _, entries = read_header(path)
        have = {name for name in names if name in entries}
        with open_tensors(path) as f:
            state = {name: f.get_tensor(name) for name in have}
    else:
        try:
            with open_regular(path) as f:
                state = torch.load(f, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} contains objects other than tensors: name the file of {what}") from error
        except UserError:
            raise
        except Exception as error:  # torch.load raises many types for damaged files
            raise UserError(f"{path} is damaged ({shown(str(error))}): name the file of {what}") from error
    if not isinstance(state, dict) or not all(
        isinstance(state.get(n), Tensor) and state[n].is_floating_point() for n in names
    ):
        missing = [n for n in names if not isinstance(state, dict) or n not in state]
        raise UserError(f"{path} lacks {', '.join(missing[:3]) or 'tensors of numbers'}: name the file of {what}")
    return state
