"""DINOv3: every kind of file against a float64 reference written with plain operations, and files that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from megastar.encoders import dinov2
from megastar.encoders.dinov3 import SIZES, load
from megastar.encoders.vit import MEAN, STD
from megastar.errors import UserError
from tests.unit.encoders.test_dinov2 import random_state as dinov2_state
from tests.unit.encoders.test_dinov2 import to_hugging_face as dinov2_to_hugging_face
from tests.unit.encoders.test_dinov2 import without


def random_state(dim=128, blocks=3, registers=4, swiglu=False, head_dim=64, bias=True, seed=0):
    """Weights with the released names, none of them neutral."""
    state = dinov2_state(dim, blocks, registers, swiglu, patch=16, seed=seed)
    del state["pos_embed"]
    if registers:
        state["storage_tokens"] = state.pop("register_tokens")
    state["rope_embed.periods"] = 100.0 ** (torch.arange(head_dim // 4) / (head_dim / 4))
    for i in range(blocks):
        b = f"blocks.{i}"
        if bias:
            state[f"{b}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim)
        else:
            del state[f"{b}.attn.qkv.bias"]
        for kind in ("weight", "bias") if swiglu else ():
            both = state.pop(f"{b}.mlp.w12.{kind}")
            state[f"{b}.mlp.w1.{kind}"], state[f"{b}.mlp.w2.{kind}"] = (v.clone() for v in both.chunk(2))
    return state


def reference(state, images):
    """The network in float64, with pairs of a head's elements as complex numbers: (class tokens, patches)."""
    s = {k: v.double() for k, v in state.items()}
    D, P = s["cls_token"].shape[-1], s["patch_embed.proj.weight"].shape[-1]
    B, _, height, width = images.shape
    h, w = height // P, width // P
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    x = ((images.double() - mean) / std).reshape(B, 3, h, P, w, P).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, -1)
    x = x @ s["patch_embed.proj.weight"].reshape(D, -1).T + s["patch_embed.proj.bias"]
    registers = s["storage_tokens"][0] if "storage_tokens" in s else torch.zeros(0, D, dtype=torch.float64)
    R = len(registers)
    x = torch.cat([s["cls_token"][0].expand(B, 1, D), registers.expand(B, R, D), x], 1)
    quarter = len(s["rope_embed.periods"])
    turns = torch.ones(1 + R + h * w, 2 * quarter, dtype=torch.complex128)
    for row in range(h):
        for column in range(w):
            y, z = 2 * (row + 0.5) / h - 1, 2 * (column + 0.5) / w - 1
            for i, period in enumerate(s["rope_embed.periods"].tolist()):
                for offset, at in ((0, y), (quarter, z)):
                    angle = torch.tensor(2 * math.pi * at / period, dtype=torch.float64)
                    turns[1 + R + row * w + column, offset + i] = torch.polar(torch.ones_like(angle), angle)

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(name, x):
        return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0.0)

    def turned(x):
        pairs = torch.complex(x[..., : 2 * quarter].contiguous(), x[..., 2 * quarter :].contiguous()) * turns
        return torch.cat([pairs.real, pairs.imag], -1)

    for i in range(sum(k.endswith("norm1.weight") for k in s)):
        b = f"blocks.{i}"
        if f"{b}.attn.qkv.bias" in s:
            s[f"{b}.attn.qkv.bias"][D : 2 * D] = 0
        qkv, heads, W = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x)), [], 4 * quarter
        for n in range(D // W):
            q, k, v = (qkv[..., part * D + n * W : part * D + (n + 1) * W] for part in range(3))
            logits = turned(q) @ turned(k).transpose(1, 2) / math.sqrt(W)
            heads.append(torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True)) @ v)
        x = x + s[f"{b}.ls1.gamma"] * linear(f"{b}.attn.proj", torch.cat(heads, -1))
        y = norm(f"{b}.norm2", x)
        if f"{b}.mlp.w1.weight" in s:
            gate = linear(f"{b}.mlp.w1", y)
            y = linear(f"{b}.mlp.w3", gate / (1 + torch.exp(-gate)) * linear(f"{b}.mlp.w2", y))
        else:
            y = linear(f"{b}.mlp.fc1", y)
            y = linear(f"{b}.mlp.fc2", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))
        x = x + s[f"{b}.ls2.gamma"] * y
    x = norm("norm", x)
    return x[:, 0], x[:, 1 + R :]


def to_hugging_face(state, prefix=""):
    """The same weights with the names of the files of Hugging Face's DINOv3ViTModel, which have no biases of keys."""
    out = {}
    gated = any(".mlp.w1." in k for k in state)
    for name, tensor in state.items():
        if name.endswith("bias_mask") or name == "rope_embed.periods":
            continue
        if ".attn.qkv." in name:
            block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                if (part, kind) != ("k", "bias"):
                    out[f"{prefix}layer.{block}.attention.{part}_proj.{kind}"] = value.clone()
            continue
        for old, new in (
            ("patch_embed.proj.", "embeddings.patch_embeddings."),
            ("blocks.", f"{prefix}layer."),
            (".attn.proj.", ".attention.o_proj."),
            (".ls1.gamma", ".layer_scale1.lambda1"),
            (".ls2.gamma", ".layer_scale2.lambda1"),
            (".mlp.w1.", ".mlp.gate_proj."),
            (".mlp.w2.", ".mlp.up_proj."),
            (".mlp.w3.", ".mlp.down_proj."),
            (".mlp.fc1.", ".mlp.up_proj."),
            (".mlp.fc2.", ".mlp.down_proj."),
        ):
            name = name.replace(old, new)
        name = {"cls_token": "embeddings.cls_token", "storage_tokens": "embeddings.register_tokens"}.get(name, name)
        out["embeddings.mask_token" if name == "mask_token" else name] = tensor
    assert gated == any("gate_proj" in k for k in out)
    return out


@pytest.mark.parametrize("options", [{}, {"swiglu": True}, {"registers": 0}, {"bias": False}, {"head_dim": 32}])
@pytest.mark.parametrize("grid", [(3, 4), (5, 2)])
def test_equals_a_float64_reference(tmp_path, options, grid):
    state = random_state(**options)
    torch.save(state, tmp_path / "w.pth")
    net = load(tmp_path / "w.pth")
    images = torch.rand(2, 3, 16 * grid[0], 16 * grid[1], generator=torch.Generator().manual_seed(1))
    cls, patches = net(images)
    wanted_cls, wanted_patches = reference(state, images)
    assert cls.shape == (2, 128) and patches.shape == (2, grid[0] * grid[1], 128)
    assert (cls - wanted_cls).abs().max() < 2e-5 * wanted_cls.abs().max()
    assert (patches - wanted_patches).abs().max() < 2e-5 * wanted_patches.abs().max()


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("options", [{}, {"swiglu": True}, {"bias": False}])
def test_hugging_face_names_give_the_same_network(tmp_path, options, prefix):
    state = random_state(**options)
    torch.save(state, tmp_path / "a.pth")
    save_file(to_hugging_face(state, prefix), tmp_path / "b.safetensors")
    a, b = load(tmp_path / "a.pth"), load(tmp_path / "b.safetensors")
    assert a.shape == b.shape and a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():  # powers may differ in the last bit
        same = torch.allclose if name == "rope_embed.periods" else torch.equal
        assert same(tensor, b.state_dict()[name]), name
    images = torch.rand(1, 3, 48, 48)
    assert torch.allclose(a(images)[1], b(images)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [384, 768])
def test_released_sizes_are_named(tmp_path, width):
    for swiglu in (False, True):
        torch.save(random_state(width, 1, swiglu=swiglu), tmp_path / "w.pth")
        net = load(tmp_path / "w.pth")
        assert net.shape.name == f"dinov3_{SIZES.get((width, swiglu), 'vit768x1p16')}"
        assert not any(p.requires_grad for p in net.parameters()) and not net.train().training


def test_the_heads_of_the_widest_network_are_128_wide(tmp_path):
    """Hugging Face's files hold no periods, from which a head's width follows."""
    state = random_state(4096, 1, swiglu=True, head_dim=128, bias=False)
    for name in [k for k in state if ".mlp." in k]:  # of a narrow feed-forward, for a small file
        rows = state[name][:64] if ".w3." not in name else state[name][..., :64]
        state[name] = rows.clone() if state[name].ndim == 2 or ".w3." not in name else state[name]
    save_file(to_hugging_face(state), tmp_path / "w.safetensors")
    shape = load(tmp_path / "w.safetensors").shape
    assert (shape.head_dim, shape.qkv_bias, shape.name) == (128, False, "dinov3_vit7b16")


def test_the_norm_of_small_crops_is_ignored(tmp_path):
    state = random_state(blocks=1)
    extra = {"local_cls_norm.weight": torch.ones(128), "local_cls_norm.bias": torch.zeros(128)}
    torch.save(state | extra, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "a.pth")(images)[1], load(tmp_path / "b.pth")(images)[1])


def test_other_image_sizes_are_refused(tmp_path):
    torch.save(random_state(blocks=1), tmp_path / "w.pth")
    with pytest.raises(UserError, match="images of 225 x 224 pixels: dinov3_vit128x1p16 requires multiples of 16"):
        load(tmp_path / "w.pth")(torch.zeros(1, 3, 224, 225))


STATE = random_state(blocks=2)
MASK = "blocks.1.attn.qkv.bias_mask"
FACE = to_hugging_face(STATE)
CONVNEXT = {"downsample_layers.0.0.weight": torch.zeros(8, 3, 4, 4), "norm.weight": torch.zeros(8)}
WRONG = {
    "missing": (without(STATE, "blocks.1.ls2.gamma"), "blocks.1.ls2.gamma is missing"),
    "unexpected": (STATE | {"cls_norm.weight": torch.zeros(128)}, "cls_norm.weight is unexpected"),
    "shape": (STATE | {"norm.weight": torch.zeros(64)}, r"norm.weight is \(64,\), not \(128,\)"),
    "type": (STATE | {"norm.weight": torch.zeros(128, dtype=torch.int64)}, "norm.weight is torch.int64"),
    "sparse": (STATE | {"norm.weight": torch.ones(128).to_sparse()}, "norm.weight is torch.sparse_coo"),
    "no periods": (without(STATE, "rope_embed.periods"), "is not a DINOv3 network, which has rope_embed.periods"),
    "negative periods": (STATE | {"rope_embed.periods": -torch.ones(16)}, "periods must be positive numbers"),
    "complex periods": (STATE | {"rope_embed.periods": torch.ones(16) * 1j}, "periods must be positive numbers"),
    "other heads": (STATE | {"rope_embed.periods": torch.ones(20)}, "not a DINOv3 network: width 128, heads of 80"),
    "mask": (STATE | {MASK: torch.full((384,), math.nan)}, f"{MASK} is not a mask of zeros and ones"),
    "short mask": (STATE | {MASK: torch.ones(3)}, f"{MASK} is not a mask of zeros and ones"),
    "a gap": ({k.replace("blocks.1", "blocks.7"): v for k, v in STATE.items()}, "not a DINOv3 network"),
    "a bias of some blocks": (without(without(STATE, MASK), "blocks.1.attn.qkv.bias"), "attn.qkv.bias is missing"),
    "DINOv2": (dinov2_state(blocks=1), r"has position embeddings, as DINOv2 \(--features dinov2\)"),
    "Hugging Face's DINOv2": (dinov2_to_hugging_face(dinov2_state(blocks=1)), "has position embeddings"),
    "ConvNeXt": (CONVNEXT, "is a ConvNeXt, which has no patch tokens"),
    "Hugging Face's ConvNeXt": ({"stages.0.layers.0.gamma": torch.zeros(8)}, "is a ConvNeXt"),
    "another of Hugging Face": (without(FACE, "layer.1.attention.k_proj.weight"), "attn.qkv.weight is missing"),
    "no class token": (without(FACE, "embeddings.cls_token"), "which has cls_token"),
    "another network": ({"weight": torch.zeros(3)}, "is not a DINOv3 network"),
    "nothing": ({}, "is not a DINOv3 network"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_sentence(tmp_path, case):
    state, sentence = WRONG[case]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=sentence) as error:
        load(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [STATE, FACE], ids=["released", "Hugging Face"])
def test_dinov2_refuses_dinov3(tmp_path, names):
    torch.save(names, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"is a DINOv3 file, which has rotary positions: use .* --features dinov3"):
        dinov2.load(tmp_path / "w.pth")
