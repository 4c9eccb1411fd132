"""Sampling from a factorised head: the cached sampler against plain loops over the whole sequence."""

from __future__ import annotations

import math

import pytest
import torch

from megastar.config.schema import ModelConfig
from megastar.model.factorised import sub_codes
from megastar.model.transformer import Transformer
from megastar.sampling.sampler import sample_seeds, uniform_noise
from tests.sampling import sample_tokens

FACTORS = [4, 6]
CFG = ModelConfig(
    name="t", n_layer=2, n_head=2, dim=32, multiple_of=16, vocab_size=24, head="factorised", head_factors=FACTORS, num_classes=4,
    image_tokens=9,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    made = Transformer(CFG)
    for p in made.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return made.eval()


def slow(
    model: Transformer, label: int, seed: int, temperature: float, top_k: int, top_p: float, scale: float
) -> list[int]:
    """One image without a cache: every sub-code from the whole sequence, filters as loops over its values."""
    noise, tokens = uniform_noise([seed], CFG.image_tokens * 2)[0].tolist(), []
    for position in range(CFG.image_tokens):
        states = []
        for row in (label, CFG.num_classes):
            with torch.no_grad():
                out = model(torch.tensor([row]), torch.tensor([tokens], dtype=torch.long), need_logits=False)
                states.append(model.norm(out.last)[0, -1])
        digits = []
        for i in range(2):
            with torch.no_grad():
                if i:
                    states = [model.output.mixers[0](s, torch.tensor(digits[0])) for s in states]
                c, u = (model.output.heads[i](s).double() for s in states)
            logits = ((u + (c - u) * scale) / temperature).tolist()
            order = sorted(range(len(logits)), key=lambda v: -logits[v])
            kept = order[: top_k or len(order)]
            weights = {v: math.exp(logits[v] - logits[order[0]]) for v in kept}
            total, mass, nucleus = sum(weights.values()), 0.0, []
            for v in kept:
                if mass > top_p:
                    break
                nucleus.append(v)
                mass += weights[v] / total
            total, running = sum(weights[v] for v in nucleus), 0.0
            for v in sorted(nucleus):
                running += weights[v] / total
                if running > noise[2 * position + i]:
                    break
            digits.append(v)
        tokens.append(digits[0] * FACTORS[1] + digits[1])
    return tokens


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.6}, {"cfg_scale": 2.5}, {"temperature": 1.3, "top_k": 3, "top_p": 0.8, "cfg_scale": 1.5}],
)  # fmt: skip
def test_tokens_are_those_of_plain_sampling(model, options, passes):
    labels, seeds = [0, 3, 1, 2], sample_seeds(5, 4)
    found = sample_tokens(model, labels, seeds=seeds, passes=passes, **options)
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | {k: v for k, v in options.items() if k != "cfg_scale"}
    for row, label, seed in zip(found.tolist(), labels, seeds, strict=True):
        assert row == slow(model, label, seed, **given, scale=options.get("cfg_scale", 1.0))


def test_samples_do_not_depend_on_the_batch(model):
    labels, seeds = [0, 3, 1, 2, 0], sample_seeds(9, 5)
    whole = sample_tokens(model, labels, seeds=seeds, cfg_scale=2.0)
    assert torch.equal(whole, sample_tokens(model, labels, seeds=seeds, cfg_scale=2.0, batch=2))
    a, b = sub_codes(whole, FACTORS)
    assert len(a.unique()) > 2 and len(b.unique()) > 3


def test_frequencies_are_the_joint_probabilities(model):
    """The first token of many samples against the table of all codes."""
    labels = [1] * 400
    drawn = sample_tokens(model, labels, seeds=sample_seeds(0, 400), batch=400)[:, 0]
    with torch.no_grad():
        wanted = model(torch.tensor([1])).logits[0, 0].double().exp()
    found = torch.bincount(drawn, minlength=24) / 400
    assert (found - wanted).abs().sum() < 0.35  # total variation of 400 draws from 24 codes: about 0.2
