"""The tokenizer: quantizer against brute force, LlamaGen's weight names, training that resumes, rejected files."""

import math

import pytest
import torch
import torch.nn.functional as F

from megastar.config.schema import TokenizerConfig, TokenizerTrainConfig
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, save_tokenizer, tokenizer_hash
from megastar.tokenizer.losses import PatchDiscriminator, PerceptualLoss, hinge_discriminator_loss, psnr
from megastar.tokenizer.quantizers.base import code_statistics
from megastar.tokenizer.quantizers.vq import VectorQuantizer
from megastar.tokenizer.scores import score, ssim
from megastar.tokenizer.train import TokenizerTrainer, kmeans, learning_rate
from megastar.tokenizer.vq import VQModel, to_images

SMALL = TokenizerConfig(
    image_size=16, channels=8, channel_multipliers=[1, 2], res_blocks=1, z_channels=8, codebook_size=32,
    codebook_embed_dim=4, norm_groups=4,
)  # fmt: skip


@pytest.mark.parametrize("l2_norm", [True, False])
def test_quantizer_picks_the_nearest_code_and_passes_gradients_straight_through(l2_norm):
    torch.manual_seed(0)
    vq = VectorQuantizer(16, 4, l2_norm)
    vq.embedding.weight.data.normal_()
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    q = vq(z)
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    book = vq.embedding.weight.detach()
    if l2_norm:
        flat, book = F.normalize(flat, dim=1), F.normalize(book, dim=1)
    slow = torch.tensor([min(range(16), key=lambda v: (row - book[v]).square().sum().item()) for row in flat])
    assert torch.equal(q.codes.flatten(), slow)
    nearest = book[slow]
    assert torch.allclose(q.latents.detach().permute(0, 2, 3, 1).reshape(-1, 4), nearest, atol=1e-6)
    expected = (nearest - flat).square().mean()
    assert math.isclose(q.codebook_loss.item(), expected.item(), rel_tol=1e-5)
    assert math.isclose(q.commitment_loss.item(), expected.item(), rel_tol=1e-5)
    weights = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((q.latents * weights).sum(), z, retain_graph=True)
    plain = z.detach().clone().requires_grad_()
    through = F.normalize(plain, dim=1) if l2_norm else plain
    (reference,) = torch.autograd.grad((through * weights).sum(), plain)
    assert torch.allclose(gradient, reference, atol=1e-6)  # the quantization itself is the identity
    (book_gradient,) = torch.autograd.grad(q.codebook_loss, vq.embedding.weight)
    unused = torch.ones(16, dtype=torch.bool).index_fill_(0, slow, False)
    assert book_gradient[unused].abs().max() == 0 if unused.any() else True
    assert book_gradient.abs().sum() > 0


def test_weights_are_llamagens_by_name_and_count():
    with torch.device("meta"):
        model = VQModel(TokenizerConfig())
    names = set(model.state_dict())
    for name in (
        "encoder.conv_blocks.0.res.1.conv2.weight",
        "encoder.conv_blocks.3.downsample.conv.weight",
        "encoder.conv_blocks.4.attn.1.proj_out.weight",
        "encoder.mid.1.q.weight",
        "decoder.conv_blocks.0.attn.2.norm.weight",
        "decoder.conv_blocks.0.upsample.conv.bias",
        "decoder.conv_blocks.1.res.0.nin_shortcut.weight",
        "quantize.embedding.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
    ):
        assert name in names, name
    assert "encoder.conv_blocks.4.downsample.conv.weight" not in names
    # VQ-16 of LlamaGen has 72 M parameters (README of FoundationVision/LlamaGen).
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(72e6, rel=0.01)


def test_encode_and_decode_shapes_and_determinism():
    torch.manual_seed(0)
    model = VQModel(SMALL).eval()
    images = torch.randn(3, 3, 16, 16).clamp(-1, 1)
    codes = model.encode(images)
    assert codes.shape == (3, SMALL.grid**2) == (3, 64)
    assert torch.equal(codes[1:2], model.encode(images[1:2]))  # an image's codes do not depend on its batch
    decoded = model.decode_codes(codes)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1


def test_kmeans_finds_separated_clusters_and_leaves_no_code_empty():
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(8, 6, generator=g), dim=1)
    points = F.normalize(centres.repeat_interleave(50, 0) + 0.02 * torch.randn(400, 6, generator=g), dim=1)
    found = kmeans(points, 16, iterations=20, generator=g)
    assert (centres @ found.t()).max(1).values.min() > 0.99
    assert torch.allclose(found.norm(dim=1), torch.ones(16), atol=1e-5)
    assert kmeans(points[:4], 16, iterations=2, generator=g).shape == (16, 6)  # fewer points than codes


def test_kmeans_off_the_sphere_minimises_euclidean_distance():
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 3.0]])  # two share a direction
    points = centres.repeat_interleave(60, 0) + 0.05 * torch.randn(180, 2, generator=g)
    found = kmeans(points, 6, iterations=20, generator=g, spherical=False)
    assert torch.cdist(centres, found).min(1).values.max() < 0.2


def test_psnr_of_a_known_error():
    a = torch.zeros(2, 3, 8, 8)
    b = a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert torch.allclose(psnr(a, b), torch.tensor([20.0, 40.0]), atol=1e-3)  # 0.2 of a range of 2 is 0.1 of 1


@pytest.mark.parametrize("side", [16, 8])
def test_ssim_is_that_of_its_definition(side):
    """Against the formula for each window, in float64: a Gaussian of 11 pixels, or 7 in images of 8."""
    torch.manual_seed(0)
    a = torch.rand(2, 3, side, side) * 2 - 1
    b = (a + 0.2 * torch.randn_like(a)).clamp(-1, 1)
    x, y = ((t.double() + 1) / 2 for t in (a, b))
    width = 11 if side == 16 else 7
    at = torch.arange(width, dtype=torch.float64) - width // 2
    weights = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    wanted = torch.zeros(2, 3, side - width + 1, side - width + 1, dtype=torch.float64)
    for top in range(side - width + 1):
        for left in range(side - width + 1):
            p, q = (t[:, :, top : top + width, left : left + width] for t in (x, y))
            mean = [(weights * t).sum((2, 3)) for t in (p, q)]
            spread = [(weights * (t - m[..., None, None]) ** 2).sum((2, 3)) for t, m in zip((p, q), mean, strict=True)]
            joint = (weights * (p - mean[0][..., None, None]) * (q - mean[1][..., None, None])).sum((2, 3))
            above = (2 * mean[0] * mean[1] + 1e-4) * (2 * joint + 9e-4)
            wanted[:, :, top, left] = above / ((mean[0] ** 2 + mean[1] ** 2 + 1e-4) * (sum(spread) + 9e-4))
    assert torch.allclose(ssim(a, b).double(), wanted.mean((1, 2, 3)), atol=1e-6)
    assert torch.allclose(ssim(a, a), torch.ones(2))


def test_perplexity_of_known_frequencies():
    assert code_statistics(torch.tensor([5, 5, 5, 5, 0]))["perplexity"] == pytest.approx(4)
    assert code_statistics(torch.tensor([7, 0]))["perplexity"] == pytest.approx(1)
    assert code_statistics(torch.tensor([3, 1]))["perplexity"] == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )


def test_hinge_loss_and_discriminator():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert PatchDiscriminator(8)(torch.zeros(2, 3, 64, 64)).shape[:2] == (2, 1)


def test_perceptual_loss_ranks_blur_above_a_shift_of_brightness():
    pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    loss = PerceptualLoss()
    image = F.interpolate(torch.rand(2, 3, 8, 8), 64) * 2 - 1
    blurred = F.avg_pool2d(image, 9, 1, 4)
    brighter = image + (blurred - image).square().mean().sqrt()  # the same L2 distance
    assert loss(image, image).item() == pytest.approx(0, abs=1e-6)
    assert loss(image, blurred) > 1.5 * loss(image, brighter)
    assert all(not p.requires_grad for p in loss.parameters())


def _config(**changes) -> TokenizerTrainConfig:
    base = {
        "tokenizer": SMALL, "steps": 12, "batch": 4, "continuous_steps": 3, "revive_every": 2, "save_every": 6, "eval_every": 6,
        "perceptual": 0.0, "dtype": "fp32", "warmup": 2,
    }  # fmt: skip
    return TokenizerTrainConfig(**{**base, **changes})


def _batch(step: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, 16, 16, 3), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)


def _trainer(c: TokenizerTrainConfig) -> TokenizerTrainer:
    return TokenizerTrainer(c, torch.device("cpu"), torch.float32, _batch)


def test_training_lowers_the_error_and_revives_dead_codes():
    trainer = _trainer(_config(steps=150, lr=3e-3))
    images = to_images(_batch(0))
    first = trainer.train_step(images)["l2"]
    for _ in range(100):
        last = trainer.train_step(images)["l2"]
    assert last < 0.7 * first
    trainer.uses.zero_()
    trainer.uses[0] = 1  # as if only one code had been used
    before = trainer.model.quantize.embedding.weight.detach().clone()
    trainer._revive(trainer.model.latents(images))
    moved = (trainer.model.quantize.embedding.weight - before).abs().sum(1) > 0
    assert moved[1:].all() and not moved[0]
    assert trainer.uses.sum() == 0


def test_adversarial_training_runs_and_touches_the_discriminator():
    c = _config(tokenizer=TokenizerConfig(**{**vars(SMALL), "image_size": 64}), adversarial=0.1, adversarial_start=0)
    trainer = _trainer(c)
    before = [p.detach().clone() for p in trainer.discriminator.parameters()]
    trainer.train_step(torch.rand(4, 3, 64, 64) * 2 - 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.discriminator.parameters(), strict=True))


def test_a_checkpoint_of_another_tokenizer_is_rejected(tmp_path):
    _trainer(_config()).save(tmp_path / "last.pt")
    other = TokenizerConfig(**{**vars(SMALL), "codebook_size": 64})
    with pytest.raises(
        UserError, match="another configuration .tokenizer: .*'codebook_size': 32.* -> .*'codebook_size': 64"
    ):
        _trainer(_config(tokenizer=other)).load(tmp_path / "last.pt")


def test_a_checkpoint_of_an_earlier_release_resumes(tmp_path):
    """It lacks later fields, which had their defaults, and the facts about the images."""
    c = _config(steps=40)
    trainer = _trainer(c)
    for step in range(5):
        trainer.train_step(to_images(_batch(step)))
    trainer.save(tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for name in ("log_every", "faults"):
        del state["config"][name]
    del state["config"]["tokenizer"]["dropout"]  # as if it were new
    assert "pictures" not in state
    torch.save(state, tmp_path / "old.pt")
    resumed = _trainer(c)
    resumed.load(tmp_path / "old.pt")
    for step in range(5, 8):
        a, b = (t.train_step(to_images(_batch(step))) for t in (trainer, resumed))
        assert all(torch.equal(a[name], b[name]) for name in a), step
    state["config"]["lr"] = 0.5
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"another configuration \(lr: 0.5 -> 0.001\): choose another out"):
        _trainer(c).load(tmp_path / "old.pt")


def test_dropout_is_a_function_of_the_seed_and_the_step(tmp_path):
    c = _config(tokenizer=TokenizerConfig(**{**vars(SMALL), "dropout": 0.3}))
    trainer = _trainer(c)
    for step in range(4):
        trainer.train_step(to_images(_batch(step)))
    trainer.save(tmp_path / "last.pt")
    resumed = _trainer(c)
    resumed.load(tmp_path / "last.pt")
    torch.rand(7)  # other users of the global generator change nothing
    a, b = (t.train_step(to_images(_batch(4))) for t in (trainer, resumed))
    assert torch.equal(a["loss"], b["loss"])
    again = _trainer(_config(tokenizer=c.tokenizer, seed=1))
    assert not torch.equal(
        again.train_step(to_images(_batch(0)))["loss"], _trainer(c).train_step(to_images(_batch(0)))["loss"]
    )


def test_training_continues_from_a_file(tmp_path):
    trainer = _trainer(_config(steps=6))
    for step in range(6):
        trainer.train_step(to_images(_batch(step)))
    save_tokenizer(trainer.average, tmp_path / "tok.safetensors", {}, torch.float32)
    more = _trainer(_config(init=str(tmp_path / "tok.safetensors"), continuous_steps=0))
    assert score(more.average, _batch(99)) == score(trainer.average, _batch(99))
    more.train_step(to_images(_batch(0)))
    assert not torch.equal(more.model.encoder.conv_in.weight, trainer.average.encoder.conv_in.weight)
    other = TokenizerConfig(**{**vars(SMALL), "codebook_size": 64})
    with pytest.raises(UserError, match="another architecture .codebook_size: 32, not 64"):
        _trainer(_config(init=str(tmp_path / "tok.safetensors"), tokenizer=other))


def test_learning_rate_warms_up_and_decays():
    c = _config(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(s, c) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_files_round_trip_and_bad_files_are_rejected(tmp_path):
    torch.manual_seed(1)
    model = VQModel(SMALL).half().float().eval()  # so that half precision on disk loses nothing
    path = tmp_path / "deep" / "tok.safetensors"
    save_tokenizer(model, path, {"seed": 1})
    config, provenance = read_tokenizer_metadata(path)
    assert config == SMALL and provenance == {"seed": 1}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    again = load_tokenizer(path)
    assert torch.equal(again.encode(images), model.encode(images))
    assert not any(p.requires_grad for p in again.parameters())
    assert score(again, _batch(0))["psnr"] == score(model, _batch(0))["psnr"]
    digest = tokenizer_hash(path)
    model.decoder.conv_out.bias.data += 1  # another decoder, the same codes
    save_tokenizer(model, path, {"seed": 2})
    assert len(digest) == 64 and tokenizer_hash(path) == digest
    model.quant_conv.bias.data += 1
    save_tokenizer(model, path, {"seed": 1})
    assert tokenizer_hash(path) != digest
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_tokenizer(tmp_path / "junk.safetensors")
