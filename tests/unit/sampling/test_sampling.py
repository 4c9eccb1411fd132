"""Sampling against the uncached network and against slow, obvious versions of each filter."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import megastar.sampling.sampler
from megastar.config.schema import ModelConfig, TokenizerConfig
from megastar.errors import UserError
from megastar.model.transformer import Transformer
from megastar.sampling.grid import Block, image_grid, save_grid
from megastar.sampling.guidance import doubled_labels, guide, null_until, scales
from megastar.sampling.kv_cache import KVCache
from megastar.sampling.logits import draw, keep_top_k, keep_top_p, probabilities
from megastar.sampling.options import SamplingOptions
from megastar.sampling.packed_linear import PackedLinear, decoding_copy
from megastar.sampling.sampler import (
    Sampler,
    check_tokenizer,
    decode_images,
    sample_seeds,
    uniform_noise,
)
from megastar.tokenizer.vq import VQModel
from tests.sampling import sample_tokens

CFG = ModelConfig(name="t", n_layer=3, n_head=2, dim=32, multiple_of=16, vocab_size=23, num_classes=4, image_tokens=16)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CFG)
    for p in made.parameters():  # large weights, so that the distributions are far from flat
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return made.eval()


class CountingModel(torch.nn.Module):
    """The network, recording the number of rows of each call."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model, self.cfg, self.rows = model, model.cfg, []

    def forward(self, labels, tokens, **kwargs):
        self.rows.append(len(tokens))
        return self.model(labels, tokens, **kwargs)


def uncached_logits(model: Transformer, label: int, tokens: list[int]) -> torch.Tensor:
    """Logits of the next token, from the whole sequence."""
    with torch.no_grad():
        return model(torch.tensor([label]), torch.tensor([tokens], dtype=torch.long)).logits[:, -1]


# Cache -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefill", [0, 5])
def test_cache_equals_full_forward(model, prefill):
    tokens = torch.randint(CFG.vocab_size, (3, CFG.image_tokens - 1))
    labels = torch.tensor([0, 4, 2])
    with torch.no_grad():
        full = model(labels, tokens).logits
        cache = KVCache.for_model(CFG, 3, torch.float32, "cpu")
        steps = [model(labels, tokens[:, :prefill], cache=cache, start=0).logits]
        for p in range(prefill, CFG.image_tokens - 1):
            steps.append(model(None, tokens[:, p : p + 1], cache=cache, start=p + 1).logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_over_the_blocks_against_torch(length, dtype):
    """Step by step and in one go, with fewer rows than the cache has, across the borders of its blocks."""
    q, k, v = torch.randn(3, 2, 3, length, 8, dtype=dtype)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    at_once, by_steps = KVCache(2, 5, 3, 150, 8, dtype), KVCache(2, 3, 3, 150, 8, dtype)
    torch.testing.assert_close(at_once.attend(1, q, k, v, 0), wanted)
    for p in range(length):
        one = slice(p, p + 1)
        torch.testing.assert_close(by_steps.attend(0, q[:, :, one], k[:, :, one], v[:, :, one], p), wanted[:, :, one])


def test_the_cache_holds_what_was_computed_and_no_more():
    cache = KVCache(2, 4, 3, 150, 8)
    assert cache.nbytes == cache.buffer.untyped_storage().nbytes() == 2 * 2 * 4 * 3 * 150 * 8 * 4
    for blocks in (*cache.keys, *cache.values):  # views of the one buffer
        assert all(b.untyped_storage().data_ptr() == cache.buffer.untyped_storage().data_ptr() for b in blocks)
        assert sum(b.numel() for b in blocks) == 4 * 3 * 150 * 8 and all(b.is_contiguous() for b in blocks)
    q = torch.ones(2, 3, 1, 8)
    cache.buffer.fill_(torch.nan)  # what is beyond the prefix, or of other rows, is never read
    assert cache.attend(1, q, q, q, 0).isfinite().all()
    assert cache.buffer.isfinite().sum() == 2 * q.numel()
    with pytest.raises(AssertionError, match="position 151"):
        cache.attend(0, q, q, q, 150)


@pytest.mark.parametrize(("scale", "passes", "rows"), [(1.0, 1, 3), (2.0, 1, 6), (2.0, 2, 6)])
def test_memory_of_the_caches_is_as_computed(model, scale, passes, rows):
    decoder = Sampler(model, SamplingOptions(cfg_scale=scale), 3, passes=passes).decoder
    c = CFG
    assert sum(x.nbytes for x in decoder.caches) == 2 * c.n_layer * rows * c.dim * c.image_tokens * 4


def test_packed_weights_are_the_networks_and_rows_keep_their_bits(model):
    copy = decoding_copy(model)
    assert not [m for m in model.modules() if isinstance(m, PackedLinear)]
    if not [m for m in copy.modules() if isinstance(m, PackedLinear)]:
        assert not torch.backends.mkldnn.is_available()
    assert copy.tok_embeddings.weight is model.tok_embeddings.weight
    labels, tokens = torch.arange(4), torch.randint(CFG.vocab_size, (4, 7))
    with torch.no_grad():
        both = copy(labels, tokens).logits
        torch.testing.assert_close(both, model(labels, tokens).logits, rtol=1e-5, atol=1e-5)


# Guidance ----------------------------------------------------------------------------------------------------
def test_guidance_formula_and_interval():
    c, u = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(guide(torch.cat([c, u]), 2.5), 2.5 * c - 1.5 * u)
    assert doubled_labels(torch.tensor([1, 2]), 9).tolist() == [1, 2, 9, 9]
    assert scales(4, 2.0) == [2.0] * 4
    assert scales(5, 2.0, cfg_interval=1) == [2, 2, 2, 1, 1]  # LlamaGen: i > 1 stops
    assert null_until(scales(5, 2.0, cfg_interval=1)) == 3 and null_until(scales(5, 1.0)) == 0


def test_ramps_against_their_formulas():
    assert scales(5, 3.0, "linear") == pytest.approx([1, 1.5, 2, 2.5, 3])
    assert scales(5, 3.0, "cosine") == pytest.approx([1, 2 - 2**0.5 / 2, 2, 2 + 2**0.5 / 2, 3])
    assert scales(5, 3.0, "linear", cfg_interval=1) == pytest.approx([1, 1.5, 2, 1, 1])
    assert scales(1, 3.0, "cosine") == [1.0] and null_until(scales(5, 3.0, "linear")) == 5


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("schedule", "interval"), [("linear", -1), ("cosine", 9), ("constant", 3)])
def test_schedules_equal_full_recomputation(model, schedule, interval, passes):
    labels, seeds = [0, 3, 1], sample_seeds(5, 3)
    options = {"cfg_scale": 2.5, "cfg_schedule": schedule, "cfg_interval": interval, "top_k": 12, "temperature": 0.8}
    got = sample_tokens(model, labels, seeds=seeds, batch=2, passes=passes, **options)
    noise, scale_of = uniform_noise(seeds, CFG.image_tokens), scales(CFG.image_tokens, 2.5, schedule, interval)
    for i, row in enumerate(got.tolist()):
        tokens: list[int] = []
        for position in range(CFG.image_tokens):
            c, u = uncached_logits(model, labels[i], tokens), uncached_logits(model, CFG.num_classes, tokens)
            probs = probabilities(u + (c - u) * scale_of[position], 0.8, 12)
            tokens.append(int(draw(probs, noise[i : i + 1, position])))
        assert row == tokens


@pytest.mark.parametrize("interval", [-1, 4])
def test_guided_greedy_equals_uncached(model, interval):
    labels, scale = [0, 3, 1], 2.0
    got = sample_tokens(model, labels, seeds=[0, 1, 2], cfg_scale=scale, top_k=1, cfg_interval=interval, batch=2)
    for label, row in zip(labels, got.tolist(), strict=True):
        tokens: list[int] = []
        for position in range(CFG.image_tokens):
            c, u = uncached_logits(model, label, tokens), uncached_logits(model, CFG.num_classes, tokens)
            logits = u + (c - u) * scale if interval < 0 or position - 1 <= interval else c
            tokens.append(int(logits.argmax()))
        assert row == tokens


def test_no_guidance_computes_no_null_half_and_interval_drops_it(model):
    counting = CountingModel(model).eval()
    sample_tokens(counting, [0, 1, 2], seeds=[0, 1, 2], batch=2)
    assert counting.rows == [2] * 16 + [1] * 16
    counting.rows.clear()
    sample_tokens(counting, [0, 1], seeds=[0, 1], cfg_scale=1.5, cfg_interval=3)
    assert counting.rows == [4] * 5 + [2] * 11
    counting.rows.clear()
    sample_tokens(counting, [0, 1], seeds=[0, 1], cfg_scale=1.5, cfg_interval=3, passes=2)
    assert counting.rows == [2, 2] * 5 + [2] * 11


# Samples -----------------------------------------------------------------------------------------------------
def test_greedy_equals_uncached_argmax(model):
    got = sample_tokens(model, [2, 0], seeds=[5, 6], top_k=1)
    for label, row in zip([2, 0], got.tolist(), strict=True):
        tokens: list[int] = []
        for _ in range(CFG.image_tokens):
            tokens.append(int(uncached_logits(model, label, tokens).argmax()))
        assert row == tokens


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samples_do_not_depend_on_the_batch(model, scale, passes):
    labels, seeds = [0, 1, 2, 3, 0, 1, 2, 3], sample_seeds(7, 8)
    one, three, eight = (
        sample_tokens(model, labels, seeds=seeds, cfg_scale=scale, top_p=0.95, batch=b, passes=passes)
        for b in (1, 3, 8)
    )
    assert torch.equal(one, three) and torch.equal(one, eight)
    backwards = sample_tokens(model, labels[::-1], seeds=seeds[::-1], cfg_scale=scale, top_p=0.95, batch=5)
    assert torch.equal(backwards.flip(0), one)
    assert len({tuple(row) for row in one.tolist()}) == 8  # seeds matter
    assert one.min() >= 0 and one.max() < CFG.vocab_size


def test_first_token_follows_the_distribution(model):
    n = 4000
    probs = probabilities(uncached_logits(model, 1, []), 1.3, 10, 0.9)[0].double()
    counts = torch.bincount(draw(probs.float().expand(n, -1), uniform_noise(sample_seeds(0, n), 1)[:, 0]), minlength=23)
    assert (counts[probs == 0] == 0).all()
    expected = probs * n
    chi2 = ((counts - expected) ** 2 / expected)[probs > 0].sum()
    assert chi2 < 2.5 * (probs > 0).sum()


def test_draw_at_the_ends_never_takes_an_impossible_code():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(probs.expand(5, -1), numbers).tolist() == [1, 1, 3, 3, 3]
    assert draw(probs, torch.ones(1, dtype=torch.float64)).tolist() == [3]


def test_noise_depends_on_its_seed_only():
    seeds = sample_seeds(3, 5)
    noise = uniform_noise(seeds, 64)
    assert torch.equal(uniform_noise(seeds[3:4], 64)[0], noise[3])
    assert torch.equal(uniform_noise(seeds, 9), noise[:, :9])
    assert noise.min() >= 0 and noise.max() < 1 and len(noise.unique()) == noise.numel()
    assert set(sample_seeds(0, 100)).isdisjoint(sample_seeds(1, 100)) and sample_seeds(0, 2) == [0, 1]
    with pytest.raises(UserError, match="seed -1"):
        sample_seeds(-1, 1)


def test_model_mode_is_restored_and_dropout_is_off(model):
    model.train()
    a = sample_tokens(model, [0], seeds=[0])
    assert model.training
    model.eval()
    assert torch.equal(a, sample_tokens(model, [0], seeds=[0]))


# Filters -----------------------------------------------------------------------------------------------------
def test_top_k_against_a_loop():
    logits = torch.randn(20, 50)
    for k in (1, 7, 49):
        kept = keep_top_k(logits, k).isfinite()
        for row, mask in zip(logits.tolist(), kept.tolist(), strict=True):
            assert {i for i, m in enumerate(mask) if m} == set(sorted(range(50), key=lambda i: -row[i])[:k])
    for k in (0, 50, 1000):  # 0 means all; more than the vocabulary is all
        assert torch.equal(keep_top_k(logits, k), logits)


def test_top_p_against_a_loop():
    logits = 2 * torch.randn(40, 30, dtype=torch.float64)
    for p in (1e-9, 0.3, 0.9, 0.999):
        kept = keep_top_p(logits, p).isfinite()
        for row, mask in zip(logits.softmax(-1).tolist(), kept.tolist(), strict=True):
            wanted, mass = set(), 0.0
            for i in sorted(range(30), key=lambda i: -row[i]):
                wanted.add(i)
                mass += row[i]
                if mass > p:
                    break
            assert {i for i, m in enumerate(mask) if m} == wanted
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_probabilities_apply_temperature_then_k_then_p():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    expected = torch.softmax(torch.tensor([1.5, 1.0, 0.5]), 0)[:2]  # top-p sees the three that top-k left
    got = probabilities(logits, temperature=2.0, top_k=3, top_p=0.7)
    torch.testing.assert_close(got[0], torch.cat([expected / expected.sum(), torch.zeros(2)]))


# Requests that cannot be met -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg_scale": 0.5}, "cfg_scale 0.5"),
        ({"cfg_scale": float("nan")}, "cfg_scale nan"),
        ({"cfg_interval": -2}, "cfg_interval -2"),
        ({"cfg_schedule": "sine"}, "cfg_schedule 'sine': choose one of constant, linear, cosine"),
        ({"temperature": 0.0}, "temperature 0.0 must be above 0; .* top_k 1"),
        ({"top_k": -1}, "top_k -1 must be 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_each_bad_option_has_its_sentence(model, changes, message):
    with pytest.raises(UserError, match=message):
        Sampler(model, SamplingOptions(**changes), 2)


def test_all_problems_at_once(model):
    with pytest.raises(UserError, match="(?s)temperature.*top_p.*batch 0 must"):
        Sampler(model, SamplingOptions(temperature=-1.0, top_p=2.0), 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_stop_with_token_class_and_rank(model, value):
    broken = Transformer(CFG).eval()
    broken.load_state_dict(model.state_dict())
    used = int(sample_tokens(broken, [2], seeds=[0], top_k=1)[0, 4])  # its embedding is read for token 5
    broken.tok_embeddings.weight.data[used] = value
    first = sample_tokens(model, [2], seeds=[0], top_k=1)[0].tolist().index(used) + 1
    with pytest.raises(UserError, match=rf"logits of token {first} are not finite for class 2 \(rank 3\)"):
        sample_tokens(broken, [2], seeds=[0], top_k=1, rank=3)


def test_top_k_above_the_vocabulary_keeps_all(model):
    args = {"seeds": [1, 2]}
    assert torch.equal(sample_tokens(model, [0, 1], top_k=10**6, **args), sample_tokens(model, [0, 1], **args))


# Images ------------------------------------------------------------------------------------------------------
def test_codes_to_images_and_the_wrong_tokenizer():
    torch.manual_seed(0)
    c = TokenizerConfig(16, 8, [1, 1, 1], 1, 8, 23, 4, norm_groups=4)
    tokenizer = VQModel(c).eval()
    codes = torch.randint(23, (5, 16))
    got = decode_images(tokenizer, codes, batch=2)
    assert got.shape == (5, 16, 16, 3) and got.dtype == np.uint8
    with torch.no_grad():
        images = tokenizer.decode_codes(codes)
    assert np.abs(got / 127.5 - 1 - images.permute(0, 2, 3, 1).numpy()).max() <= 0.5 / 127.5 + 1e-5
    check_tokenizer(CFG, tokenizer)
    c.codebook_size = 64
    with pytest.raises(UserError, match="samples 16 codes of 23, the tokenizer has 16 codes of 64"):
        check_tokenizer(CFG, tokenizer)


def squares(n: int, side: int = 16) -> np.ndarray:
    return np.stack([np.full((side, side, 3), (i * 9 % 256, 100, 200), np.uint8) for i in range(n)])


def test_grid_puts_every_image_in_its_cell(tmp_path):
    labels = [2, 0, 2, 2]
    images = squares(4)
    blocks = [Block("this run", images, labels), Block("shipped weights", images[::-1], labels[::-1])]
    image = image_grid(blocks, ["apple", "unused", "a class whose name is far too long to be shown whole"], columns=2)
    pixels = np.asarray(image)
    # Columns and rows from the right and the bottom: the margin and the captions are left and above.
    left, cell = image.width - 2 * 66, 64
    row = image.height - 2 - 66 + 1
    assert (pixels[row, left + 1] == images[::-1][0][0, 0]).all()  # last block, class 2, first image
    assert (pixels[row, left + 66 + cell - 1] == images[::-1][1][0, 0]).all()
    assert (pixels[row - 66, left + 66] == 255).all()  # class 0 has one image only
    assert (pixels[: row - 2 * 66, : left - 4] < 100).any()  # there is text
    path = tmp_path / "new" / "grid.png"
    save_grid(image, path, {"seed": 3})
    with Image.open(path) as saved:
        assert saved.size == image.size and json.loads(saved.text["megastar"]) == {"seed": 3}
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (0, [], "no images for the grid"),
        (2, [0, 3], "class 3 has no name: there are 2 names"),
        (2, [0], "one: 2 images but 1 labels"),
    ],
)
def test_grid_errors(count, labels, message):
    images = squares(count) if count else np.zeros((0, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=message):
        image_grid([Block("one", images, labels)], ["a", "b"])


def test_a_sampler_that_is_no_longer_used_is_freed_at_once(model, monkeypatch):
    """Also one with CUDA graphs: its cache and the graphs' pool take gigabytes, and the collector may not run for long."""
    steps = []
    monkeypatch.setattr(megastar.sampling.sampler, "StepGraphs", lambda step, device: steps.append(step))
    gc.collect()
    gc.disable()
    try:
        sampler = Sampler(model, SamplingOptions(), 2, cuda_graphs=True)
        sampler.tokens.fill_(-1)
        with torch.no_grad():
            steps[0](0)  # position 0 of both images
        assert (sampler.tokens[:, 0] >= 0).all() and (sampler.tokens[:, 1:] == -1).all()
        cache = weakref.ref(sampler.decoder.caches[0].buffer)
        del sampler
        assert cache() is None
    finally:
        gc.enable()
