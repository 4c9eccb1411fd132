"""The attention maps of `megastar report` against a brute-force computation in fp64."""

from __future__ import annotations

import base64
import math
import zlib

import numpy as np
import pytest
import torch

from megastar.config.schema import ModelConfig
from megastar.model.masks import MaskSpec, draw_hidden
from megastar.model.rope import rope_table
from megastar.model.transformer import Transformer
from megastar.report.attention import (
    attention_distances,
    attention_maps,
    block_attention,
    masked_attention,
    mean_distances,
    pack_maps,
    shown_blocks,
    uniform_distance,
)

CFG = ModelConfig(
    n_layer=3, n_head=2, dim=16, multiple_of=8, vocab_size=11, num_classes=4, image_tokens=16, initializer_range=0.5
)
T, GRID = 16, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(CFG).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    return torch.tensor([0, 3, 4]), torch.randint(0, 11, (3, T - 1))


def brute_force(model, labels, tokens, seen):
    """Every number of every block by loops: weights (L, B, H, S, S). ``seen(b, i, j)``: query i may see key j."""
    w = {k: v.numpy() for k, v in model.state_dict().items()}
    table = rope_table(GRID, CFG.head_dim, CFG.rope_base, torch.device("cpu"), torch.float64)
    table = torch.view_as_complex(table).numpy()

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + CFG.norm_eps) * scale

    def turned(x, position):  # interleaved pairs are complex numbers
        z = (x[0::2] + 1j * x[1::2]) * table[position]
        return np.stack([z.real, z.imag], -1).reshape(-1)

    out = np.zeros((CFG.n_layer, len(labels), CFG.n_head, T, T))
    for b in range(len(labels)):
        rows = [w["cls_embedding.embedding_table.weight"][labels[b]]]
        rows += [w["tok_embeddings.weight"][t] for t in tokens[b].tolist()]
        for layer in range(CFG.n_layer):
            at = f"layers.{layer}."
            qkv = [w[at + "attention.wqkv.weight"] @ norm(x, w[at + "attention_norm.weight"]) for x in rows]
            after = []
            for i in range(T):
                heads = []
                for h in range(CFG.n_head):
                    part = slice(h * CFG.head_dim, (h + 1) * CFG.head_dim)
                    q = turned(qkv[i][: CFG.dim][part], i)
                    keys = [j for j in range(T) if seen(b, i, j)]
                    logits = [
                        q @ turned(qkv[j][CFG.dim : 2 * CFG.dim][part], j) / math.sqrt(CFG.head_dim) for j in keys
                    ]
                    weights = np.exp(np.array(logits) - max(logits))
                    weights /= weights.sum()
                    out[layer, b, h, i, keys] = weights
                    heads.append(sum(p * qkv[j][2 * CFG.dim :][part] for p, j in zip(weights, keys, strict=True)))
                x = rows[i] + w[at + "attention.wo.weight"] @ np.concatenate(heads)
                y = norm(x, w[at + "ffn_norm.weight"])
                gate = w[at + "feed_forward.w1.weight"] @ y
                inner = gate / (1 + np.exp(-gate)) * (w[at + "feed_forward.w3.weight"] @ y)
                after.append(x + w[at + "feed_forward.w2.weight"] @ inner)
            rows = after
    return out


def test_maps_equal_brute_force(model, batch):
    labels, tokens = batch
    hidden = draw_hidden(0, [0, 0, 0], [1, 2, 3], T, 0.25)
    for mask, seen in (
        (None, lambda b, i, j: j <= i),
        (MaskSpec.hidden(hidden), lambda b, i, j: j <= i and (i == j or not hidden[b, j])),
    ):
        maps = torch.stack(list(attention_maps(model, labels, tokens, mask)))
        assert maps.dtype == torch.float64 and maps.shape == (3, 3, 2, T, T)
        np.testing.assert_allclose(maps.numpy(), brute_force(model, labels, tokens, seen), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(maps.sum(-1), torch.ones(3, 3, 2, T, dtype=torch.float64))


def test_maps_follow_from_the_features_of_the_model(model, batch):
    """The last block's map follows from the model's own features."""
    labels, tokens = batch
    before = model(labels, tokens, features_at=2).features
    rope = rope_table(GRID, CFG.head_dim, CFG.rope_base, torch.device("cpu"), torch.float64)[:T]
    expected = block_attention(model.layers[2], before, rope, MaskSpec.causal())
    torch.testing.assert_close(list(attention_maps(model, labels, tokens))[2], expected)


def test_distances_equal_brute_force(model, batch):
    labels, tokens = batch
    for weights in attention_maps(model, labels, tokens):
        found = mean_distances(weights, GRID)
        w = weights.numpy()
        for h in range(CFG.n_head):
            distances = []
            for b in range(3):
                for i in range(1, T):
                    rest = w[b, h, i, 1:].sum()
                    places = [(divmod(i - 1, GRID), divmod(j - 1, GRID)) for j in range(1, T)]
                    distances.append(
                        sum(p * math.dist(*pair) for p, pair in zip(w[b, h, i, 1:], places, strict=True)) / rest
                    )
            assert float(found[h]) == pytest.approx(np.mean(distances))


def test_distances_of_known_maps():
    own = torch.eye(T)[None, None]
    assert mean_distances(own, GRID).tolist() == [0.0]
    before = torch.zeros(1, 1, T, T)  # each token looks at the one above it, those of the first row at themselves
    for i in range(T):
        before[0, 0, i, i - GRID if i > GRID else i] = 1
    assert mean_distances(before, GRID).tolist() == [pytest.approx((T - 1 - GRID) / (T - 1))]
    mixed = 0.5 * before
    mixed[..., 0] += 0.5  # half of it on the class, which has no position
    assert mean_distances(mixed, GRID).tolist() == [pytest.approx((T - 1 - GRID) / (T - 1))]
    pairs = [
        np.mean([math.dist(divmod(i, GRID), divmod(j, GRID)) for j in range(i + 1)]) for i in range(T - 1)
    ]  # the class aside, a query sees itself and what was before
    assert uniform_distance(GRID, T) == pytest.approx(np.mean(pairs))


def test_distances_do_not_depend_on_the_batch_size(model, batch):
    expected = torch.stack([mean_distances(weights, GRID) for weights in attention_maps(model, *batch)])
    assert expected.shape == (3, 2)
    for size in (1, 2, 3):
        torch.testing.assert_close(attention_distances(model, *batch, batch=size), expected)


def test_packed_maps(model, batch):
    labels, tokens = batch
    hidden = draw_hidden(0, [0], [1], T, 0.25)[0]
    found = masked_attention(model, int(labels[1]), tokens[1], hidden, 2, 2)
    assert found["blocks"] == [2, 3]
    assert found["hidden"] == hidden.nonzero().flatten().tolist() and (found["size"], found["grid"]) == (T, GRID)
    for name, mask in (("plain", None), ("masked", MaskSpec.hidden(hidden[None]))):
        raw = np.frombuffer(zlib.decompress(base64.b64decode(found[name])), np.uint8).reshape(2, T, T)
        maps = list(attention_maps(model, labels[1:2], tokens[1:2], mask))
        expected = np.stack([maps[b - 1][0].mean(0).numpy() for b in found["blocks"]])
        np.testing.assert_allclose((raw / 255.0) ** 2, expected, atol=2 / 255)
    masked = np.frombuffer(zlib.decompress(base64.b64decode(found["masked"])), np.uint8).reshape(2, T, T)
    for j in found["hidden"]:
        assert not masked[:, j + 1 :, j].any() and masked[:, j, j].all()
    assert len(pack_maps([torch.zeros(T, T)])) > 0


def test_shown_blocks():
    assert shown_blocks(6, 6, 3) == [1, 2, 3, 4, 5, 6] and shown_blocks(36, 4, 18) == [1, 18, 24, 36]
    for count, most, always in ((36, 5, 18), (12, 2, 6), (48, 7, 48), (24, 3, 1)):
        blocks = shown_blocks(count, most, always)
        assert (
            always in blocks
            and len(blocks) <= most
            and blocks == sorted(set(blocks))
            and set(blocks) <= set(range(1, count + 1))
        )
