"""The transformer against LlamaGen's layout, a slow forward pass of its own, and its contracts."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml

from megastar.config.schema import ModelConfig
from megastar.model.kernels import attention
from megastar.model.layers import Dropout, RMSNorm
from megastar.model.masks import MaskSpec
from megastar.model.projector import Projector
from megastar.model.rope import rope_table
from megastar.model.transformer import Transformer
from megastar.objectives.next_token import next_token_loss
from tests.unit.model.test_rope import turned

CONFIGS = Path(__file__).parents[3] / "configs" / "model"
TINY = ModelConfig(n_layer=3, n_head=2, dim=16, multiple_of=8, vocab_size=11, num_classes=5, image_tokens=9)

# LlamaGen's Transformer, class-conditional (autoregressive/models/gpt.py): D width, F SwiGLU width, V codes, C classes.
LLAMAGEN = {
    "cls_embedding.embedding_table.weight": "C+1 D",
    "tok_embeddings.weight": "V D",
    "norm.weight": "D",
    "output.weight": "V D",
}
LLAMAGEN_BLOCK = {
    "attention.wqkv.weight": "3D D",
    "attention.wo.weight": "D D",
    "feed_forward.w1.weight": "F D",
    "feed_forward.w3.weight": "F D",
    "feed_forward.w2.weight": "D F",
    "attention_norm.weight": "D",
    "ffn_norm.weight": "D",
}


def build(cfg: ModelConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64, head: bool = True) -> Transformer:
    """In eval mode; with ``head`` the weights are drawn large, the zero head too, so that outputs say something."""
    torch.manual_seed(seed)
    model = Transformer(cfg).to(dtype).eval()
    if head:
        for name, p in model.named_parameters():
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


def batch(cfg: ModelConfig = TINY, n: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, cfg.num_classes + 1, (n,), generator=g)
    return labels, torch.randint(0, cfg.vocab_size, (n, cfg.image_tokens), generator=g)


@pytest.mark.parametrize(
    ("name", "millions", "ffn"),
    [("b", 110.9, 2048), ("l", 342.9, 2816), ("xl", 774.7, 3584), ("xxl", 1411.0, 4096), ("3b", 3096.7, 8704)],
)
def test_published_sizes(name: str, millions: float, ffn: int) -> None:
    cfg = ModelConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    assert cfg.ffn_dim == ffn and cfg.name == name
    with torch.device("meta"):
        model = Transformer(cfg)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_weight_names_and_shapes_are_llamagens() -> None:
    sizes = {"D": 16, "3D": 48, "F": TINY.ffn_dim, "V": 11, "C+1": 6}
    names = LLAMAGEN | {f"layers.{n}.{k}": v for n in range(3) for k, v in LLAMAGEN_BLOCK.items()}
    want = {name: tuple(sizes[s] for s in shape.split()) for name, shape in names.items()}
    model = build()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == want
    assert set(model.state_dict()) == set(want)  # no buffer: the RoPE table is not saved


def slow_forward(model: Transformer, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """One sequence, one head, one query at a time, from the weights alone: -> logits (B, S, V)."""
    w, cfg = {k: v.double() for k, v in model.state_dict().items()}, model.cfg
    d, out = cfg.head_dim, []

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * scale

    for label, row in zip(labels.tolist(), tokens, strict=True):
        h = torch.stack([w["cls_embedding.embedding_table.weight"][label], *w["tok_embeddings.weight"][row]])
        for n in range(cfg.n_layer):
            p = {k: w[f"layers.{n}.{k}"] for k in LLAMAGEN_BLOCK}
            q, k, v = (norm(h, p["attention_norm.weight"]) @ p["attention.wqkv.weight"].T).split(cfg.dim, -1)
            heads = []
            for i in range(cfg.n_head):
                own = slice(i * d, (i + 1) * d)
                qi, ki = (turned(t[:, own], cfg.grid, cfg.rope_base) for t in (q, k))
                mixed = [torch.softmax(ki[: s + 1] @ qi[s] / d**0.5, 0) @ v[: s + 1, own] for s in range(len(h))]
                heads.append(torch.stack(mixed))
            h = h + torch.cat(heads, -1) @ p["attention.wo.weight"].T
            x = norm(h, p["ffn_norm.weight"])
            gate = x @ p["feed_forward.w1.weight"].T
            gate = gate * torch.sigmoid(gate) * (x @ p["feed_forward.w3.weight"].T)
            h = h + gate @ p["feed_forward.w2.weight"].T
        out.append(norm(h, w["norm.weight"]) @ w["output.weight"].T)
    return torch.stack(out)


def test_forward_matches_the_slow_one() -> None:
    model = build()
    labels, tokens = batch()
    want = slow_forward(model, labels, tokens[:, :-1])
    torch.testing.assert_close(model(labels, tokens[:, :-1]).logits, want)
    got = copy.deepcopy(model).float()(labels, tokens[:, :-1]).logits
    torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_stay_close() -> None:
    model = build()
    labels, tokens = batch()
    want = model(labels, tokens[:, :-1]).logits
    got = copy.deepcopy(model).bfloat16()(labels, tokens[:, :-1]).logits
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 0.05


def test_outputs_depend_on_earlier_inputs_only() -> None:
    model = build()
    labels, tokens = batch()
    base = model(labels, tokens[:, :-1]).logits
    for t in range(8):
        other = tokens[:, :-1].clone()
        other[:, t] = (other[:, t] + 1) % TINY.vocab_size
        changed = (model(labels, other).logits - base).abs().amax((0, 2)) > 1e-9  # (S,)
        assert changed.tolist() == [s >= t + 1 for s in range(9)]  # token t is input t + 1
    changed = (model((labels + 1) % 6, tokens[:, :-1]).logits - base).abs().amax((0, 2)) > 1e-9
    assert changed.all()  # everyone sees the class


def test_a_hidden_key_reaches_its_own_position_only() -> None:
    model = build()
    labels, tokens = batch()
    hidden = torch.zeros(4, 9, dtype=torch.bool)
    hidden[:, [3, 6]] = True
    base = model(labels, tokens[:, :-1], MaskSpec.hidden(hidden)).logits
    other = tokens[:, :-1].clone()
    other[:, 2] = (other[:, 2] + 1) % TINY.vocab_size  # the token at position 3
    changed = (model(labels, other, MaskSpec.hidden(hidden)).logits - base).abs().amax((0, 2)) > 1e-9
    assert changed.tolist() == [s == 3 for s in range(9)]
    plain = model(labels, tokens[:, :-1]).logits
    assert torch.equal(model(labels, tokens[:, :-1], MaskSpec()).logits, plain)
    differs = (base - plain).abs().amax((0, 2)) > 1e-9
    assert differs.tolist() == [s > 3 for s in range(9)]


def test_class_position_is_weighed_as_a_zero_logit() -> None:
    """Its key and query vanish, so position 0 sees itself alone and position 1 weighs both by softmax(0, q.k)."""
    model = build()
    attention = model.layers[0].attention
    seen = {}
    hook = attention.wo.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    x = torch.randn(1, 2, 16, dtype=torch.float64)
    attention(x, rope=rope_table(3, 8, 10000.0, x.device, torch.float64)[:2])
    hook.remove()
    q, k, v = attention.wqkv(x)[0].view(2, 3, 2, 8).unbind(1)  # (S, H, d) each; token (0, 0) is not turned
    weight = torch.sigmoid((q[1] * k[1]).sum(-1) / 8**0.5)  # (H,)
    torch.testing.assert_close(seen["mixed"][0, 0], v[0].flatten())
    torch.testing.assert_close(seen["mixed"][0, 1], (weight[:, None] * v[1] + (1 - weight[:, None]) * v[0]).flatten())


def test_features_and_early_stop() -> None:
    model = build()
    labels, tokens = batch()
    whole = model(labels, tokens[:, :-1], features_at=2)
    assert whole.features.shape == whole.last.shape == (4, 9, 16)
    early = model(labels, tokens[:, :-1], features_at=2, last_block=2)
    assert early.logits is None
    torch.testing.assert_close(early.features, whole.features)
    assert early.last is early.features
    torch.testing.assert_close(model.output(model.norm(whole.last)), whole.logits)  # last is before the final norm
    silent = model(labels, tokens[:, :-1], need_logits=False)
    assert silent.logits is None and silent.features is None and torch.equal(silent.last, whole.last)
    assert model(labels, tokens[:, :-1], last_block=3).logits is not None


def test_zero_head_gives_ln_v_and_initial_spread() -> None:
    cfg = ModelConfig(n_layer=2, n_head=4, dim=64, multiple_of=8, vocab_size=300, num_classes=50, image_tokens=16)
    model = build(cfg, dtype=torch.float32, head=False)
    labels, tokens = batch(cfg)
    loss, _ = next_token_loss(model(labels, tokens[:, :-1]).logits, tokens)
    assert loss.item() == pytest.approx(math.log(300), abs=1e-6)
    for name, p in model.named_parameters():
        if name == "output.weight":
            assert p.abs().max() == 0
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert abs(p.std().item() / 0.02 - 1) < 0.05 and abs(p.mean().item()) < 0.002, name


def test_initial_weights_are_a_function_of_the_seed() -> None:
    states = [build(seed=s, head=False).state_dict() for s in (3, 3, 4)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["tok_embeddings.weight"], states[2]["tok_embeddings.weight"])


class SimpleCache:
    """Keeps everything in lists."""

    def __init__(self, n_layer: int):
        self.kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(n_layer)]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
        kept = self.kept[layer]
        assert sum(old.shape[2] for old, _ in kept) == start
        kept.append((k, v))
        return attention(q, torch.cat([a for a, _ in kept], 2), torch.cat([b for _, b in kept], 2))


def test_with_targets_the_loss_comes_in_place_of_the_logits() -> None:
    model = build()
    labels, tokens = batch()
    want = next_token_loss(model(labels, tokens[:, :-1]).logits, tokens)[0]
    out = model(labels, tokens[:, :-1], targets=tokens)
    assert out.logits is None and out.loss.dtype == torch.float64
    torch.testing.assert_close(out.loss, want)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (want, out.loss)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a)
    assert model(labels, tokens[:, :-1], targets=tokens, last_block=2).loss is None


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3], [9]])
def test_cached_decoding_equals_the_whole_forward(chunks: list[int]) -> None:
    model = build()
    labels, tokens = batch()
    want = model(labels, tokens[:, :-1]).logits
    cache, got, start = SimpleCache(3), [], 0
    for size in chunks:
        new = tokens[:, max(0, start - 1) : start + size - 1]
        got.append(model(labels if start == 0 else None, new, cache=cache, start=start).logits)
        start += size
    torch.testing.assert_close(torch.cat(got, 1), want)
    torch.testing.assert_close(model(labels).logits, want[:, :1])  # the class alone


def test_checkpointing_is_exact_with_dropout_on() -> None:
    model = build(dtype=torch.float32).train()
    labels, tokens = batch()
    mask = MaskSpec.hidden(torch.arange(9).expand(4, 9) % 4 == 1)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(7)
        model.zero_grad()
        out = model(labels, tokens[:, :-1], mask, features_at=2, checkpointing=checkpointing)
        (next_token_loss(out.logits, tokens)[0] + out.features.square().mean()).backward()
        results.append([out.logits.detach().clone(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Dropout(0.1)
    x = torch.ones(333, 301, dtype=dtype, requires_grad=True)  # an odd count of elements
    y = layer(x)
    assert y.dtype == dtype
    rate = (y == 0).double().mean().item()
    assert abs(rate - 0.1) < 5 * (0.09 / x.numel()) ** 0.5
    assert y.max().item() == pytest.approx(1 / 0.9, rel=5e-3 if dtype == torch.bfloat16 else 1e-4)
    assert not torch.equal(layer(x), y)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the same elements, the same scale
    rows, columns = (y == 0).double().mean(1), (y == 0).double().mean(0)
    assert rows.max() < 0.2 and columns.max() < 0.2  # no pattern along either side
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_rms_norm() -> None:
    layer = RMSNorm(6, 1e-5)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(4, 6) * 3
    want = torch.stack([row / (sum(v * v for v in row) / 6 + 1e-5) ** 0.5 for row in x]) * layer.weight
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(torch.nn.functional.rms_norm(x, (6,), layer.weight, layer.eps), want)  # what a GPU runs
    half = layer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(half.float(), want, rtol=2e-2, atol=2e-2)
    assert half.dtype == torch.bfloat16


def test_projector() -> None:
    projector = Projector(8, 32)
    assert [tuple(p.shape) for p in projector.parameters()] == [(32, 8), (32,), (32, 32), (32,), (8, 32), (8,)]
    assert projector(torch.randn(2, 1, 4, 8)).shape == (2, 1, 4, 8)
