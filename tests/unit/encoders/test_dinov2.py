"""DINOv2: every size's file against a float64 reference written with plain operations, and files that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from megastar.encoders.dinov2 import load
from megastar.encoders.vit import MEAN, STD
from megastar.errors import UserError

RELEASED = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24), "vitg14": (1536, 40)}


def random_state(dim=128, blocks=3, registers=0, swiglu=False, grid=5, patch=14, seed=0):
    """Weights with the released names, none of them neutral."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.2):
        return torch.randn(shape, generator=g) * scale

    hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8 if swiglu else 4 * dim
    state = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, 1 + grid * grid, dim),
        "mask_token": draw(1, dim),
        "patch_embed.proj.weight": draw(dim, 3, patch, patch, scale=0.05),
        "patch_embed.proj.bias": draw(dim),
    }
    if registers:
        state["register_tokens"] = draw(1, registers, dim)

    def linear(name, inputs, outputs):
        state[f"{name}.weight"] = draw(outputs, inputs, scale=inputs**-0.5)
        state[f"{name}.bias"] = draw(outputs)

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(dim), draw(dim)

    for i in range(blocks):
        b = f"blocks.{i}"
        norm(f"{b}.norm1")
        linear(f"{b}.attn.qkv", dim, 3 * dim)
        linear(f"{b}.attn.proj", dim, dim)
        state[f"{b}.ls1.gamma"] = draw(dim) + 0.5
        norm(f"{b}.norm2")
        if swiglu:
            linear(f"{b}.mlp.w12", dim, 2 * hidden)
            linear(f"{b}.mlp.w3", hidden, dim)
        else:
            linear(f"{b}.mlp.fc1", dim, hidden)
            linear(f"{b}.mlp.fc2", hidden, dim)
        state[f"{b}.ls2.gamma"] = draw(dim) + 0.5
    norm("norm")
    return state


def cubic(t: float, a: float) -> float:
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resize_matrix(inputs: int, outputs: int, factor: float | None) -> torch.Tensor:
    """(outputs, inputs): ``factor`` None is Pillow's antialiased filter (a = -0.5), else interpolation by that factor."""
    m = torch.zeros(outputs, inputs, dtype=torch.float64)
    for i in range(outputs):
        if factor is not None:  # a = -0.75, borders repeated
            at = (i + 0.5) / factor - 0.5
            for j in range(math.floor(at) - 1, math.floor(at) + 3):
                m[i, min(max(j, 0), inputs - 1)] += cubic(at - j, -0.75)
            continue
        scale = inputs / outputs
        width = max(scale, 1.0)
        for j in range(inputs):
            m[i, j] = cubic((j + 0.5 - (i + 0.5) * scale) / width, -0.5)
        m[i] /= m[i].sum()
    return m


def reference(state, images):
    """The network in float64, written with matrix products only: (class tokens, patches)."""
    s = {k: v.double() for k, v in state.items()}
    D, P = s["cls_token"].shape[-1], s["patch_embed.proj.weight"].shape[-1]
    B, _, height, width = images.shape
    h, w = height // P, width // P
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    x = (images.double() - mean) / std
    x = x.reshape(B, 3, h, P, w, P).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, -1)
    x = x @ s["patch_embed.proj.weight"].reshape(D, -1).T + s["patch_embed.proj.bias"]
    grid = math.isqrt(s["pos_embed"].shape[1] - 1)
    table = s["pos_embed"][0, 1:].reshape(grid, grid, D)
    registers = s["register_tokens"][0] if "register_tokens" in s else None
    if (h, w) != (grid, grid):
        rows, columns = (resize_matrix(grid, n, None if registers is not None else (n + 0.1) / grid) for n in (h, w))
        table = torch.einsum("ia,jb,abd->ijd", rows, columns, table)
    x = x + table.reshape(1, h * w, D)
    first = (s["cls_token"][0] + s["pos_embed"][0, :1]).expand(B, 1, D)
    extra = [] if registers is None else [registers.expand(B, -1, D)]
    x = torch.cat([first, *extra, x], 1)

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(name, x):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    i = 0
    while f"blocks.{i}.norm1.weight" in s:
        b = f"blocks.{i}"
        qkv = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x))
        heads = []
        for n in range(D // 64):
            q, k, v = (qkv[..., part * D + n * 64 : part * D + (n + 1) * 64] for part in range(3))
            logits = q @ k.transpose(1, 2) / 8
            heads.append(torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True)) @ v)
        x = x + s[f"{b}.ls1.gamma"] * linear(f"{b}.attn.proj", torch.cat(heads, -1))
        y = norm(f"{b}.norm2", x)
        if f"{b}.mlp.w12.weight" in s:
            gate, value = linear(f"{b}.mlp.w12", y).chunk(2, -1)
            y = linear(f"{b}.mlp.w3", gate / (1 + torch.exp(-gate)) * value)
        else:
            y = linear(f"{b}.mlp.fc1", y)
            y = linear(f"{b}.mlp.fc2", y * 0.5 * (1 + torch.erf(y / math.sqrt(2))))
        x = x + s[f"{b}.ls2.gamma"] * y
        i += 1
    x = norm("norm", x)
    return x[:, 0], x[:, 1 + (0 if registers is None else len(registers)) :]


def to_hugging_face(state):
    """The same weights with the names of Hugging Face's Dinov2Model."""
    out = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = value.clone()
            continue
        for old, new in (
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
            ("pos_embed", "embeddings.position_embeddings"),
            ("blocks.", "encoder.layer."),
            (".attn.proj.", ".attention.output.dense."),
            (".ls1.gamma", ".layer_scale1.lambda1"),
            (".ls2.gamma", ".layer_scale2.lambda1"),
            (".mlp.w12.", ".mlp.weights_in."),
            (".mlp.w3.", ".mlp.weights_out."),
        ):
            name = name.replace(old, new)
        name = f"embeddings.{name}" if name.endswith("_token") or name == "register_tokens" else name
        out[f"layernorm.{name[5:]}" if name.startswith("norm.") else name] = tensor
    return out


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("grid", [(5, 5), (3, 4), (7, 2)])
def test_equals_a_float64_reference(tmp_path, registers, swiglu, grid):
    state = random_state(registers=registers, swiglu=swiglu)
    torch.save(state, tmp_path / "w.pth")
    net = load(tmp_path / "w.pth")
    images = torch.rand(2, 3, 14 * grid[0], 14 * grid[1], generator=torch.Generator().manual_seed(1))
    cls, patches = net(images)
    wanted_cls, wanted_patches = reference(state, images)
    assert cls.shape == (2, 128) and patches.shape == (2, grid[0] * grid[1], 128)
    assert (cls - wanted_cls).abs().max() < 2e-5 * wanted_cls.abs().max()
    assert (patches - wanted_patches).abs().max() < 2e-5 * wanted_patches.abs().max()


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_hugging_face_names_give_the_same_network(tmp_path, registers, swiglu):
    state = random_state(registers=registers, swiglu=swiglu)
    torch.save(state, tmp_path / "a.pth")
    save_file(to_hugging_face(state), tmp_path / "b.safetensors")
    a, b = load(tmp_path / "a.pth"), load(tmp_path / "b.safetensors")
    assert a.shape == b.shape and a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("size", ["vits14", "vitb14"])
def test_released_sizes_are_named(tmp_path, size):
    dim, blocks = RELEASED[size]
    torch.save(random_state(dim, blocks, grid=37), tmp_path / "w.pth")
    net = load(tmp_path / "w.pth")
    assert net.shape.name == f"dinov2_{size}" and net.shape.grid == 37 and not net.training
    assert not any(p.requires_grad for p in net.parameters()) and not net.train().training


def test_half_precision_files_are_read_in_fp32(tmp_path):
    state = random_state(blocks=1)
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, tmp_path / "w.pth")
    net = load(tmp_path / "w.pth")
    assert all(torch.equal(v, state[k].half().float()) for k, v in net.state_dict().items())


def test_other_image_sizes_are_refused(tmp_path):
    torch.save(random_state(blocks=1), tmp_path / "w.pth")
    with pytest.raises(UserError, match="images of 225 x 224 pixels: dinov2_vit128x1p14 requires multiples of 14"):
        load(tmp_path / "w.pth")(torch.zeros(1, 3, 224, 225))


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


STATE = random_state(blocks=2)
WRONG = {
    "missing": (without(STATE, "blocks.1.ls2.gamma"), "blocks.1.ls2.gamma is missing"),
    "unexpected": (STATE | {"blocks.0.attn.q_norm.weight": torch.zeros(64)}, "q_norm.weight is unexpected"),
    "shape": (STATE | {"norm.weight": torch.zeros(64)}, r"norm.weight is \(64,\), not \(128,\)"),
    "type": (STATE | {"norm.weight": torch.zeros(128, dtype=torch.int64)}, "norm.weight is torch.int64"),
    "no positions": (without(STATE, "pos_embed"), "is not a DINOv2 network, which has pos_embed"),
    "positions": (STATE | {"pos_embed": torch.zeros(1, 12, 128)}, "12 positions"),
    "a gap": ({k.replace("blocks.1", "blocks.7"): v for k, v in STATE.items()}, "not a DINOv2 network"),
    "DINOv3": (STATE | {"rope_embed.periods": torch.zeros(4)}, "is a DINOv3 file"),
    "another network": ({"weight": torch.zeros(3)}, "is not a DINOv2 network"),
    "nothing": ({}, "is not a DINOv2 network"),
    "a number": ({"a": 1}, "contains a, which is not a tensor"),
    "a view": (STATE | {"norm.weight": torch.zeros(1).expand(10**9)}, "is damaged: its tensors have"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_sentence(tmp_path, case):
    state, sentence = WRONG[case]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=sentence) as error:
        load(tmp_path / "w.pth")
    assert "\n" not in str(error.value)


def test_a_missing_and_a_truncated_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist or is not a file"):
        load(tmp_path / "none.pth")
    torch.save(STATE, tmp_path / "w.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match="is truncated or not a torch.save file"):
        load(tmp_path / "half.pth")
