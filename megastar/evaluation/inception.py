"""The Inception network of FID: TensorFlow's of 2015-12-05, in PyTorch, from a file named by the user.

It differs from torchvision's Inception-v3: average pools exclude the padding, the last block uses a max pool, images
are resized as in TensorFlow 1 (corner-anchored, no half-pixel shift), and there are 1008 classes.
Sources: pytorch-fid's inception.py, torch-fidelity's feature_extractor_inceptionv3.py, ADM's evaluations/evaluator.py.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from megastar.errors import UserError
from megastar.utils.files import sha256
from megastar.utils.weights.safetensors_header import utf8_name

SIDE = 299
POOL, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # the same file under both names
PUBLISHED = (
    "pt_inception-2015-12-05-6726825d.pth at github.com/mseitzer/pytorch-fid/releases (fid_weights), or the same bytes as "
    "weights-inception-2015-12-05-6726825d.pth at github.com/toshas/torch-fidelity/releases (v0.2.0)"
)


class Conv(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int | tuple[int, int], stride: int = 1, padding: bool = False):
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        around = (height // 2, width // 2) if padding else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, around, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    def __init__(self, inputs: int, pool: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=True)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=True)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=True)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        single = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean3(x))], 1)


class InceptionB(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=True)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(inputs, 192, 1)
        self.branch7x7_1 = Conv(inputs, width, 1)
        self.branch7x7_2 = Conv(width, width, row, padding=True)
        self.branch7x7_3 = Conv(width, 192, column, padding=True)
        self.branch7x7dbl_1 = Conv(inputs, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, column, padding=True)
        self.branch7x7dbl_3 = Conv(width, width, row, padding=True)
        self.branch7x7dbl_4 = Conv(width, width, column, padding=True)
        self.branch7x7dbl_5 = Conv(width, 192, row, padding=True)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean3(x))], 1)


class InceptionD(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = Conv(inputs, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(inputs, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=True)
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=True)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionE(nn.Module):
    def __init__(self, inputs: int, pool_by_maximum: bool):
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=True)
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=True)
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=True)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=True)
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=True)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool_by_maximum else mean3(x)
        singles = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *singles, *doubles, self.branch_pool(pooled)], 1)


class FIDInceptionV3(nn.Module):
    """Scaled images (B, 3, 299, 299) -> pool features (B, 2048) and sFID's spatial ones (B, 2023).

    The spatial ones are the first 7 channels of ``mixed_6/conv`` in TensorFlow's graph, the 1x1 branch of Mixed_6d,
    flattened with the channel last, as in the statistics published by ADM.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=True)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, pool_by_maximum=False)
        self.Mixed_7c = InceptionE(2048, pool_by_maximum=True)
        self.fc = nn.Linear(POOL, CLASSES)

    def forward(self, x: Tensor, spatial: bool = True) -> tuple[Tensor, Tensor | None]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)
        seven = x[:, :7].permute(0, 2, 3, 1).flatten(1) if spatial else None  # branch1x1 is the first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        return x.mean((2, 3)), seven

    def logits(self, pool: Tensor) -> Tensor:
        """Pool features (B, 2048) -> (B, 1008) without the bias, as ADM's evaluator computes the Inception Score."""
        return pool @ self.fc.weight.T

    def fuse(self) -> FIDInceptionV3:
        """Fold every BatchNorm into its convolution: equal up to rounding, and faster. Eval mode only."""
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self


def scale(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, 299, 299), resized as in TensorFlow 1, then (x - 128) / 128."""
    return (resize_tf1(pixels.permute(0, 3, 1, 2).float(), SIDE) - 128) / 128


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's ``resize_bilinear`` without aligned corners: output pixel i reads input i * in / out.

    No half-pixel centres and no antialiasing: (B, C, H, W) float -> (B, C, side, side).
    """
    for dim in (3, 2):
        size = images.shape[dim]
        at = torch.arange(side, device=images.device, dtype=torch.float32)
        at = at * torch.tensor(size / side, dtype=torch.float32, device=images.device)
        low = at.long()
        weight = (at - low).to(images.dtype)
        below, above = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp_max(size - 1))
        images = below + (above - below) * (weight if dim == 3 else weight[:, None])
    return images


def load_inception(path: str | Path | None, expected: str | None = None) -> tuple[FIDInceptionV3, str]:
    """The network from the published file, or from one with the SHA-256 ``expected``, and the file's SHA-256.

    Only tensors are unpickled, and only after the hash was compared. Raises ``UserError``.
    """
    if path is None or not Path(path).is_file():
        problem = "FID requires --inception FILE" if path is None else f"--inception {path} does not exist"
        raise UserError(f"{problem}: download {PUBLISHED}; SHA-256 {SHA256}")
    path = Path(path)
    digest = sha256(path)
    if digest != (expected or SHA256):
        raise UserError(
            f"{path} has the SHA-256 {digest}, not {expected or SHA256}: download {PUBLISHED}; or pass the hash of your own "
            "file with --inception-sha256 (the names of its scores then contain the hash)"
        )
    return from_state(_read(path), path), digest


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            with utf8_name(path) as name:
                return load_file(name)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} contains objects other than tensors ({str(error).splitlines()[0]}): download {PUBLISHED}"
        ) from error
    except Exception as error:  # torch.load raises many types for truncated files
        raise UserError(f"{path} is damaged ({type(error).__name__}): download {PUBLISHED}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a dictionary of tensors: download {PUBLISHED}")
    return state


def from_state(state: dict[str, Tensor], source: str | Path = "state") -> FIDInceptionV3:
    """The network, frozen, in eval mode and fused. The ``UserError`` lists missing tensors and wrong shapes."""
    with torch.device("meta"):
        net = FIDInceptionV3()
    wanted = {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    missing = [k for k in wanted if k not in state]
    wrong = [f"{k} {tuple(state[k].shape)}" for k, shape in wanted.items() if k in state and state[k].shape != shape]
    kinds = {"missing": missing, "with a different shape": wrong}
    if parts := [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]:
        raise UserError(f"{source} is not FID's Inception, {' and '.join(parts)}: download {PUBLISHED}")
    kept = {k: state[k].float() for k in wanted}
    counters = {k: torch.zeros((), dtype=torch.long) for k in net.state_dict() if k not in wanted}
    net.load_state_dict(kept | counters, assign=True)
    return net.eval().requires_grad_(False).fuse()
