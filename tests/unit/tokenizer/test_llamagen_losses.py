"""LPIPS, PatchGAN and the training step of LlamaGen's tokenizer against plain references, and the presets that use them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megastar.commands.train_tokenizer import main as train_tokenizer
from megastar.config.load import load_tokenizer_config
from megastar.config.schema import TokenizerConfig, TokenizerTrainConfig
from megastar.errors import UserError
from megastar.tokenizer.losses import PatchDiscriminator
from megastar.tokenizer.lpips import load_lpips
from megastar.tokenizer.train import TokenizerTrainer, learning_rate
from megastar.tokenizer.vq import VQModel

# torchvision's vgg16.features: the number of each convolution; "pool" is a max pool.
VGG = [0, 2, "pool", 5, 7, "pool", 10, 12, 14, "pool", 17, 19, 21, "pool", 24, 26, 28]
WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
TAPS = [2, 7, 14, 21, 28]  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


def vgg_weights() -> dict[str, torch.Tensor]:
    g, out, channels = torch.Generator().manual_seed(0), {}, 3
    for place, width in WIDTHS.items():
        out[f"features.{place}.weight"] = torch.randn(width, channels, 3, 3, generator=g) * (2 / (9 * channels)) ** 0.5
        out[f"features.{place}.bias"] = torch.randn(width, generator=g) * 0.1
        channels = width
    return out | {"classifier.0.weight": torch.zeros(2, 2)}  # of the whole network: not used


def linear_weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {f"lin{i}.model.1.weight": torch.rand(1, WIDTHS[t], 1, 1, generator=g) for i, t in enumerate(TAPS)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(vgg_weights(), folder / "vgg16.pth")
    torch.save(linear_weights(), folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def plain_lpips(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """LPIPS written out, layer by layer, in the precision of the images."""
    vgg, linear = vgg_weights(), linear_weights()
    shift, scale = (
        torch.tensor(v, dtype=real.dtype).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )
    total, pair = torch.zeros((), dtype=real.dtype), [(x - shift) / scale for x in (real, fake)]
    for layer in VGG:
        if layer == "pool":
            pair = [F.max_pool2d(x, 2, 2) for x in pair]
            continue
        weight, bias = (vgg[f"features.{layer}.{kind}"].to(real.dtype) for kind in ("weight", "bias"))
        pair = [F.relu(F.conv2d(x, weight, bias, padding=1)) for x in pair]
        if layer in TAPS:
            a, b = (x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10) for x in pair)
            w = linear[f"lin{TAPS.index(layer)}.model.1.weight"].to(real.dtype)
            total = total + F.conv2d((a - b) ** 2, w).mean((2, 3)).mean()  # one number per image, then their mean
    return total


def test_lpips_is_the_plain_formula(files):
    loss = load_lpips(*files).double()
    real, fake = torch.rand(2, 2, 3, 32, 48, dtype=torch.float64) * 2 - 1
    real.requires_grad_(), fake.requires_grad_()
    ours, wanted = loss(real, fake), plain_lpips(real.detach(), fake)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, fake)[0] for x in (ours, wanted)))
    assert not any(p.requires_grad for p in loss.parameters())
    assert loss(real, real).item() == 0
    black = torch.zeros_like(real).requires_grad_()  # positions without any feature have no infinite gradient
    assert torch.autograd.grad(loss.float()(real.float(), black.float()), black)[0].isfinite().all()


def test_lpips_reads_safetensors_too(files, tmp_path):
    save_file(vgg_weights(), tmp_path / "vgg.safetensors")
    save_file(linear_weights(), tmp_path / "lin.safetensors")
    real, fake = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert torch.equal(
        load_lpips(tmp_path / "vgg.safetensors", tmp_path / "lin.safetensors")(real, fake),
        load_lpips(*files)(real, fake),
    )


class Odd:
    """Not a tensor."""


def test_wrong_lpips_files_get_a_sentence(files, tmp_path):
    vgg, linear = files
    torch.save(linear_weights() | {"lin0.model.1.weight": torch.ones(1, 65, 1, 1)}, tmp_path / "wide.pth")
    torch.save({"features.0.weight": Odd()}, tmp_path / "odd.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes(linear.read_bytes()[:700])
    (tmp_path / "folder.pth").mkdir()
    for pair, sentence in [
        ((tmp_path / "none.pth", linear), "none.pth does not exist: name the file of lpips_vgg: torchvision's VGG-16"),
        (
            (linear, linear),
            "vgg.pth lacks features.0.weight, features.0.bias, features.2.weight: name the file of lpips_vgg",
        ),
        ((vgg, vgg), "vgg16.pth lacks lin0.model.1.weight, .*: name the file of lpips_linear: vgg.pth of LPIPS 0.1"),
        ((vgg, tmp_path / "wide.pth"), r"linear.0 has \(65,\), not \(64,\); name other files"),
        ((tmp_path / "odd.pth", linear), "odd.pth contains objects other than tensors"),
        ((tmp_path / "list.pth", linear), "list.pth lacks features.0.weight"),
        ((vgg, tmp_path / "cut.pth"), "cut.pth is damaged"),
        ((vgg, tmp_path / "folder.pth"), "folder.pth"),
    ]:
        with pytest.raises(UserError, match=sentence):
            load_lpips(*pair)
    words = ["pictures=nowhere", f"out={tmp_path / 'out'}", f"lpips_vgg={vgg}", "lpips_linear=none.pth"]
    with pytest.raises(UserError, match="none.pth does not exist: name the file of lpips_linear"):  # before the images
        train_tokenizer(words)
    for one, other in (("lpips_vgg", "lpips_linear"), ("lpips_linear", "lpips_vgg")):
        with pytest.raises(UserError, match=f"{one} = f: LPIPS needs both files, and {other} is empty"):
            load_tokenizer_config(None, ["pictures=p", f"{one}=f"])
    unused = r"lpips_vgg = f: not used with perceptual 0: set perceptual above 0, or leave out"
    with pytest.raises(UserError, match=unused):
        load_tokenizer_config(None, ["pictures=p", "lpips_vgg=f", "lpips_linear=g", "perceptual=0"])


@pytest.mark.parametrize("kind", ["small", "llamagen"])
def test_the_smallest_images_of_the_discriminator(kind):
    """One logit an image of 24 pixels; smaller ones are refused before anything is built."""
    net = PatchDiscriminator(batch_norm=kind == "llamagen")
    assert net(torch.randn(2, 3, 24, 24)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 3, 23, 23))
    words = ["pictures=p", "adversarial=0.5", f"discriminator={kind}", "tokenizer.channel_multipliers=[1,1]"]
    load_tokenizer_config(None, [*words, "tokenizer.image_size=24"])
    with pytest.raises(UserError, match="adversarial = 0.5: the discriminator needs images of at least 24 pixels, and"):
        load_tokenizer_config(None, [*words, "tokenizer.image_size=22"])


def test_patchgan_is_taming_transformers():
    """pix2pix's 70x70 PatchGAN with BatchNorm: 2,765,633 weights, and its formulas written out."""
    torch.manual_seed(0)
    net = PatchDiscriminator(64, batch_norm=True).double()
    assert sum(p.numel() for p in net.parameters()) == 2_765_633
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    convolutions = [m for m in net.net if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in net.net if isinstance(m, torch.nn.BatchNorm2d)]
    h = F.leaky_relu(F.conv2d(x, convolutions[0].weight, convolutions[0].bias, 2, 1), 0.2)
    for conv, norm, stride in zip(convolutions[1:4], norms, (2, 2, 1), strict=True):
        assert conv.bias is None
        h = F.conv2d(h, conv.weight, None, stride, 1)
        mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, unbiased=False)
        h = (h - mean) / (variance + 1e-5).sqrt() * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        h = F.leaky_relu(h, 0.2)
    torch.testing.assert_close(net(x), F.conv2d(h, convolutions[4].weight, convolutions[4].bias, 1, 1))
    assert all(c.weight.std().item() == pytest.approx(0.02, rel=0.05) for c in convolutions)
    assert all(n.weight.mean().item() == pytest.approx(1, abs=0.02) and not n.bias.any() for n in norms)


SMALL = TokenizerConfig(
    image_size=32, channels=8, channel_multipliers=[1, 2], res_blocks=1, z_channels=8, codebook_size=32, codebook_embed_dim=4,
    norm_groups=4,
)  # fmt: skip


def test_the_training_step_is_llamagens(files):
    """Three steps of vq_train.py written out, the discriminator from the second on."""
    vgg, linear = (str(f) for f in files)
    c = TokenizerTrainConfig(
        tokenizer=SMALL, batch=4, steps=100, lr=1e-3, schedule="constant", warmup=0, weight_decay=0.0, perceptual=1.0,
        lpips_vgg=vgg, lpips_linear=linear, adversarial=0.5, adversarial_start=1, discriminator="llamagen", continuous_steps=0,
        revive_every=0, dtype="fp32",
    )  # fmt: skip
    trainer = TokenizerTrainer(c, torch.device("cpu"), torch.float32, lambda step: torch.zeros(0))
    model, critic, lpips = copy.deepcopy(trainer.model), copy.deepcopy(trainer.discriminator), load_lpips(vgg, linear)
    adam = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.9, 0.95)) for net in (model, critic)]
    for step in range(3):
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 2 - 1
        metrics = trainer.train_step(images)
        weight = 0.5 if step >= 1 else 0.0
        q = model.quantize(model.quant_conv(model.encoder(images)))
        recon = model.decoder(model.post_quant_conv(q.latents))
        loss = F.mse_loss(recon, images) + lpips(images, recon) + q.codebook_loss + 0.25 * q.commitment_loss
        loss = loss - weight * critic(recon).mean() if weight else loss
        adam[0].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam[0].step()
        if weight:
            adam[1].zero_grad()
            real, fake = critic(images), critic(recon.detach())
            (weight * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
            torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
            adam[1].step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours, wanted in ((trainer.model, model), (trainer.discriminator, critic)):
        for (name, a), b in zip(ours.named_parameters(), wanted.parameters(), strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name


def test_a_constant_schedule_keeps_the_rate():
    c = TokenizerTrainConfig(steps=100, warmup=10, lr=2.0, schedule="constant")
    assert [learning_rate(s, c) for s in (9, 10, 60, 100)] == [2.0] * 4 and learning_rate(0, c) == 0.2
    assert learning_rate(100, replace(c, schedule="cosine")) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("name", "multipliers", "grid", "millions"), [("vq16", [1, 1, 2, 2, 4], 16, 72), ("vq8", [1, 2, 2, 4], 32, 70)]
)
def test_the_presets_are_llamagens(name, multipliers, grid, millions):
    cfg = load_tokenizer_config(f"configs/tokenizer/{name}_imagenet256.yaml")
    assert cfg.tokenizer == TokenizerConfig(channel_multipliers=multipliers) and cfg.tokenizer.grid == grid
    with torch.device("meta"):
        count = sum(p.numel() for p in VQModel(cfg.tokenizer).parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.01)
    assert (cfg.batch, cfg.lr, cfg.schedule, cfg.warmup, cfg.steps) == (
        128,
        1e-4,
        "constant",
        0,
        40 * (1_281_167 // 128),
    )
    assert (cfg.perceptual, cfg.adversarial, cfg.adversarial_start, cfg.discriminator) == (1.0, 0.5, 20_000, "llamagen")
    assert (cfg.commitment, cfg.continuous_steps, cfg.revive_every) == (0.25, 0, 0)
