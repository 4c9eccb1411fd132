"""The factorised head: the product of its sub-codes is a distribution, its loss the joint table's, its files and its rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from megastar.commands.convert import main as convert
from megastar.config.load import load_config
from megastar.config.rules.model import tensor_parallel_degrees
from megastar.config.schema import ModelConfig, RunConfig, SelfGuidedConfig
from megastar.engine.student import Student
from megastar.engine.zero.partitions import parameter_groups
from megastar.errors import UserError
from megastar.model.factorised import FactorisedHead, SubCodeEmbedding, sub_codes
from megastar.model.io import load_model, metadata_of
from megastar.model.transformer import Transformer
from megastar.objectives.next_token import next_token_loss
from megastar.parallel import budget
from megastar.parallel.head import check_tensor, head_products
from megastar.parallel.muon import all_matrices
from megastar.parallel.plan import split_of
from tests.checkpoints import save_model

SMALL = {"name": "t", "n_layer": 2, "n_head": 2, "dim": 16, "multiple_of": 8, "num_classes": 3, "image_tokens": 9}
OFF = {f"{name}_dropout_p": 0.0 for name in ("token", "resid", "ffn")}
FACTORS = [[3, 4], [2, 3, 2]]


def config(factors, **changes) -> ModelConfig:
    return ModelConfig(
        **SMALL | OFF | {"vocab_size": math.prod(factors), "head": "factorised", "head_factors": factors} | changes
    )


def random_(module: torch.nn.Module) -> torch.nn.Module:
    """Large weights: the initial head is zero, so that every code is equally likely."""
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


def slow_probability(head: FactorisedHead, h: torch.Tensor, code: int) -> torch.Tensor:
    """p(code | h) of one position h (D,): the product over the sub-codes, each by plain formulas."""
    digits, rest = [], code
    for size in reversed(head.factors):
        digits.insert(0, rest % size)
        rest //= size
    state, p = h, torch.ones((), dtype=torch.float64)
    for i, digit in enumerate(digits):
        logits = [row @ state for row in head.heads[i].weight]
        p = p * torch.exp(logits[digit]) / sum(torch.exp(x) for x in logits)
        if i < len(head.mixers):
            m = head.mixers[i]

            def norm(x, weight):
                return x / torch.sqrt((x * x).mean() + 1e-5) * weight

            g = state + m.code.weight[digit]
            x = norm(g, m.norm.weight)
            a = m.w1.weight @ x
            g = g + m.w2.weight @ (a / (1 + torch.exp(-a)) * (m.w3.weight @ x))
            state = norm(g, m.out_norm.weight)
    return p


@pytest.mark.parametrize("factors", FACTORS)
def test_the_joint_probability_is_the_product_and_sums_to_1(factors):
    head, V = random_(FactorisedHead(config(factors))), math.prod(factors)
    h = torch.randn(2, 3, 16, dtype=torch.float64)
    logs = head(h)
    assert logs.shape == (2, 3, V)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    slow = torch.stack([torch.stack([slow_probability(head, row, c) for c in range(V)]) for row in h.flatten(0, 1)])
    torch.testing.assert_close(logs.exp().flatten(0, 1), slow)
    assert slow.std() > 0.02  # far from uniform


@pytest.mark.parametrize("factors", FACTORS)
def test_the_loss_is_the_cross_entropy_of_the_joint_table(factors):
    head, V = random_(FactorisedHead(config(factors))), math.prod(factors)
    h = torch.randn(4, 5, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (4, 5))
    inputs = [h, *head.parameters()]
    loss, joint = head(h, targets=targets), F.cross_entropy(head(h).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, joint)
    for ours, wanted in zip(torch.autograd.grad(loss * 3, inputs), torch.autograd.grad(joint * 3, inputs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-10)


def test_sub_codes_are_digits():
    codes = torch.arange(24).view(2, 12)
    a, b = sub_codes(codes, [6, 4])
    assert torch.equal(a * 4 + b, codes) and b.max() == 3 and a.max() == 5
    a, b, c = sub_codes(codes, [2, 3, 4])
    assert torch.equal((a * 3 + b) * 4 + c, codes)


def test_the_embedding_is_the_sum_of_the_sub_codes():
    table = SubCodeEmbedding(config([3, 4]))
    for code in range(12):
        wanted = table.tables[0].weight[code // 4] + table.tables[1].weight[code % 4]
        assert torch.equal(table(torch.tensor(code)), wanted)
    wide = SubCodeEmbedding(config([512, 512], dim=64, n_head=2))
    assert wide(torch.randint(0, 1 << 18, (4096,))).std().item() == pytest.approx(0.02, rel=0.03)  # initializer_range


@pytest.mark.parametrize("factors", FACTORS)
def test_the_network_trains_on_it(factors):
    cfg, V = config(factors), math.prod(factors)
    torch.manual_seed(0)
    model = Transformer(cfg)
    labels, tokens = torch.tensor([0, 3]), torch.randint(0, V, (2, 9))
    assert model(labels, tokens[:, :-1], targets=tokens).loss.item() == pytest.approx(math.log(V))  # heads of zeros
    random_(model)
    out = model(labels, tokens[:, :-1])
    wanted, _ = next_token_loss(out.logits, tokens)
    torch.testing.assert_close(model(labels, tokens[:, :-1], targets=tokens).loss, wanted)
    later = model(labels, torch.cat([tokens[:, :4], (tokens[:, 4:-1] + 1) % V], 1)).logits
    torch.testing.assert_close(later[:, :5], out.logits[:, :5])  # causal: an output does not see its own token


def test_no_table_of_all_codes_exists_and_plans_count_the_weights():
    cfg = RunConfig(model=config([512, 512], dim=64, n_head=4), self_guided=SelfGuidedConfig(contrastive_block=1))
    student = Student(cfg)
    real = {name: tuple(p.shape) for name, p in student.named_parameters()}
    assert budget.parameter_shapes(cfg.model, cfg.self_guided) == real
    assert list(budget.parameter_shapes(cfg.model, cfg.self_guided)) == list(real)
    assert max(p.numel() for p in student.transformer.parameters()) <= 512 * 64
    D, ffn = 64, cfg.model.ffn_dim
    assert head_products(cfg.model) == 2 * 512 * D + 3 * D * ffn
    full = replace(cfg.model, head="full", head_factors=[])
    assert head_products(full) == (1 << 18) * D
    (kept, most), (full_kept, full_most) = (budget.head_bytes(m, 2, 1, "bf16") for m in (cfg.model, full))
    assert kept < full_kept / 10 and most < full_most / 10


def test_muon_leaves_the_head_to_adamw():
    cfg = RunConfig(model=config([3, 4]), self_guided=SelfGuidedConfig(contrastive_block=1, projector_dim=8))
    cfg.optim.name = "muon"
    student = Student(cfg)
    groups = parameter_groups(student, 0.05, cfg.optim.of_matrices)
    names = {id(p): n for n, p in student.named_parameters()}
    by_muon = {names[id(p)] for g in groups if g.get("muon") for p in g["params"]}
    assert by_muon and all(".layers." in name for name in by_muon)
    assert len(all_matrices(budget.parameter_shapes(cfg.model), True)) == 2 * (3 + 1 + 3)  # of two blocks; q, k, v each
    assert all(split_of(n) is None for n in names.values() if "output" in n or "tok_embeddings" in n)  # replicated


# Files -------------------------------------------------------------------------------------------------------
def test_weights_files(tmp_path, capsys):
    torch.manual_seed(0)
    model = Transformer(config([3, 4])).eval()
    torch.nn.init.normal_(model.output.heads[1].weight)
    path = tmp_path / "w.safetensors"
    save_model(path, model.state_dict(), model.cfg, {"step": 3})
    again, _ = load_model(path)
    labels, tokens = torch.tensor([1, 2]), torch.randint(0, 12, (2, 8))
    assert again.cfg == model.cfg and torch.equal(again(labels, tokens).logits, model(labels, tokens).logits)
    assert convert(["--inspect", str(path)]) == 0 and '"head": "factorised"' in capsys.readouterr().out
    assert convert([str(path), "--to", "safetensors", "--out", str(tmp_path / "again.safetensors")]) == 0
    with pytest.raises(UserError, match=r"LlamaGen has no factorised head: convert to safetensors"):
        convert([str(path), "--to", "llamagen", "--out", str(tmp_path / "w.pt")])
    assert not (tmp_path / "w.pt").exists()
    for cfg in (config([4, 3]), config([2, 6]), ModelConfig(**SMALL | {"vocab_size": 12})):
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, tmp_path / "wrong.safetensors", metadata_of(cfg, {}))
        with pytest.raises(UserError, match="do not match their configuration"):
            load_model(tmp_path / "wrong.safetensors")
    save_file(state, tmp_path / "wrong.safetensors", metadata_of(config([3, 4], vocab_size=13), {}))
    with pytest.raises(
        UserError, match=r"head_factors = \[3, 4\]: their product 12 must be model.vocab_size 13; convert"
    ):
        load_model(tmp_path / "wrong.safetensors")


# Rules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"head": "factorised"},
            r"model.head_factors = \[\]: model.head factorised needs two or more numbers whose product",
        ),
        (
            {"head": "factorised", "head_factors": "[16384]"},
            "needs two or more numbers whose product is model.vocab_size 16384",
        ),
        ({"head": "factorised", "head_factors": "[128,127]"}, r"their product 16256 must be model.vocab_size 16384"),
        ({"head": "factorised", "head_factors": "[16384,1]"}, "model.head_factors = 1: must be at least 2"),
        (
            {"head_factors": "[128,128]"},
            "model.head full has no sub-codes; set model.head to factorised, or head_factors",
        ),
        ({"head": "bits"}, "model.head = bits: must be full or factorised"),
    ],
)
def test_rules(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(None, ["data.shards=s", *(f"model.{k}={v}" for k, v in fields.items())])


def test_tensor_parallelism_does_not_divide_a_factorised_vocabulary():
    assert tensor_parallel_degrees(ModelConfig(vocab_size=15)) == [1]
    cfg = ModelConfig(vocab_size=15, head="factorised", head_factors=[3, 5])
    assert tensor_parallel_degrees(cfg) == [1, 2, 4]
    assert budget.elements(cfg, SelfGuidedConfig(), 2)["transformer.output.heads.1.weight"] == 5 * cfg.dim
    with pytest.raises(UserError, match="must divide 12 heads and the ffn width 2048; use"):
        check_tensor(cfg, 5)
