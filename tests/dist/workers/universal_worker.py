"""Run by torchrun from test_convert.py: DeepSpeed's loader reads a universal folder into engines of plain AdamW."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state

from megastar.engine.student import Student
from megastar.engine.zero.partitions import parameter_groups
from megastar.parallel.plan import autotp_section, split_of
from tests.checkpoints import whole_of
from tests.dist.reference import BATCH, batch_of, config

LR, DECAY, EPS = 3e-3, 0.05, 1e-6


def forget_mesh() -> None:
    groups._TENSOR_MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = None
    groups.mpu = None


def loaded_engine(folder: Path, stage: int, tensor: int):
    """An engine of other weights, after ``load_checkpoint``; and what that returned."""
    cfg = config()
    torch.manual_seed(1)
    student = Student(cfg)
    optimizer = torch.optim.AdamW(parameter_groups(student, DECAY), lr=LR, eps=EPS, betas=(0.9, 0.95))
    told = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "checkpoint": {"load_universal": True},
    }
    if tensor > 1:
        groups._init_tp_mesh_device(tensor_model_parallel_size=tensor)
        told["tensor_parallel"] = autotp_section(tensor)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=told)
    path, client = engine.load_checkpoint(str(folder))
    assert path is not None
    return engine, optimizer, client


def compare(engine, stage: int, tensor: int, wanted: dict, what: str) -> None:
    """Masters and moments, gathered by DeepSpeed's own functions, against this tensor rank's part of the whole ones."""
    rank = dist.get_rank(groups.get_tensor_model_parallel_group()) if tensor > 1 else 0
    for name, p in engine.module.named_parameters():
        split = split_of(name) if tensor > 1 else None
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            got = safe_get_full_fp32_param(p) if kind == "fp32" else safe_get_full_optimizer_state(p, kind)
            value = split.cut(wanted[name][kind], tensor, rank) if split else wanted[name][kind]
            assert torch.equal(got.view(value.shape), value), f"{what}: {kind} of {name}"


def train_step(engine, optimizer, wanted: dict, step: int, what: str) -> None:
    """One more step equals plain AdamW's from the same masters, moments and step."""
    for state in optimizer.state.values():  # stage 3 gives all groups one tensor to count in
        state["step"] = state["step"].clone()
    cfg = config()
    batch = batch_of(cfg, 0, slice(None))
    codes = batch["codes"][:, 0]

    def loss_of(module):
        return module(batch["labels"], codes).loss

    plain = Student(cfg)
    plain.load_state_dict({n: k["fp32"] for n, k in wanted.items()})
    reference = torch.optim.AdamW(parameter_groups(plain, DECAY), lr=LR, eps=EPS, betas=(0.9, 0.95))
    for name, p in plain.named_parameters():
        moments = {k: wanted[name][k].clone() for k in ("exp_avg", "exp_avg_sq")}
        reference.state[p] = {"step": torch.tensor(float(step)), **moments}
    loss_of(plain).backward()
    for p in plain.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    reference.step()
    engine.backward(loss_of(engine))
    engine.step()
    for name, p in engine.module.named_parameters():
        if not name.startswith("projector."):  # it had no gradient
            value, before = dict(plain.named_parameters())[name].detach(), wanted[name]["fp32"]
            error = (safe_get_full_fp32_param(p).view(value.shape) - value).norm()
            assert error <= 1e-5 * (value - before).norm(), f"{what}: {name} after a step"


def main(folder: Path) -> None:
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", verbose=False)
    wanted, step = whole_of(config()), 3
    for stage, tensor in ((3, 1), (1, 1), (2, 1), (3, 2), (1, 2)):
        what = f"stage {stage}, {tensor} tensor ranks"
        forget_mesh()
        engine, optimizer, client = loaded_engine(folder, stage, tensor)
        compare(engine, stage, tensor, wanted, what)
        assert {float(s["step"]) for s in optimizer.state.values()} == {step}, what
        decays = [g["weight_decay"] for g in engine.optimizer.optimizer.param_groups]
        assert decays == [DECAY, 0.0, DECAY, 0.0], (what, decays)
        assert engine.global_steps == step and client["megastar"]["steps"] == 8, what
        if stage == 3 and tensor == 1:
            for name, p in engine.module.named_parameters():
                place = str(folder / f"global_step{step}" / "zero" / name)
                mine = engine.optimizer.load_hp_checkpoint_state(place, "ema", param=p)
                part = -(-p.ds_numel // dist.get_world_size())
                flat = wanted[name]["ema"].flatten()[dist.get_rank() * part :][:part]
                assert torch.equal(mine[: len(flat)], flat), name
        if tensor == 1:
            train_step(engine, optimizer, wanted, step, what)
        print(f"equal: {what}", flush=True)
        dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
