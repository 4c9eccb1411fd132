"""LFQ, FSQ and IBQ against plain references in float64: codes, latents, losses, gradients; files and bad code counts."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from megastar.config.load import load_tokenizer_config
from megastar.config.schema import TokenizerConfig, TokenizerTrainConfig
from megastar.errors import UserError
from megastar.tokenizer.io import load_tokenizer, read_tokenizer_metadata, save_tokenizer, tokenizer_hash
from megastar.tokenizer.quantizers import base
from megastar.tokenizer.quantizers.base import code_statistics
from megastar.tokenizer.quantizers.fsq import FiniteScalarQuantizer
from megastar.tokenizer.quantizers.ibq import IndexBackpropagationQuantizer
from megastar.tokenizer.quantizers.lfq import LookupFreeQuantizer
from megastar.tokenizer.quantizers.make import make_quantizer
from megastar.tokenizer.quantizers.vq import VectorQuantizer
from megastar.tokenizer.train import TokenizerTrainer
from megastar.tokenizer.vq import VQModel, to_images

NETWORK = {
    "image_size": 16,
    "channels": 8,
    "channel_multipliers": [1, 2],
    "res_blocks": 1,
    "z_channels": 8,
    "norm_groups": 4,
}
KINDS = {
    "vq": TokenizerConfig(**NETWORK, codebook_size=32, codebook_embed_dim=4),
    "lfq": TokenizerConfig(**NETWORK, quantizer="lfq", codebook_size=64, codebook_embed_dim=6),
    "fsq": TokenizerConfig(**NETWORK, quantizer="fsq", codebook_size=60, codebook_embed_dim=3, fsq_levels=[5, 4, 3]),
    "ibq": TokenizerConfig(**NETWORK, quantizer="ibq", codebook_size=32, codebook_embed_dim=4),
}  # fmt: skip


def latents(channels: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    z = torch.randn(2, channels, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return z.requires_grad_()


def rows(z: torch.Tensor) -> list[torch.Tensor]:
    return list(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))


def gradients(value: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, inputs, retain_graph=True))


def check(ours: torch.Tensor, reference: torch.Tensor, *inputs: torch.Tensor, atol: float = 1e-9) -> None:
    """The values and all gradients are equal."""
    assert torch.allclose(ours, reference, atol=atol, rtol=1e-9), (ours, reference)
    for a, b in zip(gradients(ours, *inputs), gradients(reference, *inputs), strict=True):
        assert torch.allclose(a, b, atol=atol, rtol=1e-7), (a - b).abs().max()


def plain_entropy_loss(tables: list[torch.Tensor]) -> torch.Tensor:
    """E[H(p)] - H(E[p]) of one distribution of the codes per latent."""
    each = sum(-(p * p.log()).sum() for p in tables) / len(tables)
    mean = sum(tables) / len(tables)
    return each + (mean * mean.log()).sum()


@pytest.mark.parametrize(("dim", "temperature"), [(1, 1.0), (4, 1.0), (5, 0.3), (6, 2.0)])
def test_lfq_is_the_sign_of_each_channel_and_its_entropy_is_that_of_the_table(dim, temperature):
    z = latents(dim)
    q = LookupFreeQuantizer(2**dim, dim)(z, temperature)
    codebook = torch.tensor([[1.0 if c >> i & 1 else -1.0 for i in range(dim)] for c in range(2**dim)]).double()
    nearest = [min(range(2**dim), key=lambda c, r=row: (r - codebook[c]).square().sum().item()) for row in rows(z)]
    assert q.codes.flatten().tolist() == nearest
    assert torch.equal(torch.stack(rows(q.latents)), codebook[nearest])
    weights = torch.randn_like(q.latents)
    assert torch.equal(*gradients((q.latents * weights).sum(), z), weights)  # straight through
    check(
        q.commitment_loss,
        sum((row - codebook[c]).square().sum() for row, c in zip(rows(z), nearest, strict=True)) / z.numel(),
        z,
    )
    tables = [torch.softmax(torch.stack([2 * (row @ c) / temperature for c in codebook]), 0) for row in rows(z)]
    check(q.entropy_loss, plain_entropy_loss(tables), z)
    assert q.codebook_loss == 0


def test_lfq_entropy_loss_is_finite_where_probabilities_underflow():
    z = (torch.randn(64, 18) * 5).requires_grad_()
    loss = LookupFreeQuantizer(2**18, 18)(z.view(1, 8, 8, 18).permute(0, 3, 1, 2), 0.01).entropy_loss
    assert loss.isfinite() and gradients(loss, z)[0].isfinite().all()
    assert -18 * math.log(2) < loss.item() < -3  # 64 latents are near 64 codes: the mean's entropy is near log 64


@pytest.mark.parametrize("levels", [[3], [2, 3], [8, 5, 5], [4, 4, 7, 2]])
def test_fsq_rounds_each_channel_to_its_levels(levels):
    z = latents(len(levels), scale=3.0)
    quantizer = FiniteScalarQuantizer(math.prod(levels), levels)
    q = quantizer(z)
    wanted, codes, slopes = [], [], []
    for row in rows(z.detach()):
        values, code, basis, slope = [], 0, 1, []
        for x, L in zip(row.tolist(), levels, strict=True):
            half, offset = (L - 1) * (1 - 1e-3) / 2, 0.0 if L % 2 else 0.5  # the listing of the paper's appendix A.1
            shift = math.tan(offset / half)
            bounded = math.tanh(x + shift) * half - offset
            rounded = round(bounded)
            assert 0 <= rounded + L // 2 < L
            values.append(rounded / (L // 2))
            slope.append((1 - math.tanh(x + shift) ** 2) * half / (L // 2))
            code, basis = code + (rounded + L // 2) * basis, basis * L
        wanted.append(values)
        codes.append(code)
        slopes.append(slope)
    assert q.codes.flatten().tolist() == codes
    assert torch.allclose(torch.stack(rows(q.latents)), torch.tensor(wanted).double(), atol=1e-6)
    weights = torch.randn_like(z)
    gradient = gradients((q.latents * weights).sum(), z)[0]
    assert torch.allclose(torch.stack(rows(gradient)), torch.tensor(slopes).double() * torch.stack(rows(weights)))
    assert q.codebook_loss == q.commitment_loss == q.entropy_loss == 0
    every = quantizer.decode(torch.arange(math.prod(levels)))
    assert len({tuple(row.tolist()) for row in every}) == math.prod(levels)
    grid = [[(n - L // 2) / (L // 2) for n in range(L)] for L in levels]
    in_order = [tuple(reversed(v)) for v in itertools.product(*reversed(grid))]  # the first channel counts fastest
    assert torch.allclose(every, torch.tensor(in_order))


@pytest.mark.parametrize("at_once", [1, 50, 1 << 26])
def test_ibq_losses_and_gradients_are_those_of_the_whole_softmax(at_once, monkeypatch):
    monkeypatch.setattr(base, "AT_ONCE", at_once)  # chunks of one row, of several, and one chunk
    torch.manual_seed(0)
    z, quantizer, temperature = latents(4), IndexBackpropagationQuantizer(11, 4).double(), 0.7
    book = quantizer.embedding.weight
    q = quantizer(z, temperature)
    means, softmax_tables, hard = [], [], []
    for row in rows(z):
        products = torch.stack([row @ book[v] for v in range(11)])
        best = max(range(11), key=lambda v, p=products: p[v].item())
        soft = torch.softmax(products, 0)
        one_hot = torch.zeros(11, dtype=torch.float64)
        one_hot[best] = 1
        means.append(sum((one_hot[v] + soft[v] - soft[v].detach()) * book[v] for v in range(11)))
        hard.append(book[best])
        softmax_tables.append(torch.softmax(products / temperature, 0))
        assert q.codes.flatten()[len(means) - 1] == best
    mean, hard, flat = torch.stack(means), torch.stack(hard), torch.stack(rows(z))
    weights = torch.randn_like(mean)
    check((torch.stack(rows(q.latents)) * weights).sum(), (mean * weights).sum(), z, book)
    check(q.codebook_loss, (mean - flat).square().mean() + (hard.detach() - flat).square().mean(), z, book)
    (ours,), (reference,) = (gradients(x, book) for x in (q.commitment_loss, (hard - flat.detach()).square().mean()))
    assert torch.allclose(ours, reference) and torch.allclose(q.commitment_loss, q.codebook_loss / 2)
    check(q.entropy_loss, plain_entropy_loss(softmax_tables), z, book)
    assert (gradients(q.latents.square().sum(), book)[0].abs().sum(1) > 0).all()  # also of codes without a use
    with torch.no_grad():
        assert torch.equal(torch.stack(rows(quantizer(z).latents)), hard)


def test_ibq_keeps_one_chunk_of_the_table(monkeypatch):
    """The largest tensor of forward and backward is a chunk of the (N, V) table, not the table."""
    monkeypatch.setattr(base, "AT_ONCE", 1 << 14)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    quantizer = IndexBackpropagationQuantizer(1 << 10, 8)
    z = torch.randn(4, 8, 16, 16, requires_grad=True)  # 1,024 rows: a table of 2^20
    with Sizes():
        q = quantizer(z, 0.01)
        (q.latents.sum() + q.codebook_loss + q.entropy_loss).backward()
    assert 1 << 13 <= largest <= 1 << 14


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantizer_has_one_interface(kind):
    torch.manual_seed(0)
    c = KINDS[kind]
    model = VQModel(c).eval()
    quantizer = make_quantizer(c)
    assert type(model.quantize) is type(quantizer)
    assert (quantizer.codebook_size, quantizer.embed_dim) == (c.codebook_size, c.codebook_embed_dim)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    z = model.latents(images)
    q = model.quantize(z, 1.0)
    assert q.latents.shape == z.shape and q.codes.shape == (3, 8, 8) and q.codes.dtype == torch.int64
    assert torch.equal(model.quantize.encode(z), q.codes) and torch.equal(model.encode(images), q.codes.flatten(1))
    assert q.codes.min() >= 0 and q.codes.max() < c.codebook_size
    assert torch.allclose(model.quantize.decode(q.codes).permute(0, 3, 1, 2), q.latents, atol=1e-6)
    assert torch.allclose(model.decode_codes(q.codes.flatten(1)), model.decode(q.latents).clamp(-1, 1), atol=1e-5)
    every = quantizer.decode(torch.arange(c.codebook_size))
    assert every.shape == (c.codebook_size, c.codebook_embed_dim) and len(every.unique(dim=0)) == c.codebook_size


def test_statistics_of_the_codes():
    assert code_statistics(torch.tensor([2, 2, 2, 2])) == {"codes_used": 1.0, "perplexity": pytest.approx(4)}
    assert code_statistics(torch.tensor([7, 0, 0, 0])) == {"codes_used": 0.25, "perplexity": pytest.approx(1)}
    shares = torch.tensor([0.5, 0.25, 0.25])
    wanted = math.exp(-sum(p * math.log(p) for p in shares.tolist()))
    assert code_statistics((shares * 8).long())["perplexity"] == pytest.approx(wanted)
    assert code_statistics(torch.zeros(4, dtype=torch.long))["codes_used"] == 0


# Files -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_files_name_the_quantizer_and_round_trip(tmp_path, kind):
    torch.manual_seed(1)
    model = VQModel(KINDS[kind]).half().float().eval()
    save_tokenizer(model, tmp_path / "t.safetensors", {})
    with safe_open(tmp_path / "t.safetensors", "pt") as f:
        assert json.loads(f.metadata()["config"])["quantizer"] == kind
    assert read_tokenizer_metadata(tmp_path / "t.safetensors")[0] == KINDS[kind]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    again = load_tokenizer(tmp_path / "t.safetensors")
    codes = again.encode(images)
    assert torch.equal(codes, model.encode(images))
    assert torch.equal(again.decode_codes(codes), model.decode_codes(codes))


def test_files_without_a_quantizer_are_vq_with_the_same_hash(tmp_path):
    model = VQModel(KINDS["vq"])
    save_tokenizer(model, tmp_path / "new.safetensors", {}, torch.float32)
    with safe_open(tmp_path / "new.safetensors", "pt") as f:
        metadata = f.metadata()
    config = json.loads(metadata["config"])
    del config["quantizer"], config["fsq_levels"]
    save_file(
        load_file(tmp_path / "new.safetensors"), tmp_path / "old.safetensors", metadata | {"config": json.dumps(config)}
    )
    assert read_tokenizer_metadata(tmp_path / "old.safetensors")[0] == KINDS["vq"]
    assert isinstance(load_tokenizer(tmp_path / "old.safetensors").quantize, VectorQuantizer)
    assert tokenizer_hash(tmp_path / "old.safetensors") == tokenizer_hash(tmp_path / "new.safetensors")


def test_the_hash_tells_quantizers_with_equal_tensors_apart(tmp_path):
    torch.manual_seed(0)
    one = VQModel(
        TokenizerConfig(**NETWORK, quantizer="fsq", codebook_size=16, codebook_embed_dim=4, fsq_levels=[2] * 4)
    )
    other = VQModel(TokenizerConfig(**NETWORK, quantizer="lfq", codebook_size=16, codebook_embed_dim=4))
    other.load_state_dict(one.state_dict())
    for name, model in (("a", one), ("b", other)):
        save_tokenizer(model, tmp_path / f"{name}.safetensors", {})
    assert tokenizer_hash(tmp_path / "a.safetensors") != tokenizer_hash(tmp_path / "b.safetensors")


# Bad code counts ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"quantizer": "lfq", "codebook_size": 1000, "codebook_embed_dim": 10},
         "tokenizer.codebook_size = 1000: tokenizer.quantizer lfq has one bit per channel, so it must be a power of two, as 512 or 1024"),
        ({"quantizer": "lfq", "codebook_size": 1024, "codebook_embed_dim": 8},
         "tokenizer.codebook_embed_dim = 8: tokenizer.quantizer lfq has one bit per channel, so 1024 codes need 10; set it to 10"),
        ({"quantizer": "fsq"}, "tokenizer.fsq_levels is empty: tokenizer.quantizer fsq needs the number of values of each channel"),
        ({"quantizer": "fsq", "codebook_size": 64, "fsq_levels": [8, 7]},
         r"tokenizer.codebook_size = 64: must be the product of tokenizer.fsq_levels \[8, 7\], 56"),
        ({"quantizer": "fsq", "codebook_size": 64, "codebook_embed_dim": 3, "fsq_levels": [8, 8]},
         r"tokenizer.codebook_embed_dim = 3: must be the number of tokenizer.fsq_levels \[8, 8\], 2"),
        ({"quantizer": "fsq", "codebook_size": 8, "codebook_embed_dim": 2, "fsq_levels": [8, 1]},
         "tokenizer.fsq_levels = 1: must be at least 2"),
        ({"fsq_levels": [8, 8]}, r"tokenizer.fsq_levels = \[8, 8\]: tokenizer.quantizer vq has no levels"),
        ({"quantizer": "rvq"}, "tokenizer.quantizer = rvq: must be vq, lfq, fsq or ibq"),
        ({"quantizer": "ibq"}, "continuous_steps = 500: only tokenizer.quantizer vq starts without quantization, ibq does not: set it to 0"),
    ],
)  # fmt: skip
def test_impossible_code_counts_get_one_sentence(fields, sentence):
    overrides = [f"tokenizer.{k}={json.dumps(v)}" for k, v in fields.items()]
    with pytest.raises(UserError, match=sentence):
        load_tokenizer_config(None, ["pictures=p", *overrides])


@pytest.mark.parametrize("fields", [{"quantizer": "lfq"}, {"quantizer": "fsq"}, {"quantizer": 5}, {"fsq_levels": [1]}])
def test_a_file_with_impossible_codes_is_refused(tmp_path, fields):
    save_tokenizer(VQModel(KINDS["vq"]), tmp_path / "t.safetensors", {})
    with safe_open(tmp_path / "t.safetensors", "pt") as f:
        metadata = f.metadata()
    config = json.dumps(json.loads(metadata["config"]) | fields)
    save_file(load_file(tmp_path / "t.safetensors"), tmp_path / "t.safetensors", metadata | {"config": config})
    with pytest.raises(UserError, match=r"t\.safetensors"):
        load_tokenizer(tmp_path / "t.safetensors")


# Training ----------------------------------------------------------------------------------------------------
def _config(kind: str, **changes) -> TokenizerTrainConfig:
    fields = {"tokenizer": KINDS[kind], "steps": 40, "batch": 4, "perceptual": 0.0, "dtype": "fp32", "warmup": 2, "lr": 3e-3,
              "continuous_steps": 3 if kind == "vq" else 0, "entropy_temperature": 1.0, "revive_every": 5}  # fmt: skip
    return TokenizerTrainConfig(**{**fields, **changes})


def _batch(step: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, 16, 16, 3), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)


def test_a_state_without_the_newer_fields_resumes(tmp_path):
    trainer = TokenizerTrainer(_config("vq", entropy_temperature=0.01), torch.device("cpu"), torch.float32, _batch)
    trainer.train_step(to_images(_batch(0)))
    trainer.save(tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for name in ("entropy", "entropy_temperature"):
        del state["config"][name]
    for name in ("quantizer", "fsq_levels"):
        del state["config"]["tokenizer"][name]
    torch.save(state, tmp_path / "last.pt")
    again = TokenizerTrainer(trainer.c, torch.device("cpu"), torch.float32, _batch)
    again.load(tmp_path / "last.pt")
    assert again.step == 1
    other = replace(trainer.c, tokenizer=replace(KINDS["ibq"]), continuous_steps=3)
    with pytest.raises(UserError, match="another configuration .tokenizer: .*'vq'.* -> .*'ibq'"):
        TokenizerTrainer(other, torch.device("cpu"), torch.float32, _batch).load(tmp_path / "last.pt")


@pytest.mark.parametrize("kind", ["lfq", "fsq", "ibq"])
def test_training_resumes_bit_for_bit(tmp_path, kind):
    def trainer() -> TokenizerTrainer:
        return TokenizerTrainer(_config(kind, steps=7), torch.device("cpu"), torch.float32, _batch)

    def steps(one: TokenizerTrainer, until: int) -> TokenizerTrainer:
        while one.step < until:
            one.train_step(to_images(_batch(one.step)))
        return one

    whole, stopped, resumed = steps(trainer(), 7), steps(trainer(), 3), trainer()
    stopped.save(tmp_path / "last.pt")
    resumed.load(tmp_path / "last.pt")
    steps(resumed, 7)
    assert asdict(whole.c)["tokenizer"]["quantizer"] == kind
    others = resumed.model.state_dict()
    assert all(torch.equal(v, others[k]) for k, v in whole.model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_fp32_under_autocast(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = make_quantizer(replace(KINDS[kind], codebook_size=4096) if kind in ("vq", "ibq") else KINDS[kind])
    z = torch.randn(4, KINDS[kind].codebook_embed_dim, 16, 16)
    wanted = quantizer.encode(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(z), wanted)
        assert torch.equal(quantizer(z).codes, wanted)
