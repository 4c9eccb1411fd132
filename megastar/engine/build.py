"""Process group, precision, and the two DeepSpeed engines: the student with its optimizer, the teacher without."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from megastar.config.deepspeed import ZERO_PLUS_PLUS, deepspeed_config, read_deepspeed
from megastar.config.load import resolve_batch
from megastar.config.schema import RunConfig
from megastar.device import pick_dtype
from megastar.engine.networks import Student
from megastar.engine.sharding import AdamWEMA, parameter_groups, refresh_teacher, shard_pairs
from megastar.errors import UserError
from megastar.model.transformer import Transformer

# Its warnings are about choices made here on purpose (a client optimizer under ZeRO, say).
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

OFFLOAD = ("offload_optimizer", "offload_param")


@dataclass
class Context:
    """Where this process stands."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self) -> bool:
        return self.rank == 0


@dataclass
class Engines:
    student: Any  # deepspeed.DeepSpeedEngine around Student
    teacher: Any | None  # deepspeed.DeepSpeedEngine around Transformer, no optimizer
    optimizer: AdamWEMA
    pairs: list[tuple[nn.Parameter, nn.Parameter]]
    micro_batch: int
    accumulation: int

    def refresh_teacher(self) -> None:
        refresh_teacher(self.pairs)


def check_supported(cfg: RunConfig) -> None:
    """Refuse what the configuration can say and the engine cannot do yet."""
    zero = read_deepspeed(cfg.parallel.deepspeed)["zero_optimization"]
    stage = zero["stage"]
    if stage != 3:
        raise UserError(
            f"{cfg.parallel.deepspeed} asks for ZeRO stage {stage}: the engine runs stage 3 only, use configs/ds/zero3.json"
        )
    # Each keeps weights in a second place, which the teacher's refresh does not know of.
    unproven = [
        k for k in ("zero_hpz_partition_size", *ZERO_PLUS_PLUS, *OFFLOAD) if zero.get(k) not in (None, 1, False)
    ]
    if unproven:
        raise UserError(
            f"{cfg.parallel.deepspeed} sets {', '.join(unproven)}: not proven with the sharded teacher, remove it"
        )
    if cfg.parallel.tensor_parallel != 1:
        raise UserError(
            f"parallel.tensor_parallel={cfg.parallel.tensor_parallel}: the engine has no tensor parallelism yet, set it to 1"
        )


def start(cfg: RunConfig) -> Context:
    """Join the process group that torchrun, deepspeed or srun described; alone without one."""
    check_supported(cfg)
    slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    for name, other in slurm.items():
        if name not in os.environ and "SLURM_STEP_ID" in os.environ:
            os.environ[name] = os.environ[other]
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError("MASTER_ADDR is not set: start with torchrun or deepspeed, or set it in the batch script")
    alone = "RANK" not in os.environ
    if "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"  # --gpus-per-task=1: each task sees its own GPU alone, as number 0
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    rank, world, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local} has no GPU of its own, this process sees {torch.cuda.device_count()}: start at most one process a GPU"
            )
        torch.cuda.set_device(device)
        if cfg.train.threads:
            torch.set_num_threads(cfg.train.threads)
    else:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", world)))
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cfg.train.threads or max(1, cores // local_world))
        # Compiling DeepSpeed's shared-memory collective takes minutes and gloo does not need it.
        # (By its full name: the attribute deepspeed.comm.torch is torch itself.)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    backend = "nccl" if cuda else "gloo"
    if alone and not dist.is_initialized():  # no launcher: a store of our own needs no free port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return Context(rank, world, device, pick_dtype(cfg.train.dtype, device))


def build(cfg: RunConfig, ctx: Context) -> Engines:
    """Student and teacher with equal weights, each born in its shards. Raises ``UserError`` for an impossible split."""
    micro, accumulation = resolve_batch(cfg, ctx.world)
    config = deepspeed_config(
        cfg, micro, accumulation, world_size=ctx.world, dtype="bf16" if ctx.dtype == torch.bfloat16 else "fp32"
    )
    torch.manual_seed(cfg.train.seed)  # the same weights on every rank, of which each keeps its shard
    with deepspeed.zero.Init(config_dict_or_path=config):
        student = Student(cfg)
    optimizer = AdamWEMA(
        parameter_groups(student, cfg.optim.weight_decay),
        lr=cfg.optim.lr,
        betas=(cfg.optim.beta1, cfg.optim.beta2),
        eps=cfg.optim.eps,
    )
    engine, wrapped, _, _ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    if not cfg.self_guided.enabled:
        return Engines(engine, None, optimizer, [], micro, accumulation)

    teacher_config = {k: v for k, v in config.items() if k != "gradient_clipping"}
    # A persistent (never partitioned) parameter would not see the refresh, silently.
    teacher_config["zero_optimization"] = {**config["zero_optimization"], "stage3_param_persistence_threshold": 0}
    with deepspeed.zero.Init(config_dict_or_path=teacher_config):
        transformer = Transformer(cfg.model)
    transformer.requires_grad_(False).eval()
    teacher, *_ = deepspeed.initialize(model=transformer, config=teacher_config)
    teacher.eval()
    pairs = shard_pairs(engine.module.transformer, teacher.module)
    engines = Engines(engine, teacher, optimizer, pairs, micro, accumulation)
    engines.refresh_teacher()
    return engines
