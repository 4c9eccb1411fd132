"""Networks of random token order: raster order as before, RoPE by grid position, what an output depends on."""

from __future__ import annotations

import pytest
import torch

from megastar.config.schema import ModelConfig
from megastar.model.masks import MaskSpec
from megastar.model.rope import rope_table, split_qkv
from megastar.model.token_order import Placement, inverse, placed_rope, slots_of
from megastar.model.transformer import Transformer
from megastar.objectives.self_guided import at_positions, rows_at
from megastar.report.attention import attention_maps

T, V = 16, 23
SIZES = {"n_layer": 3, "n_head": 2, "dim": 32, "multiple_of": 16, "vocab_size": V, "num_classes": 4, "image_tokens": T}
DROP = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}


def network(kind: str) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(ModelConfig(**SIZES, **DROP, target_position=kind))
    for name, p in made.named_parameters():
        if p.dim() > 1 and "target" not in name:
            torch.nn.init.normal_(p, std=0.2)
    return made


def inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, codes and orders."""
    g = torch.Generator().manual_seed(1)
    orders = torch.rand(rows, T, generator=g).argsort(-1)
    return torch.arange(rows) % 5, torch.randint(V, (rows, T), generator=g), orders


def test_without_the_table_a_random_order_network_is_the_raster_one_bit_for_bit():
    """Its other weights are drawn alike, so a run of random order starts where a raster run does."""
    torch.manual_seed(3)
    raster = Transformer(ModelConfig(**SIZES))
    torch.manual_seed(3)
    other = Transformer(ModelConfig(**SIZES, target_position="embedding"))
    state = other.state_dict()
    assert not state.pop("target_embeddings.weight").any() and raster.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in raster.state_dict().items())
    labels, codes, _ = inputs()
    raster, other = network("none"), network("embedding")
    wanted = raster(labels, codes[:, :-1]).logits
    assert torch.equal(other(labels, codes[:, :-1]).logits, wanted)
    rows = torch.arange(T).repeat(3, 1)
    assert torch.equal(other(labels, codes[:, :-1], placement=Placement.of(rows)).logits, wanted)


@pytest.mark.parametrize("kind", ["embedding", "rotary"])
def test_raster_order_may_be_given_or_left_out(kind):
    model, (labels, codes, _) = network(kind), inputs()
    torch.nn.init.normal_(model.target_embeddings.weight, std=0.3)
    rows = torch.arange(T).repeat(3, 1)
    given = model(labels, codes[:, :-1], placement=Placement.of(rows)).logits
    assert torch.equal(given, model(labels, codes[:, :-1]).logits)


def test_each_input_has_its_own_place_and_its_target():
    orders = torch.tensor([[2, 0, 3, 1]])
    own, target = Placement.of(orders)
    assert own.tolist() == [[0, 3, 1, 4]] and target.tolist() == [[2, 0, 3, 1]]
    own, target = Placement.raster(2, 3, torch.device("cpu"))
    assert own.tolist() == target.tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("kind", ["embedding", "rotary"])
def test_rope_turns_each_token_by_its_grid_position(kind):
    """Against one complex product per token; the compiler's form too."""
    cfg, (_, _, orders) = ModelConfig(**SIZES, target_position=kind), inputs(2)
    table = rope_table(cfg.grid, cfg.head_dim, cfg.rope_base, torch.device("cpu"), torch.float64)
    place = Placement.of(orders)
    qkv = torch.randn(2, T, 3, 2, cfg.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rope = placed_rope(cfg, place, torch.device("cpu"), torch.float64)
    q, k, v = split_qkv(qkv, rope)
    compiled = torch.compile(split_qkv, backend="eager", fullgraph=True)(qkv, rope)
    for got, other in zip((q, k, v), compiled, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-12)

    def turned(x: torch.Tensor, row: int) -> torch.Tensor:
        angles = torch.view_as_complex(table[row])
        return torch.view_as_real(torch.view_as_complex(x.view(-1, 2)) * angles).flatten()

    for b in range(2):
        for s in range(T):
            mine, wanted = int(place.own[b, s]), 1 + int(orders[b, s])
            for h in range(2):
                torch.testing.assert_close(k[b, h, s], turned(qkv[b, s, 1, h], mine))
                of_q = wanted if kind == "rotary" else mine
                torch.testing.assert_close(q[b, h, s], turned(qkv[b, s, 0, h], of_q))
                assert torch.equal(v[b, h, s], qkv[b, s, 2, h])


@pytest.mark.parametrize("kind", ["embedding", "rotary"])
def test_an_output_depends_on_earlier_tokens_and_its_own_target_only(kind):
    model, (labels, codes, orders) = network(kind).eval().double(), inputs(1)
    torch.nn.init.normal_(model.target_embeddings.weight, std=0.3)
    known = codes.gather(1, orders)[:, :-1]

    def outputs(known: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
        return model(labels, known, placement=Placement.of(orders)).logits[0].detach()

    plain = outputs(known, orders)
    changed = known.clone()
    changed[0, 7] = (changed[0, 7] + 1) % V  # input 8
    differs = (outputs(changed, orders) - plain).abs().amax(-1) > 1e-9
    assert differs.tolist() == [False] * 8 + [True] * (T - 8)
    swapped = orders.clone()
    swapped[0, [10, 12]] = orders[0, [12, 10]]  # the target of output 10, hence the place of input 11 ...
    differs = (outputs(known, swapped) - plain).abs().amax(-1) > 1e-9
    assert differs.tolist() == [False] * 10 + [True] * (T - 10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_gets_a_gradient_of_the_loss(checkpointing):
    model, (labels, codes, orders) = network("rotary"), inputs()
    codes = codes.gather(1, orders)
    out = model(
        labels, codes[:, :-1], MaskSpec.hidden(torch.rand(3, T) < 0.2), checkpointing=checkpointing, targets=codes,
        placement=Placement.of(orders),
    )  # fmt: skip
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (model.target_embeddings.weight.grad.abs().sum(-1) > 0).all()


# Positions of the contrastive losses -------------------------------------------------------------------------------
def test_the_same_image_positions_are_found_in_every_order():
    _, _, orders = inputs(6)
    orders = orders.view(3, 2, T)
    assert torch.equal(orders.gather(-1, inverse(orders)), torch.arange(T).expand(3, 2, T))
    positions = torch.tensor([1, 5, 9, T - 1])
    slots = slots_of(orders, positions)
    assert slots.shape == (3, 2, 4)
    for b in range(3):
        for m in range(2):
            order = orders[b, m].tolist()
            for k, slot in zip(positions.tolist(), slots[b, m].tolist(), strict=True):
                at = order.index(k - 1)
                assert slot == at + 1 if at + 1 < T else slot == T - 1
                assert at + 1 == T or Placement.of(orders[b])[0][m, slot] == k  # the input is that token
    raster = torch.arange(T).repeat(1, 1, 1)
    assert torch.equal(slots_of(raster, positions)[0, 0], positions)


def test_rows_of_each_sequence():
    features = torch.randn(6, T, 5)
    shared, own = torch.tensor([1, 4, 2]), torch.randint(T, (6, 3))
    assert torch.equal(rows_at(features, shared), rows_at(features, shared.expand(6, 3)))
    got = rows_at(features, own)
    assert all(torch.equal(got[n, i], features[n, own[n, i]]) for n in range(6) for i in range(3))
    assert torch.equal(at_positions(features, own, 2), got.view(3, 2, 3, 5))


def test_the_reports_attention_is_the_networks():
    """Its maps, applied to the values, give the blocks' outputs: in raster order."""
    model, (labels, codes, _) = network("rotary").eval(), inputs()
    torch.nn.init.normal_(model.target_embeddings.weight, std=0.3)
    maps = list(attention_maps(model, labels, codes[:, :-1]))
    assert len(maps) == 3 and all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps)
    h, rope = model.embed(labels, codes[:, :-1])
    block = model.layers[0]
    x = block.attention_norm(h)
    v = block.attention.wqkv(x).unflatten(-1, (3, -1, 16))[:, :, 2].transpose(1, 2)
    out = block.attention.wo((maps[0] @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, block.attention(x, rope=rope), rtol=1e-4, atol=1e-5)
