"""Decoding of random-order networks: any order and several tokens per step, against the whole sequence recomputed."""

from __future__ import annotations

import math

import pytest
import torch

from megastar.config.schema import ModelConfig
from megastar.errors import UserError
from megastar.model.token_order import Placement
from megastar.model.transformer import Transformer
from megastar.sampling.guidance import guide, scales
from megastar.sampling.kv_cache import KVCache
from megastar.sampling.logits import draw, probabilities
from megastar.sampling.options import SamplingOptions
from megastar.sampling.parallel import random_orders
from megastar.sampling.sampler import Sampler, sample_seeds, uniform_noise
from megastar.sampling.step_schedules import DecodingStep, decoding_steps, diagonals, token_counts

T, V = 16, 23
SIZES = {"n_layer": 3, "n_head": 2, "dim": 32, "multiple_of": 16, "vocab_size": V, "num_classes": 4, "image_tokens": T}


def network(kind: str = "rotary", **more) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(ModelConfig(**SIZES | {"target_position": kind} | more)).double()
    for p in made.parameters():  # large weights, so that the distributions are far from flat
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return made.eval()


@torch.no_grad()
def recomputed(
    model: Transformer, labels: torch.Tensor, orders: torch.Tensor, seeds, counts, **options
) -> torch.Tensor:
    """The sampler without a cache, token by token: each token of a step is the next one of a whole sequence of its own."""
    o, T = SamplingOptions(**options), model.cfg.image_tokens
    factors, codes = model.cfg.head_factors, torch.zeros(len(labels), T, dtype=torch.long)
    scale_of = scales(T, o.cfg_scale, o.cfg_schedule, o.cfg_interval)
    noise, first = uniform_noise(seeds, T * max(1, len(factors))), 0
    null = torch.full_like(labels, model.cfg.num_classes)
    for count in counts:
        drawn = []
        for j in range(first, first + count):
            targets = torch.cat([orders[:, :first], orders[:, j : j + 1]], 1)
            known = codes.gather(1, orders[:, :first])
            place = Placement.of(targets)
            states = [model.norm(model(c, known, placement=place).last[:, -1]) for c in (labels, null)]
            if not factors:
                c, u = (model.output(s) for s in states)
                logits = guide(torch.cat([c, u]).float(), scale_of[j]) if scale_of[j] != 1 else c.float()
                drawn.append(draw(probabilities(logits, o.temperature, o.top_k, o.top_p), noise[:, j]))
                continue
            code = torch.zeros_like(labels)
            for i, size in enumerate(factors):
                c, u = (model.output.heads[i](s).float() for s in states)
                logits = guide(torch.cat([c, u]), scale_of[j]) if scale_of[j] != 1 else c
                part = draw(probabilities(logits, o.temperature, o.top_k, o.top_p), noise[:, j * len(factors) + i])
                code = code * size + part
                if i + 1 < len(factors):
                    states = [model.output.mixers[i](s, part) for s in states]
            drawn.append(code)
        codes.scatter_(1, orders[:, first : first + count], torch.stack(drawn, 1))
        first += count
    return codes


# Schedules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", ["cosine", "uniform"])
@pytest.mark.parametrize("tokens", [4, 16, 64, 256])
def test_every_step_draws_a_token_and_all_are_drawn_once(schedule, tokens):
    for steps in {1, 2, 3, tokens // 2, tokens - 1, tokens}:
        counts = token_counts(tokens, steps, schedule)
        assert len(counts) == steps and min(counts) >= 1 and sum(counts) == tokens
    assert token_counts(tokens, tokens, schedule) == [1] * tokens


def test_the_schedules_are_the_formulas():
    assert token_counts(64, 4, "uniform") == [16] * 4 and token_counts(10, 4, "uniform") == [2, 3, 2, 3]
    done = [math.floor(256 * (1 - math.cos(math.pi / 2 * s / 8)) + 1e-9) for s in range(9)]
    assert token_counts(256, 8) == [b - a for a, b in zip(done, done[1:], strict=False)]
    assert token_counts(256, 8) == sorted(token_counts(256, 8))  # few first


def test_diagonals():
    order, counts = diagonals(9)
    assert order == [0, 1, 3, 2, 4, 6, 5, 7, 8] and counts == [1, 2, 3, 2, 1]
    for side in (1, 2, 8, 16):
        order, counts = diagonals(side * side)
        assert sorted(order) == list(range(side * side)) and sum(counts) == side * side and len(counts) == 2 * side - 1
        step = {p: n for n, c in enumerate(counts) for p in order[sum(counts[:n]) : sum(counts[:n]) + c]}
        for p, n in step.items():  # the upper and the left neighbour are known
            assert p < side or step[p - side] == n - 1
            assert p % side == 0 or step[p - 1] == n - 1


def test_a_step_begins_after_the_query_that_stays_in_the_cache():
    assert decoding_steps([1, 2, 3, 1]) == [
        DecodingStep(0, 0, 1),
        DecodingStep(1, 1, 2),
        DecodingStep(2, 3, 3),
        DecodingStep(4, 6, 1),
    ]
    assert decoding_steps([1, 1, 1]) == [DecodingStep(i, i, 1) for i in range(3)]


def test_an_images_order_is_a_function_of_its_seed():
    seeds = sample_seeds(3, 50)
    orders = random_orders(seeds, 64)
    assert torch.equal(orders.sort(-1).values, torch.arange(64).expand(50, 64))
    assert len({tuple(o.tolist()) for o in orders}) == 50
    assert torch.equal(random_orders(seeds[7:9], 64), orders[7:9])
    assert not torch.equal(random_orders(sample_seeds(4, 50), 64), orders)
    assert abs(orders[:, 0].double().mean() - 31.5) < 12  # not biased to either end


# Attention of the queries ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("start", "kept", "queries"), [(0, 0, 3), (5, 2, 4), (60, 3, 6), (64, 0, 2), (63, 5, 1)])
def test_queries_see_what_precedes_them_and_themselves(start, kept, queries, dtype):
    d, size = 8, kept + queries
    q, k, v = torch.randn(3, 2, 3, start + size, d, dtype=dtype)
    cache = KVCache(1, 2, 3, 150, d, dtype)
    if start:
        cache.attend(0, *(x[:, :, :start] for x in (q, k, v)), 0)
    cache.queries = queries
    got = cache.attend(0, *(x[:, :, start:] for x in (q, k, v)), start)
    before = start + kept
    for i in range(size):
        at = start + i
        seen = list(range(at + 1)) if i < kept else [*range(before), at]
        one = q[:, :, at : at + 1] @ k[:, :, seen].transpose(-1, -2) * d**-0.5
        torch.testing.assert_close(got[:, :, i : i + 1], one.softmax(-1) @ v[:, :, seen])


# The sampler -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["embedding", "rotary"])
@pytest.mark.parametrize(
    ("steps", "schedule"),
    [(1, "cosine"), (3, "cosine"), (7, "cosine"), (T - 1, "cosine"), (T, "cosine"), (5, "uniform"), (8, "uniform"),
     (3 * T // 4, "uniform")],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_tokens_are_those_of_the_recomputed_sequences(kind, steps, schedule, scale):
    model, labels, seeds = network(kind), torch.tensor([0, 1, 3, 2, 1]), sample_seeds(11, 5)
    options = {"cfg_scale": scale, "cfg_schedule": "linear", "top_k": 9, "top_p": 0.95, "temperature": 0.8}
    sampler = Sampler(model, SamplingOptions(**options, parallel_steps=steps, schedule=schedule), 5)
    wanted = recomputed(model, labels, random_orders(seeds, T), seeds, token_counts(T, steps, schedule), **options)
    assert torch.equal(sampler.draw(labels, seeds), wanted)
    in_rows = SamplingOptions(**options, parallel_steps=steps, schedule=schedule, token_order="raster")
    raster = torch.arange(T).repeat(5, 1)
    wanted = recomputed(model, labels, raster, seeds, token_counts(T, steps, schedule), **options)
    assert torch.equal(Sampler(model, in_rows, 5).draw(labels, seeds), wanted)


@pytest.mark.parametrize("kind", ["embedding", "rotary"])
@pytest.mark.parametrize("given", [0, 7])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_one_diagonal_per_step(kind, given, scale):
    model, labels, seeds = network(kind), torch.tensor([0, 1, 3, 2, 1]), sample_seeds(11, 5)
    options = {"cfg_scale": scale, "cfg_schedule": "linear", "top_k": 9}
    sampler = Sampler(model, SamplingOptions(**options, parallel_steps=given, schedule="diagonal"), 3)
    order, counts = diagonals(T)
    wanted = recomputed(model, labels, torch.tensor(order).repeat(5, 1), seeds, counts, **options)
    drawn = [sampler.draw(labels[i : i + 3], seeds[i : i + 3]) for i in (0, 3)]
    assert torch.equal(torch.cat(drawn), wanted)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("interval", [-1, 5])
def test_guidance_ends_where_it_does_token_by_token(passes, interval):
    model, labels, seeds = network(), torch.tensor([2, 0, 1]), sample_seeds(1, 3)
    options = {"cfg_scale": 3.0, "cfg_interval": interval}
    sampler = Sampler(model, SamplingOptions(**options, parallel_steps=6), 3, passes=passes)
    wanted = recomputed(model, labels, random_orders(seeds, T), seeds, token_counts(T, 6), **options)
    assert torch.equal(sampler.draw(labels, seeds), wanted)


@pytest.mark.parametrize("steps", [0, 4])
def test_a_factorised_head(steps):
    model = network(vocab_size=24, head="factorised", head_factors=[4, 6])
    labels, seeds = torch.tensor([0, 1, 3]), sample_seeds(5, 3)
    options = SamplingOptions(cfg_scale=2.0, parallel_steps=steps, token_order="random")
    wanted = recomputed(model, labels, random_orders(seeds, T), seeds, token_counts(T, steps or T), cfg_scale=2.0)
    assert torch.equal(Sampler(model, options, 3).draw(labels, seeds), wanted)


def test_one_token_per_step_in_rows_is_the_raster_sampler():
    """Exactly: with the options' order, with the order given, and for any batch."""
    model, labels, seeds = network().float(), torch.arange(12) % 4, sample_seeds(2, 12)
    plain = Sampler(model, SamplingOptions(cfg_scale=1.5), 12).draw(labels, seeds)
    by_steps = SamplingOptions(cfg_scale=1.5, parallel_steps=T, token_order="raster")
    assert torch.equal(Sampler(model, by_steps, 12).draw(labels, seeds), plain)
    sampler, rows = Sampler(model, SamplingOptions(cfg_scale=1.5), 12), torch.arange(T).repeat(12, 1)
    assert torch.equal(sampler.draw(labels, seeds, orders=rows), plain)
    assert torch.equal(sampler.draw(labels, seeds), plain)  # and the sampler is as before
    given = random_orders(seeds, T)
    at_random = Sampler(model, SamplingOptions(cfg_scale=1.5, token_order="random"), 12).draw(labels, seeds)
    assert torch.equal(sampler.draw(labels, seeds, orders=given), at_random) and not torch.equal(at_random, plain)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_images_do_not_depend_on_the_batch(batch):
    model, labels, seeds = network().float(), torch.arange(8) % 4, sample_seeds(2, 8)
    options = SamplingOptions(cfg_scale=2.0, parallel_steps=5)
    whole = Sampler(model, options, 8).draw(labels, seeds)
    sampler = Sampler(model, options, batch)
    parts = [sampler.draw(labels[i : i + batch], seeds[i : i + batch]) for i in range(0, 8, batch)]
    assert torch.equal(torch.cat(parts), whole)


# Errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (
            "none",
            {"parallel_steps": 4},
            "parallel_steps 4: these weights were trained in raster order, and only a network ",
        ),
        ("none", {"token_order": "random"}, "token_order random: these weights were trained in raster order"),
        ("rotary", {"parallel_steps": 17}, "parallel_steps 17 must be at most 16, the tokens of an image"),
        ("rotary", {"parallel_steps": -1}, "parallel_steps -1 must be 0 "),
        ("rotary", {"parallel_steps": 2, "schedule": "linear"}, "schedule 'linear': choose one of cosine, uniform"),
        ("none", {"schedule": "diagonal"}, "schedule diagonal: these weights were trained in raster order"),
        (
            "rotary",
            {"schedule": "diagonal", "parallel_steps": 4},
            "parallel_steps 4: schedule diagonal draws one diagonal of the 4 x 4 tokens per step, 7 steps: leave it out",
        ),
        (
            "rotary",
            {"schedule": "diagonal", "token_order": "raster"},
            "token_order raster: schedule diagonal determines the order: leave it out",
        ),
        ("rotary", {"token_order": "spiral"}, "token_order 'spiral': choose one of auto, raster, random"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind, options, sentence):
    with pytest.raises(UserError, match=f"^{sentence}") as error:
        Sampler(network(kind), SamplingOptions(**options), 2)
    assert "\n" not in str(error.value)


def test_orders_that_are_none_are_refused():
    labels, seeds = torch.tensor([0, 1]), sample_seeds(0, 2)
    sampler = Sampler(network(), SamplingOptions(), 2)
    for bad in (torch.zeros(2, T, dtype=torch.long), torch.arange(T)[None], torch.arange(1, T + 1).repeat(2, 1)):
        with pytest.raises(UserError, match=f"give one permutation of 0..{T - 1} per image"):
            sampler.draw(labels, seeds, orders=bad)
    with pytest.raises(UserError, match="trained in raster order: leave them out"):
        Sampler(network("none"), SamplingOptions(), 2).draw(labels, seeds, orders=torch.arange(T).repeat(2, 1))


def test_damaged_weights_name_the_token():
    model = network()
    model.output.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="the logits of token 0 are not finite for class 1"):
        Sampler(model, SamplingOptions(parallel_steps=4), 1).draw(torch.tensor([1]), sample_seeds(0, 1))
