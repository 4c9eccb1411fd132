"""Run by torchrun on two ranks from test_guards.py: what must be detected, or corrected, before it does harm."""

from __future__ import annotations

import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megastar.checkpoint.shard_format import KINDS, StateReader
from megastar.engine import run_folder
from megastar.engine.checkpointer.async_saver import Saver
from megastar.engine.fault_tolerance.errors import CorruptReplica
from megastar.engine.fault_tolerance.replica_checksum import compare
from megastar.engine.lr_schedule import peak_rate
from megastar.engine.rank_sync import on_all_ranks
from megastar.engine.train_step import check_batch, losses, set_schedules
from megastar.engine.zero.partitions import publish_masters
from megastar.engine.zero.process_group import set_timeouts, start
from megastar.engine.zero.setup import build
from megastar.errors import UserError
from megastar.run_dir import checkpoint_dir
from tests.dist.reference import BATCH, STEPS, batch_of, config
from tests.dist.workers.engine_worker import forget_mesh

NORM = "transformer.norm.weight"


def engines_of(out: Path, tensor: int, stage: str, accumulation: int = 1, **train):
    forget_mesh()
    cfg = config(parallel={"deepspeed": stage, "tensor_parallel": tensor}, train=train)
    cfg.run = str(out / f"{tensor}-{Path(stage).stem}")
    ctx = start(cfg)
    cfg.train.micro_batch = BATCH // ctx.mesh.data // accumulation
    engines = build(cfg, ctx)
    engines.student.train()
    return cfg, ctx, engines


def one_step(cfg, ctx, engines, step: int = 0, scale: float = 1.0, skip: bool = False) -> bool:
    """``scale`` spoils the gradient of the last micro-batch, ``skip`` skips the step; whether the weights moved."""
    micro, moved = cfg.train.micro_batch, True
    for a in range(engines.accumulation):
        first = (a * ctx.mesh.data + ctx.mesh.data_rank) * micro
        loss, _ = losses(cfg, engines, ctx, batch_of(cfg, step, slice(first, first + micro)), step)
        last = a + 1 == engines.accumulation
        engines.student.backward(loss * scale if last else loss)
        set_schedules(cfg, engines, step, STEPS)
        moved = engines.step(skip and last)
    if moved:
        engines.refresh_teacher()
    return moved


def check_replicas(cfg, engines, ctx) -> None:
    compare(Path(cfg.run), engines, ctx, 1, peak_rate(cfg.optim, cfg.train.global_batch))


def state_of(engines) -> dict[str, torch.Tensor]:
    """Masters, moments, averages, counters, and what the networks compute with, on this rank."""
    out = {f"{s.name} {kind}": s.view(kind).clone() for s in engines.shards() for kind in KINDS}
    out["updates"] = torch.tensor(engines.updates())
    for whose, net in (("student", engines.student), ("teacher", getattr(engines.teacher, "engine", engines.teacher))):
        for name, p in net.module.named_parameters():
            out[f"{whose} {name}"] = getattr(p, "ds_tensor", p).detach().clone()
    return out


def put_back(engines, state: dict[str, torch.Tensor]) -> None:
    for shard in engines.shards():
        for kind in KINDS:
            shard.view(kind).copy_(state[f"{shard.name} {kind}"])
        engines.optimizer.state[shard.flat]["step"].fill_(state["updates"])
    publish_masters(engines.student)
    engines.refresh_teacher()


def a_skipped_step_leaves_no_trace(out: Path, stage: str, tensor: int, accumulation: int, **train) -> None:
    """Nothing moves in it, and what follows is what would have followed without it, to the last bit."""
    cfg, ctx, engines = engines_of(out, tensor, stage, accumulation, **train)
    with torch.no_grad():
        begun = state_of(engines)
    assert one_step(cfg, ctx, engines, 0) and one_step(cfg, ctx, engines, 2)
    straight, norm = state_of(engines), engines.grad_norm()
    assert straight["updates"] == 2 and norm > 0
    with torch.no_grad():
        put_back(engines, begun)
    assert one_step(cfg, ctx, engines, 0)
    before = state_of(engines)
    bad = float("nan") if ctx.rank == 0 else 1.0
    for how in ({"skip": True}, {"scale": bad}, {"scale": bad, "skip": True}, {"skip": True}):
        assert not one_step(cfg, ctx, engines, 1, **how), (stage, how)
        after = state_of(engines)
        assert all(torch.equal(before[k], after[k]) for k in before), (stage, tensor, how)
    assert not engines.optimizer.skip_next and (engines.student.micro_steps) % accumulation == 0
    assert one_step(cfg, ctx, engines, 2)
    done = state_of(engines)
    different = [k for k in done if not torch.equal(done[k], straight[k])]
    assert not different and engines.grad_norm() == norm, (stage, tensor, accumulation, different[:3])


def replicas_that_drifted_are_aligned(out: Path, stage: str) -> None:
    cfg, ctx, engines = engines_of(out, 2, stage)
    one_step(cfg, ctx, engines)
    (norm,) = (s for s in engines.shards() if s.name == NORM)
    kept = norm.view("fp32").clone()
    if ctx.rank == 1:
        norm.view("fp32").add_(1e-3)
        norm.view("ema").add_(1e-3)
    saver = Saver(cfg, ctx, engines)
    saver.save(1, {})
    found = saver.finish()
    assert torch.equal(norm.view("fp32"), kept)  # on both ranks tensor rank 0's
    reader = StateReader(found, checkpoint_dir.read_manifest(found))
    assert torch.equal(reader.whole(NORM, "fp32"), kept)
    compute = dict(engines.student.module.named_parameters())[NORM]
    assert torch.equal(compute.data.view(-1), kept)  # so small that it stays gathered


def different_batches_are_reported(out: Path) -> None:
    cfg, ctx, _ = engines_of(out, 2, "zero1")
    batch = batch_of(cfg, 0, slice(None))
    check_batch(ctx, batch, 0)
    none = {name: torch.zeros_like(value) for name, value in batch.items()}
    check_batch(ctx, none if ctx.rank == 1 else batch, 0)  # a rank without a batch is reported elsewhere
    if ctx.rank == 1:
        batch["codes"] = batch["codes"].flip(0)  # the same codes in another order
    with pytest.raises(UserError, match="step 7: the ranks of a tensor group .* got different batches"):
        check_batch(ctx, batch, 7)


def corruption_is_named(out: Path) -> None:
    """One bit of one weight on one rank; two ranks have no majority."""
    both = "differs between rank 0 .*, rank 1 .*, and no majority shows which is wrong"
    for stage in ("tests/dist/ds/zero0.json", "zero2"):
        cfg, ctx, engines = engines_of(out, 1, stage)
        one_step(cfg, ctx, engines)
        check_replicas(cfg, engines, ctx)
        student, teacher = (
            dict(engines.student.module.named_parameters()),
            dict(engines.teacher.module.named_parameters()),
        )
        for weight, name in ((student[NORM], NORM), (teacher["norm.weight"], "teacher's norm.weight")):
            bits = weight.data.view(torch.int32)
            if ctx.rank == 1:
                bits[3] ^= 1
            with pytest.raises(CorruptReplica, match=f"step 1: {re.escape(name)}.* must be equal .*{both}"):
                check_replicas(cfg, engines, ctx)
            if ctx.rank == 1:
                bits[3] ^= 1
        check_replicas(cfg, engines, ctx)
    assert not (Path(cfg.run) / "lost.jsonl").exists()
    cfg, ctx, engines = engines_of(out, 2, "zero3")
    one_step(cfg, ctx, engines)
    (norm,) = (s for s in engines.shards() if s.name == NORM)
    if ctx.rank == 1:
        norm.view("fp32").add_(1e-6)
    check_replicas(cfg, engines, ctx)  # tensor ranks may drift apart by rounding, until a save
    if ctx.rank == 1:
        norm.view("fp32")[0] *= 2
    with pytest.raises(CorruptReplica, match=f"{NORM} must be equal .*{both}"):
        check_replicas(cfg, engines, ctx)
    if ctx.rank == 1:
        norm.view("fp32")[0] /= 2
        torch.rand(1)
    with pytest.raises(CorruptReplica, match="the dropout's generator must be equal"):
        check_replicas(cfg, engines, ctx)


def every_group_has_the_timeout(out: Path) -> None:
    """Those that DeepSpeed and the mesh made for themselves too."""
    engines_of(out, 2, "zero1")
    set_timeouts(timedelta(seconds=77))
    groups = list(torch.distributed.distributed_c10d._world.pg_map)
    assert len(groups) > 2
    for group in groups:
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77), group


def an_error_elsewhere_is_of_its_kind(out: Path) -> None:
    """Only a user error ends all ranks with 2, which is not requeued."""
    _, ctx, _ = engines_of(out, 1, "zero1")

    def fail(error: Exception) -> None:
        if ctx.rank == 1:
            raise error

    for error, elsewhere in (
        (UserError("the shard is broken: fix it"), UserError("the shard is broken: fix it")),
        (PermissionError(13, "Permission denied", "/x"), UserError("cannot access /x (Permission denied): change")),
        (OSError(5, "Input/output error"), RuntimeError("rank 1: OSError(5, 'Input/output error')")),
    ):
        wanted = error if ctx.rank == 1 and not isinstance(error, PermissionError) else elsewhere
        with pytest.raises(type(wanted)) as found:
            on_all_ranks(ctx, lambda error=error: fail(error))
        assert type(found.value) is type(wanted) and str(found.value).startswith(str(wanted))
        assert getattr(found.value, "reported", ctx.rank == 0) is (ctx.rank == 0)
    assert on_all_ranks(ctx, lambda: 7) == 7


def a_run_folder_that_is_not_shared_is_refused(out: Path) -> None:
    _, ctx, _ = engines_of(out, 1, "zero1")
    own = out / f"disk-{ctx.rank}"
    own.mkdir()
    run_folder.VISIBLE_WITHIN, local = 1.0, os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = "0"  # each rank on a node of its own
    run_folder.check_shared(out, ctx)
    with pytest.raises(
        UserError, match=r"run = .*disk-1 is not the same folder on .* and on .*, where rank 0 runs: name"
    ):
        run_folder.check_shared(own, ctx)
    os.environ["LOCAL_RANK"] = local
    torch.distributed.barrier()
    assert not list(out.rglob(".shared-*"))


def no_pickles(*_: object) -> None:
    raise AssertionError("ranks exchange a pickle")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in ("_object_to_tensor", "_tensor_to_object"):
        assert callable(getattr(torch.distributed.distributed_c10d, name))
        setattr(torch.distributed.distributed_c10d, name, no_pickles)
    for json in ("zero1", "zero3"):
        replicas_that_drifted_are_aligned(folder, json)
    different_batches_are_reported(folder)
    every_group_has_the_timeout(folder)
    an_error_elsewhere_is_of_its_kind(folder)
    a_run_folder_that_is_not_shared_is_refused(folder)
    corruption_is_named(folder)
    own = "tests/dist/ds/zero{}.json"
    for stage, tensor, accumulation, train in (
        (own.format("0"), 1, 2, {}), (own.format("0"), 2, 1, {}), ("zero1", 1, 2, {}), ("zero1", 2, 1, {"dtype": "bf16"}),
        ("zero2", 1, 2, {"dtype": "bf16"}), ("zero3", 1, 2, {}), ("zero3", 2, 2, {"dtype": "bf16"}),
        ("zero3_offload", 1, 2, {}),
    ):  # fmt: skip
        a_skipped_step_leaves_no_trace(folder, stage, tensor, accumulation, **train)
    (folder / f"passed-{torch.distributed.get_rank()}").touch()
