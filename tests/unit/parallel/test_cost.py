"""``megastar plan``: communication against closed forms, arithmetic against counted operations, the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megastar import cli
from megastar.config.load import load_config
from megastar.engine.student import Student
from megastar.model.transformer import Transformer
from megastar.parallel import budget, cost, gpus
from megastar.parallel.cross_entropy import linear_cross_entropy
from tests.unit.parallel.test_budget import ROOT, here, run_of, tiny, zeros  # noqa: F401

SIZES = ("b", "l", "xl", "xxl", "3b")
NODE = gpus.Machine("h100", gpus.GPUS["h100"], 8, 8)


# Communication and arithmetic --------------------------------------------------------------------------------------
def sent(cfg, file, tensor, data, accumulation=1, checkpointing=False, link=None):
    micro = cfg.train.global_batch // data // accumulation
    known = cost.transfers(
        cfg.model, cfg.self_guided, zeros(file), tensor, data, micro, accumulation, checkpointing, "bf16"
    )
    return {t.what: t.bytes for t in known if link in (None, t.link)}


def test_communication_of_the_data_ranks():
    cfg = run_of("xl")
    counts = budget.elements(cfg.model, cfg.self_guided)
    P, trunk = sum(counts.values()), budget.trunk(counts)
    assert sent(cfg, "zero3", 1, 1) == {} == sent(cfg, "zero1", 1, 1)
    one = sent(cfg, "zero1", 1, 8)
    # Twice the elements, in fp32: the shipped files sum gradients so.
    assert one["all-reduce gradients"] == 4 * one["all-gather weights"] == 4 * round(2 * P * 7 / 8)
    assert one["all-gather teacher"] == round(2 * trunk * 7 / 8)
    three, twice = sent(cfg, "zero3", 1, 8), sent(cfg, "zero3", 1, 8, accumulation=2)
    assert three["reduce-scatter gradients"] == 2 * one["all-gather weights"]
    assert all(twice[k] == pytest.approx(2 * three[k], abs=2) for k in three if k != "all-gather targets")
    assert twice["all-gather targets"] == three["all-gather targets"]
    assert sent(cfg, "zero1", 1, 8, accumulation=2)["all-reduce gradients"] == one["all-reduce gradients"]
    assert sent(cfg, "zero2", 1, 8, accumulation=2)["all-reduce gradients"] == 2 * one["all-reduce gradients"]
    assert sent(cfg, "zero3", 4, 2)["reduce-scatter gradients"] < three["reduce-scatter gradients"]


def test_communication_of_the_tensor_ranks():
    cfg = run_of("xl")
    one = 64 * 2 * 256 * 1280 * 2 * 2 * (3 / 4)  # bytes sent to sum one (N, T, D) over four ranks
    plain, again = sent(cfg, "zero1", 4, 4, link="tensor"), sent(cfg, "zero1", 4, 4, checkpointing=True, link="tensor")
    assert plain["all-reduce outputs, student"] == plain["all-reduce outputs, teacher"] == round(2 * 36 * one)
    assert plain["all-reduce input gradients"] == round((3 * 36 + 1) * one)
    assert again["all-reduce outputs, student"] == 2 * plain["all-reduce outputs, student"]
    assert sent(cfg, "zero1", 1, 16, link="tensor") == {}


@pytest.mark.parametrize("views", [1, 2])
def test_operations_are_those_counted(views, monkeypatch):
    def products(q, k, v, mask=None):
        return torch.softmax(q @ k.transpose(-2, -1), -1) @ v

    monkeypatch.setattr("megastar.model.attention.attention", products)
    monkeypatch.setattr("megastar.utils.onednn.mkl_is_slow", lambda: False)  # oneDNN's operator is not counted
    cfg, B = tiny(), 2
    cfg.self_guided.student_views, cfg.train.global_batch = views, B
    labels, tokens = torch.zeros(B, dtype=torch.int64), torch.zeros(B, 64, dtype=torch.int64)
    student, teacher = Student(cfg), Transformer(cfg.model).requires_grad_(False)
    with FlopCounterMode(display=False) as forward_backward:
        for _ in range(views):
            out = student(labels, tokens, positions=torch.arange(1, 5))
            (out.loss + out.anchors.sum()).backward()
    with FlopCounterMode(display=False) as forward:
        for view in range(2):
            teacher(labels, tokens[:, :-1], last_block=None if view < views else 2, need_logits=False)
    counted = cost.step_flops(cfg)
    assert counted["teacher"] == forward.get_total_flops()
    assert counted["student"] == forward_backward.get_total_flops()


class Moved(TorchDispatchMode):
    """Bytes of matrices of ``elements`` that operations other than products read and write."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Products are counted elsewhere; a view moves nothing, the others a number a row.
        if func.name() not in ("aten::mm", "aten::t", "aten::gather", "aten::scatter_add_", "aten::new_full"):
            for t in (*args, out):
                if isinstance(t, torch.Tensor) and t.numel() == self.elements:
                    self.bytes += t.nbytes
        return out


@pytest.mark.parametrize(("split", "expected"), [(False, cost.LOGIT_BYTES), (True, cost.SPLIT_LOGIT_BYTES)])
def test_the_bytes_of_a_logit_are_those_moved(split, expected):
    rows, codes, width = 48, 1000, 32
    hidden, weight = torch.randn(rows, width).bfloat16().requires_grad_(), torch.randn(codes, width).bfloat16()
    group = None
    if split:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
    try:
        with Moved(rows * codes) as moved:
            linear_cross_entropy(hidden, weight.requires_grad_(), torch.randint(0, codes, (rows,)), group)
    finally:
        if split:
            dist.destroy_process_group()
    assert moved.bytes == expected * rows * codes


# Plans -------------------------------------------------------------------------------------------------------------
ALL = [zeros(f) for f in ("zero1", "zero2", "zero3", "zero3_offload")]


@pytest.mark.parametrize("size", SIZES)
def test_recommended_plans_fit(size):
    cfg = run_of(size)
    plans = cost.make_plans(cfg, NODE, ALL)
    best = cost.recommend(plans)
    assert best and best.total < best.need <= best.limit == 80 * 2**30
    assert best.seconds <= (1 + cost.NEAR) * min(p.seconds for p in plans if p.need <= 0.95 * p.limit)
    assert {p.tensor for p in plans} == {d for d in (1, 2, 4, 8) if cfg.model.n_head % d == 0}
    assert all(0 < p.mfu < cost.MATMUL_EFFICIENCY for p in plans)
    for p in plans:
        assert p.data * p.tensor == 8 and p.data * p.micro * p.accumulation == 256


def test_what_saves_memory_does():
    xl = run_of("xl")
    plans = {(p.tensor, p.zero.label, p.checkpointing): p for p in cost.make_plans(xl, NODE, ALL)}
    for (tensor, label, checkpointing), p in plans.items():
        if not checkpointing:
            saving = plans[tensor, label, True]
            assert saving.total < p.total and saving.seconds > p.seconds
        stages = [budget.state_bytes(xl.model, xl.self_guided, s, tensor, p.data)[0] for s in (1, 2, 3)]
        states = [sum(stage.values()) for stage in stages]
        assert states == sorted(states, reverse=True)
        assert plans[tensor, "3+offload", checkpointing].host > 0 == plans[tensor, "3", checkpointing].host


def test_xl_fits_one_gpu_of_80_gb_unsharded():
    alone = dataclasses.replace(NODE, gpus=1, per_node=1)
    plain = cost.make_plan(run_of("xl", "train.global_batch=32"), alone, zeros("zero1"), 1, False, "bf16")
    whole = cost.make_plan(run_of("xl"), alone, zeros("zero1"), 1, False, "bf16")
    split = cost.make_plan(run_of("xl", "train.micro_batch=32"), alone, zeros("zero1"), 1, False, "bf16")
    assert plain.fits and not whole.fits
    assert split.accumulation == 8 and plain.memory["kept"] == 0 < split.memory["kept"]
    extra = ("gradients", "kept")
    assert len({p.total - sum(p.memory[k] for k in extra) for p in (split, plain)}) == 1


@pytest.mark.parametrize(("setting", "compiles"), [("auto", True), ("on", True), ("off", False)])
def test_compiled_blocks_move_less(setting, compiles):
    cfg = run_of("l")
    cfg.train.compile = setting
    plans = cost.make_plans(cfg, NODE, ALL)
    assert all(p.compiled == (compiles and p.tensor == 1) for p in plans)
    text = cost.assumptions(cfg)["blocks"]
    assert text.startswith(f"train.compile={setting}; ") and ("compiled without" in text) == compiles
    cfg.train.compile = "off"
    for plan, eager in zip(plans, cost.make_plans(cfg, NODE, ALL), strict=True):
        assert plan.compute < eager.compute if plan.compiled else plan.compute == eager.compute


def test_network_and_nodes():
    two = dataclasses.replace(NODE, gpus=16)
    assert two.nodes == 2 and NODE.data_rate(1) == NODE.tensor_rate()
    assert two.data_rate(1) > two.data_rate(4) == pytest.approx(2 * 50e9 * gpus.BANDWIDTH_EFFICIENCY)
    slow = dataclasses.replace(two, gpu=dataclasses.replace(two.gpu, network=1.0))
    cfg = run_of("3b")
    assert (
        cost.make_plan(cfg, slow, ALL[2], 1, True, "bf16").seconds
        > cost.make_plan(cfg, two, ALL[2], 1, True, "bf16").seconds
    )


# The command -------------------------------------------------------------------------------------------------------
def test_json_contains_everything(capsys):
    assert cli.main(["plan", "configs/run/star_b_50ep.yaml", "--gpus", "4", "--json", "optim.lr=1e-3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "b" and report["machine"]["gpus"] == 4 and len(report["plans"]) == 3 * 4 * 2
    best = report["recommended"]
    assert best["fits"] and sum(best["memory"].values()) == best["total"] and best["why"]
    again = load_config("configs/run/star_b_50ep.yaml", best["overrides"])  # can be trained as it stands
    assert again.parallel.tensor_parallel == best["tensor"]


def test_table(capsys):
    assert cli.main(["plan", "xl", "--gpus", "16", "--gpu", "a100-40"]) == 0
    some = capsys.readouterr().out
    assert cli.main(["plan", "xl", "--gpus", "16", "--gpu", "a100-40", "--all"]) == 0
    every = capsys.readouterr().out
    assert "per step\n16 x a100-40, 2 nodes: 40 GiB" in some and "\\n" not in some
    assert "24 plans shown, 24 fit" in some and some.count("3+offload") < every.count("3+offload") == 6
    assert "recommended: parallel.deepspeed=configs/ds/" in some and "\n -> 1" in some
    assert (
        all(f"\n  {name}: " in some for name in cost.assumptions(run_of("xl")))
        and "estimates, not measurements" in some
    )


def test_a_file_in_the_working_directory_is_a_run(capsys, tmp_path, monkeypatch):
    """Whatever its name, as for `megastar train`; a name of a size is the size."""
    (tmp_path / "mine").write_text("data: {shards: x}\ntrain: {global_batch: 96}\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "mine"]) == 0 and "96" in capsys.readouterr().out
    (tmp_path / "mine").rename("a=b")
    assert cli.main(["plan", "a=b"]) == 0 and "96" in capsys.readouterr().out
    assert cli.main(["plan", "mine"]) == 2 and "size 'mine' is unknown" in capsys.readouterr().err


def test_nothing_fits(capsys):
    assert cli.main(["plan", "3b", "--gpus", "1", "--memory", "24"]) == 1
    assert "no plan fits 24 GiB: the closest one needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["xl", "--gpu", "h10"], "gpu 'h10' is unknown: did you mean h100?"),
        (["xl", "--gpu", "a100"], "gpu 'a100' is unknown: choose a100-80 or a100-40. For another GPU give the closest"),
        (["xl", "--gpu", "A100"], "gpu 'A100' is unknown: choose a100-80 or a100-40."),
        (["xk"], "size 'xk' is unknown: did you mean xl?"),
        ([], "name a run configuration or a size, nano, b, l, xl, xxl, 3b"),
        (
            ["b", "--tensor-parallel", "8"],
            "tensor parallel degree 8: must divide 12 heads, the ffn width 2048 and 16384",
        ),
        (["3b", "--tensor-parallel", "16"], "must divide the 8 GPUs of a node; use 1, 2, 4 or 8"),
        (["b", "--gpus", "64", "train.global_batch=100"], "world size 64 does not divide train.global_batch 100"),
        (["b", "--gpus", "12"], "--gpus 12 is not a multiple of 8 GPUs per node"),
        (["b", "--memory", "-1"], "argument --memory: '-1' is not a number from 1e-06 to 1000000000"),
        (["b", "modle.dim=3"], "unknown key modle"),
    ],
)
def test_user_errors(words, sentence, capsys):
    assert cli.main(["plan", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_needs_no_torch():
    code = "import sys, megastar.cli\nmegastar.cli.main(['plan', 'b', '--json'])\n"
    code += "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
