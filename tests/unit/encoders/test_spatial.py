"""Encoders of patches: their grids are the tokens', and pictures that do not fit are refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megastar.data.pretokenize.features import FeatureEncoder, size_of_features
from megastar.encoders.dinov2 import DinoShape, DINOv2
from megastar.encoders.dinov3 import Dino3Shape, DINOv3
from megastar.encoders.spatial import CustomPatches, EffLite0Patches, open_encoder, pool_of, pooled
from megastar.encoders.vit import FrozenVit
from megastar.errors import UserError
from megastar.utils.files import sha256

HERE = "tests.unit.encoders.test_spatial"


def four_times(pixels: torch.Tensor, weights: str = "") -> torch.Tensor:
    """(B, H, W, 3) -> means of an 8 x 8 grid, (B, 64, 3), for 16-pixel images; with weights their length is added."""
    means = F.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 8).flatten(2).transpose(1, 2)
    return means + len(open(weights, "rb").read()) if weights else means


def odd(pixels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(pixels), 49, 4)


def flat(pixels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(pixels), 64)


def fails(pixels: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("it takes 224 pixels\nand more")


def huge(pixels: torch.Tensor) -> torch.Tensor:
    return torch.full((len(pixels), 16, 2), 7e4 if pixels.any() else 1.0)


def undefined(pixels: torch.Tensor) -> torch.Tensor:
    return torch.full((len(pixels), 16, 2), float("nan") if pixels.any() else 1.0)


def images(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder(name: str, grid: int = 4, average: bool = False, weights=None, side: int = 16) -> FeatureEncoder:
    return FeatureEncoder(name, weights, torch.device("cpu"), grid, side, average)


@pytest.mark.parametrize(("side", "grid"), [(64, 8), (16, 4)])
def test_efflite0_has_the_tokens_grid(side, grid):
    pytest.importorskip("efficientnet_lite_pytorch")
    made = encoder("efflite0", grid, side=side)
    assert (made.stored.grid, made.stored.width, made.stored.pool) == (grid, 112, 1)
    assert len(made.stored.weights_sha256) == 64 and made.stored.encoder == "efflite0"
    pictures = images(2, side)
    features = made(pictures)
    assert features.shape == (2, grid * grid, 112) and features.dtype == np.float16
    # The patches are those of the network's map, row by row: a picture changed at its lower right changes the last most.
    changed = pictures.clone()
    changed[:, -side // grid :, -side // grid :] = 255 - changed[:, -side // grid :, -side // grid :]
    moved = np.linalg.norm(made(changed).astype(np.float32) - features, axis=-1)
    assert (moved.argmax(axis=1) == grid * grid - 1).all()
    net = EffLite0Patches().net
    wanted = net.taps(F.interpolate(pictures.permute(0, 3, 1, 2).float(), (16 * grid,) * 2, mode="bicubic", antialias=True) / 127.5 - 1, [10])[0]  # fmt: skip
    assert np.allclose(features[:, 1], wanted[:, :, 0, 1].detach().numpy(), atol=0.02)


def test_a_finer_grid_is_averaged_only_if_asked_for():
    name = f"{HERE}:four_times"
    with pytest.raises(
        UserError, match="64 patches for images of 16 pixels, the tokens a grid of 4 x 4: --feature-pool"
    ):
        encoder(name)
    made = encoder(name, average=True)
    assert (made.stored.pool, made.stored.grid, made.stored.width) == (2, 4, 3)
    pictures = images()
    wanted = F.adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2).float(), 4).flatten(2).transpose(1, 2)
    assert np.allclose(made(pictures), wanted.numpy(), rtol=1e-3)
    assert torch.equal(pooled(wanted, 4, 1), wanted)
    assert encoder(name, grid=8).stored.pool == 1  # the same grid needs no averaging
    assert size_of_features(made.stored, 10, 1000).endswith("96 bytes a crop, 960 bytes an image of 10 crops, 960.0 kB for 1000 images")  # fmt: skip


@pytest.mark.parametrize("patches", [49, 50, 4, 15])
def test_other_grids_are_refused(patches):
    with pytest.raises(UserError, match=f"encoder x has {patches} patches for images of 16 pixels, the tokens a grid of 4 x 4: use an encoder with that grid"):  # fmt: skip
        pool_of(patches, 4, 16, "x", average=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg", "unknown encoder 'vgg': choose efflite0, dinov2 or dinov3 with a weights file, or module:function"),
        ("a:", "unknown encoder 'a:'"),
        ("no_such_module:f", "encoder no_such_module:f: No module named 'no_such_module'; name an importable"),
        (f"{HERE}:nothing", "has no attribute 'nothing'; name an importable"),
        (f"{HERE}:odd", "49 patches"),
        (f"{HERE}:flat", r"returned torch.float32 \(1, 64\) for 1 images: return a tensor \(B, P, C\)"),
        (
            f"{HERE}:fails",
            r"fails failed on 1 images of 16 x 16 pixels \(RuntimeError: it takes 224 pixels\): it must accept uint8 images",
        ),
        ("dinov2", "dinov2 needs a weights file"),
        ("dinov3", "dinov3 needs a weights file, as dinov3_vitb16"),
    ],
)
def test_unusable_encoders_are_refused_before_work_starts(name, message):
    with pytest.raises(UserError, match=message):
        encoder(name)


@pytest.mark.parametrize("name", ["huge", "undefined"])
def test_values_that_float16_cannot_hold_are_refused(name):
    made = encoder(f"{HERE}:{name}")
    with pytest.raises(UserError, match=f"encoder {HERE}:{name} returned values that are not finite in float16"):
        made(images())


def test_weights_are_named_hashed_and_handed_over(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"12345")
    name = f"{HERE}:four_times"
    plain, loaded = open_encoder(name), open_encoder(name, file)
    assert torch.allclose(loaded(images(), 8), plain(images(), 8) + 5)
    assert plain.weights_sha256 != loaded.weights_sha256 == CustomPatches(name, str(file)).weights_sha256
    with pytest.raises(UserError, match="do not exist"):
        open_encoder(name, tmp_path / "none")
    with pytest.raises(UserError, match="the weights of efflite0 are those of a package"):
        open_encoder("efflite0", file)


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_dino_of_a_file_has_one_patch_a_token(tmp_path, name):
    """Its patch tokens of a picture of 14 or 16 pixels a token, row by row, without the class token and the registers."""
    torch.manual_seed(0)
    size = {"dim": 64, "blocks": 2, "hidden": 128, "swiglu": False}
    net: FrozenVit
    if name == "dinov2":
        net = DINOv2(DinoShape(**size, registers=0, patch=14, grid=4))
    else:
        net = DINOv3(Dino3Shape(**size, registers=4, patch=16, head_dim=64, qkv_bias=True))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    file = tmp_path / "vit.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file)
    made = encoder(name, 4, weights=file)
    assert (made.stored.encoder, made.stored.grid, made.stored.width) == (name, 4, 64)
    assert made.stored.weights_sha256 == sha256(file)
    pictures, side = images(), 4 * net.patch
    resized = F.interpolate(pictures.permute(0, 3, 1, 2).float(), (side, side), mode="bicubic", antialias=True) / 255
    with torch.no_grad():
        wanted = net.eval()(resized)[1]
    assert wanted.shape == (3, 16, 64) and np.allclose(made(pictures), wanted.numpy(), atol=5e-3, rtol=2e-3)
