"""The memory of a rank against real modules, what autograd saves and tracked peaks."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megastar.config.load import load_config
from megastar.config.schema import ModelConfig, ParallelConfig, RunConfig, SelfGuidedConfig, TrainConfig
from megastar.engine.student import Student
from megastar.errors import UserError
from megastar.model.masks import MaskSpec
from megastar.model.transformer import Transformer
from megastar.objectives.self_guided import at_positions, draw_positions, total
from megastar.parallel import budget
from megastar.parallel.plan import split_of

ROOT = Path(__file__).resolve().parents[3]
RUNS = {
    "nano": "demo",
    "b": "star_b_50ep",
    "l": "star_l_50ep",
    "xl": "star_xl_50ep",
    "xxl": "star_xxl",
    "3b": "star_3b",
}
PAPER = {"b": 110.9, "l": 342.9, "xl": 774.7, "xxl": 1411.0, "3b": 3096.7}  # M parameters
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def run_of(size: str, *overrides: str) -> RunConfig:
    return load_config(f"configs/run/{RUNS[size]}.yaml", overrides)


def tiny(**model) -> RunConfig:
    """Small, without dropout, which the CPU's own draws would make larger."""
    known = {"n_layer": 3, "n_head": 4, "dim": 128, "multiple_of": 64, "vocab_size": 512, "image_tokens": 64}
    dropouts = dict.fromkeys(("token_dropout_p", "resid_dropout_p", "ffn_dropout_p"), 0.0)
    cfg = RunConfig(model=ModelConfig(**{**known, **dropouts, **model}), train=TrainConfig(global_batch=8))
    cfg.self_guided = SelfGuidedConfig(contrastive_block=2, projector_dim=64)
    return cfg


def zeros(file: str) -> budget.Zero:
    path = f"configs/ds/{file}.json"
    return budget.Zero.read(json.loads(Path(path).read_text()), path)


class _RMSNorm(torch.autograd.Function):
    """Saves what the kernel on a GPU does: input and 1 / rms."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, g):
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        inner = (g * weight).float()
        dx = scale * (inner - normal * (inner * normal).mean(-1, keepdim=True))
        return dx.to(x.dtype), (g.float() * normal).flatten(0, -2).sum(0).to(x.dtype), None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Fused attention, where on a CPU the model takes matrix products in bf16, and the fused norm."""

    def attend(q, k, v, form):
        bias = form[0]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)

    monkeypatch.setattr("megastar.model.kernels.sdpa.attend", attend)
    monkeypatch.setattr("megastar.model.kernels.sdpa._by_products", lambda q, keys: False)
    monkeypatch.setattr("megastar.model.layers.RMSNorm.forward", lambda n, x: _RMSNorm.apply(x, n.weight, n.eps))


# Shapes and states -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", RUNS)
def test_shapes_are_the_modules(size):
    cfg = run_of(size)
    with torch.device("meta"):
        real = {name: tuple(p.shape) for name, p in Student(cfg).named_parameters()}
    assert budget.parameter_shapes(cfg.model, cfg.self_guided) == real
    assert list(budget.parameter_shapes(cfg.model, cfg.self_guided)) == list(real)
    count = budget.trunk(budget.elements(cfg.model, cfg.self_guided))
    assert size not in PAPER or round(count / 1e6, 1) == PAPER[size]


@pytest.mark.parametrize("field", [{"enabled": False}, {"beta": 0.0}, {"step_loss": False, "view_loss": False}])
def test_no_projector_without_contrastive_losses(field):
    cfg = tiny()
    cfg.self_guided = dataclasses.replace(cfg.self_guided, **field)
    names = [n for n, _ in Student(cfg).named_parameters()]
    assert list(budget.parameter_shapes(cfg.model, cfg.self_guided)) == names
    assert not any(n.startswith("projector") for n in names)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_a_tensor_rank_holds_its_parts(tensor):
    cfg = run_of("nano")
    shapes = budget.parameter_shapes(cfg.model, cfg.self_guided)
    counts = budget.elements(cfg.model, cfg.self_guided, tensor)
    for name, shape in shapes.items():
        split = split_of(name)
        part = split.cut(torch.empty(shape, device="meta"), tensor, 0) if split else torch.empty(shape, device="meta")
        assert counts[name] == part.numel()
    halved = sum(n for name, n in counts.items() if ".layers." in name and "norm" not in name) * tensor
    assert halved == 6 * (4 * 256 * 256 + 3 * 256 * 768)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("data", [1, 4, 7])
def test_states_by_brute_force(tensor, data):
    cfg = tiny()
    counts = budget.elements(cfg.model, cfg.self_guided, tensor)
    all_of_it, theirs = sum(counts.values()), sum(n for k, n in counts.items() if k.startswith("transformer"))
    pad = len(counts)  # elements of padding a rank, at most
    for dtype, e in (("bf16", 2), ("fp32", 4)):
        for stage in (1, 2, 3):
            got, _ = budget.state_bytes(cfg.model, cfg.self_guided, stage, tensor, data, dtype)
            weights, gradients = (data if stage == 3 else 1), (data if stage >= 2 else 1)
            expected = {
                "weights": e * all_of_it / weights,
                "gradients": e * all_of_it / gradients,
                "optimizer": (8 if e == 4 and (stage == 1 or stage == 2 and data == 1) else 12)
                * all_of_it
                / data,  # own masters
                "ema": 4 * all_of_it / data,
                "teacher": e * theirs / weights,
            }
            assert got.keys() == expected.keys()
            assert all(0 <= got[k] - expected[k] <= 12 * pad for k in got), (stage, dtype)
    none, _ = budget.state_bytes(cfg.model, cfg.self_guided, 0, tensor, data, "fp32")
    assert sum(none.values()) == all_of_it * (4 + 4 + 8 + 4) + 4 * theirs
    cfg.self_guided = dataclasses.replace(cfg.self_guided, enabled=False)
    assert budget.state_bytes(cfg.model, cfg.self_guided, 1, tensor, data)[0]["teacher"] == 0


def test_offload_moves_states_to_the_host():
    cfg = run_of("l")
    sections = cfg.model, cfg.self_guided
    plain, host = budget.state_bytes(*sections, 3, 2, 4)
    assert host == 0
    results = [budget.state_bytes(*sections, 3, 2, 4, offload=o) for o in (("optimizer",), ("optimizer", "param"))]
    assert results[0][0] == plain | {"gradients": 0, "optimizer": 0, "ema": 0} and set(results[1][0].values()) == {0}
    for device, host in results:
        assert host + sum(device.values()) == sum(plain.values()) + plain["ema"]  # ema and fp32 gradient: 4 bytes each


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"stage": 3, "tensor": 3}, "tensor parallel degree 3: must divide 4 heads, .* use 1, 2 or 4"),
        ({"stage": 4}, "ZeRO stage 4: must be 0, 1, 2 or 3"),
        ({"stage": 1, "dtype": "fp8"}, "dtype 'fp8': must be bf16 or fp32"),
        ({"stage": 0}, "ZeRO stage 0 with dtype bf16 loses precision"),
        ({"stage": 2, "offload": ("param",)}, "offload of param with ZeRO stage 2: use stage 3"),
    ],
)
def test_invalid_states_are_rejected(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        budget.state_bytes(tiny().model, tiny().self_guided, **arguments)


# Activations -------------------------------------------------------------------------------------------------------
def saved_bytes(net: nn.Module, cfg: ModelConfig, sequences: int) -> int:
    """Distinct storages that autograd saves in a forward pass; weights and the complex RoPE table left out."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen, alive = {}, []

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights and not t.is_complex():
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    labels = torch.zeros(sequences, dtype=torch.int64)
    tokens = torch.zeros(sequences, cfg.image_tokens - 1, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(labels, tokens)
    return sum(seen.values())


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_activations_are_what_autograd_saves(dtype, tensor, as_on_a_gpu):
    m, N = tiny().model, 3
    net = Transformer(m)
    for layer in (*net.layers, net):  # one tensor rank's share; its sums are not needed
        for path, module in list(layer.named_modules()):
            split = split_of(f"layers.0.{path}.weight" if layer is not net else f"{path}.weight")
            if split and isinstance(module, nn.Linear) and (layer is not net or path == "output"):
                module.weight = nn.Parameter(split.cut(module.weight.detach(), tensor, 0))
    saved = saved_bytes(net.to(DTYPES[dtype]), m, N)
    if dtype == "bf16" and tensor < m.n_head:  # torch's CPU kernel has heads first, which flatten(2) then copies
        saved -= m.n_layer * N * m.image_tokens * 2 * m.dim // tensor
    assert budget.kept_activation_bytes(m, N, tensor, dtype) == pytest.approx(saved, rel=1e-3)


def test_dropout_masks_are_a_byte_an_element():
    m = tiny().model
    wet = dataclasses.replace(m, token_dropout_p=0.1, resid_dropout_p=0.1, ffn_dropout_p=0.1)
    tokens = 5 * m.image_tokens
    more = budget.kept_activation_bytes(wet, 5) - budget.kept_activation_bytes(m, 5)
    assert more == tokens * m.dim * (2 * m.n_layer + 1)


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live: ``now``, and their ``peak``."""

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in self.weights:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.drop, storage._cdata)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key)


def tracked_peak(cfg: RunConfig, B: int, dtype: str) -> int:
    """A step's losses and backward pass as engine/step.py has them, on one process."""
    g, m = cfg.self_guided, cfg.model
    student, teacher = Student(cfg).to(DTYPES[dtype]), Transformer(m).to(DTYPES[dtype]).requires_grad_(False)
    M, Ms, T = g.views, g.student_views, m.image_tokens
    codes, labels = torch.randint(0, m.vocab_size, (B, M, T)), torch.zeros(B, dtype=torch.int64)
    at = draw_positions(0, 0, T, g.positions)

    def losses():
        mask = MaskSpec.hidden(torch.zeros(B * Ms, T, dtype=torch.bool))
        mine = codes[:, :Ms].flatten(0, 1)
        out = student(labels.repeat_interleave(Ms), mine, mask=mask, positions=at)
        with torch.no_grad():
            seen = teacher(labels.repeat_interleave(M), codes.flatten(0, 1)[:, :-1], features_at=2, need_logits=False)
            last = seen.last if Ms == M else seen.last.unflatten(0, (B, M))[:, :Ms].flatten(0, 1)
            targets = at_positions(seen.features, at, M)
        del seen
        anchors = out.anchors.unflatten(0, (B, Ms))
        return total(
            g,
            loss_ar=out.loss,
            student_last=out.last,
            teacher_last=last,
            anchors=anchors,
            targets=targets,
        )[0]

    with Peak([student, teacher]) as tracked:
        losses().backward()
    return tracked.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "vocabulary", "views"), [("fp32", 256, 2), ("fp32", 4096, 2), ("bf16", 4096, 2), ("fp32", 2048, 1)]
)
def test_peak_of_a_step(dtype, vocabulary, views, checkpointing, as_on_a_gpu):
    cfg = tiny(vocab_size=vocabulary)
    cfg.self_guided.student_views = views
    cfg.parallel = ParallelConfig(activation_checkpointing=checkpointing)
    memory, _ = budget.memory_bytes(
        cfg.model, cfg.self_guided, budget.Zero(1, reduce_bucket=0), 1, 1, 8, checkpointing, dtype
    )
    causes = ("gradients", "activations", "head", "features", "contrastive", "working")
    states, _ = budget.state_bytes(cfg.model, cfg.self_guided, 1, dtype=dtype)
    update = (
        states["gradients"] + budget.STEP_BYTES * states["ema"] // 4
    )  # of the optimizer, which the tracked step lacks
    assert sum(memory[k] for k in causes) == pytest.approx(max(tracked_peak(cfg, 8, dtype), update), rel=0.08)


@pytest.mark.parametrize(("dtype", "factors"), [("fp32", [64, 64]), ("bf16", [256, 256]), ("fp32", [16, 8, 32])])
def test_peak_of_a_step_with_a_factorised_head(dtype, factors, as_on_a_gpu):
    cfg = tiny(vocab_size=math.prod(factors), head="factorised", head_factors=factors)
    memory, _ = budget.memory_bytes(cfg.model, cfg.self_guided, budget.Zero(1, reduce_bucket=0), 1, 1, 8, False, dtype)
    causes = ("gradients", "activations", "head", "features", "contrastive", "working")
    assert sum(memory[k] for k in causes) == pytest.approx(tracked_peak(cfg, 8, dtype), rel=0.08)


# Buffers --------------------------------------------------------------------------------
def test_buffers_follow_the_json():
    small, large = ((cfg.model, cfg.self_guided) for cfg in (run_of("b"), run_of("3b")))
    z = zeros("zero3")
    counts = budget.elements(*small)
    gathered = budget.buffer_bytes(*small, z)["gather"]
    assert gathered >= 2 * sum(counts.values())  # near reuse: B stays gathered from forward to backward
    one = max(counts.values())
    assert gathered == 2 * (sum(counts.values()) + one + 50_000_000)
    tight = dataclasses.replace(z, prefetch=0, max_reuse=0)
    block = sum(n for k, n in budget.elements(*large).items() if k.startswith("transformer.layers.5."))
    assert 4 * block <= budget.buffer_bytes(*large, tight)["gather"] < budget.buffer_bytes(*large, z)["gather"]
    assert budget.buffer_bytes(*large, zeros("zero1")) == {"gather": 0, "buckets": (2 * 2 + 4) * 50_000_000}
    assert budget.Zero.read({"zero_optimization": {"stage": 3}}).prefetch == 50_000_000
    offload = zeros("zero3_offload")
    assert offload.offload == ("optimizer", "param") and offload.label == "3+offload"
