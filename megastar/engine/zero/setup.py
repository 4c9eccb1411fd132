"""The two DeepSpeed engines: the student with its optimizer, the teacher without."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from megastar.config.deepspeed import deepspeed_config
from megastar.config.load import resolve_batch
from megastar.config.schema import RunConfig, TrainConfig
from megastar.config.sections.optim import rate_warning
from megastar.engine.context import Context
from megastar.engine.lr_schedule import is_frozen, layer_scale, scaled
from megastar.engine.student import Student
from megastar.engine.zero.compiled_blocks import compile_blocks, wants_compiled
from megastar.engine.zero.ema_teacher import ReplicatedTeacher, ShardedTeacher
from megastar.engine.zero.engines import Engines, whole_shapes
from megastar.engine.zero.flat_gradients import flatten_gradients
from megastar.engine.zero.muon import MuonEMA
from megastar.engine.zero.one_data_rank import keep_gradients, step_on_gradients
from megastar.engine.zero.partitions import AdamWEMA, parameter_groups
from megastar.engine.zero.step_skip import install_step_skip
from megastar.engine.zero.streams import order_streams
from megastar.model.attention import plan_attention
from megastar.model.fused import set_fused
from megastar.model.kernels import set_backend
from megastar.model.kernels.select import chosen
from megastar.model.masks import MaskSpec, draw_hidden
from megastar.model.transformer import Transformer
from megastar.parallel.cross_entropy import linear_cross_entropy
from megastar.parallel.plan import autotp_section

logger = logging.getLogger(__name__)
# Its warnings concern deliberate choices, such as a client optimizer under ZeRO.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def build(cfg: RunConfig, ctx: Context) -> Engines:
    """Student and teacher with equal weights, created in shards. Raises ``UserError`` for an impossible split."""
    micro, accumulation = resolve_batch(cfg.train, cfg.parallel.tensor_parallel, ctx.world)
    config = deepspeed_config(
        cfg, micro, accumulation, world_size=ctx.world, dtype="bf16" if ctx.dtype == torch.bfloat16 else "fp32"
    )
    masked = choose_attention(cfg, ctx, micro)
    set_fused(cfg.train.fused_ops == "auto" and not cfg.train.deterministic)
    compiled = wants_compiled(cfg, ctx, masked)
    stage = config["zero_optimization"]["stage"]
    if stage == 0 and not cfg.optim.grad_clip:
        config["gradient_clipping"] = 1e30  # clips nothing, but computes and checks the norm
    torch.manual_seed(cfg.train.seed)  # the same weights on every rank; each keeps its shard
    with zero_init_context(config, ctx):
        student = Student(cfg)
    if compiled:
        compile_blocks(student.transformer)  # before the engine looks for leaf modules
    config |= {"tensor_parallel": autotp_section(ctx.tensor)} if ctx.tensor > 1 else {}
    o = cfg.optim
    groups = parameter_groups(student, o.weight_decay, o.of_matrices, lambda name: rate_scale(cfg, name))
    adamw: dict[str, Any] = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps}
    optimizer = MuonEMA(groups, o.muon, ctx.dtype, **adamw) if o.of_matrices else AdamWEMA(groups, **adamw)
    if ctx.main and (warning := rate_warning(o, scaled(o.muon.lr, o, cfg.train.global_batch))):
        logger.warning(warning)
    engine = initialize(student, config, optimizer)
    freeze(engine.module, cfg.train)
    if isinstance(optimizer, MuonEMA):
        optimizer.attach(engine, ctx, whole_shapes(engine.module, ctx))
    if ctx.tensor_group is not None and cfg.model.head == "full":  # a factorised head is replicated
        split_loss(engine.module.transformer.output, ctx.tensor_group)
    engines = Engines(engine, None, optimizer, micro, accumulation)
    if not cfg.self_guided.enabled:
        return engines

    teacher_config = {k: v for k, v in config.items() if k != "gradient_clipping"}
    if stage == 3:
        zero = {k: v for k, v in config["zero_optimization"].items() if k != "offload_optimizer"}
        # A persistent (never partitioned) parameter would silently miss the refresh.
        teacher_config["zero_optimization"] = {**zero, "stage3_param_persistence_threshold": 0}
        with zero_init_context(teacher_config, ctx):
            transformer = Transformer(cfg.model)
        transformer.requires_grad_(False).eval()
        if compiled:
            compile_blocks(transformer)
        teacher = initialize(transformer, teacher_config)
        teacher.eval()
        engines.teacher = ShardedTeacher(teacher, engine, optimizer)
    else:
        transformer = Transformer(cfg.model).to(ctx.device, ctx.dtype)
        transformer.requires_grad_(False).eval()
        if compiled:
            compile_blocks(transformer)
        if ctx.tensor > 1:  # an engine of stage 0 only splits the layers
            transformer = initialize(transformer, teacher_config | {"zero_optimization": {"stage": 0}}).module
        engines.teacher = ReplicatedTeacher(transformer, engine, optimizer)
    assert not any(q.requires_grad for q in transformer.parameters())
    engines.refresh_teacher()
    return engines


def rate_scale(cfg: RunConfig, name: str) -> float:
    """Factor of the learning rate of the student's weight ``name``."""
    return 0.0 if is_frozen(name, cfg.train) else layer_scale(name, cfg.model.n_layer, cfg.optim.layer_decay)


def freeze(module: nn.Module, train: TrainConfig) -> None:
    """Zero the gradients of the frozen weights where the backward pass makes them.

    They count neither in the gradient's norm nor in the moments, so that no step changes these weights. They stay
    parameters of the engine: shards, checkpoints and average treat all weights alike.
    """
    for name, p in module.named_parameters():
        if is_frozen(name, train):
            p.register_hook(torch.zeros_like)


def choose_attention(cfg: RunConfig, ctx: Context, micro: int) -> bool:
    """Set the attention backend of this run and, on a GPU, compare it with sdpa at the run's shapes before the first step.

    Returns whether training has a mask. Raises ``UserError`` for a backend that does not support the run.
    """
    m, guided, size = cfg.model, cfg.self_guided, cfg.model.image_tokens
    batch = micro * cfg.student_views
    masks: tuple[MaskSpec, ...] = ()
    if guided.enabled and round(guided.mask_ratio * (size - 1)) > 0:
        ids = torch.arange(batch)
        hidden = draw_hidden(cfg.train.seed, torch.zeros_like(ids), ids, size, guided.mask_ratio)
        masks = (MaskSpec.hidden(hidden.to(ctx.device)),)
    set_backend(cfg.attention.backend, device=ctx.device, dtype=ctx.dtype, head_dim=m.head_dim, masks=masks)
    if ctx.device.type == "cuda":
        split = dataclasses.replace(m, n_head=m.n_head // ctx.tensor, dim=m.dim // ctx.tensor)  # of a tensor rank
        plan_attention(split, masks[0] if masks else None, batch, size, ctx.device, ctx.dtype)
        with torch.no_grad():  # teacher and validation
            plan_attention(split, None, batch, size, ctx.device, ctx.dtype)
    return bool(masks)


def chosen_kernels(transformer: Transformer) -> dict[str, Any]:
    """For the record of a run: the attention backend of each kind of mask, and whether the blocks are compiled."""
    return {"attention": chosen(), "compiled": "forward" in vars(transformer.layers[0])}


def split_loss(output: nn.Module, group: dist.ProcessGroup) -> None:
    """Give the layer with which AutoTP replaced ``model.layers.Head`` the loss over its part of the vocabulary."""
    logits: Callable[[torch.Tensor], torch.Tensor] = output.forward

    def forward(x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return logits(x)
        assert isinstance(output.weight, torch.Tensor)
        return linear_cross_entropy(x.flatten(0, -2), output.weight, targets.flatten(), group)

    output.forward = forward


def zero_init_context(config: dict[str, Any], ctx: Context) -> AbstractContextManager[Any]:
    """``zero.Init`` at stage 3, so that no rank ever holds a whole network; a null context at the other stages.

    It needs the data group: over all ranks it would mix the shards of tensor ranks.
    """
    if config["zero_optimization"]["stage"] < 3:
        return nullcontext()
    group = ctx.data_group if ctx.tensor > 1 else None
    context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=config, data_parallel_group=group)
    return context


def import_muon() -> None:
    """Import DeepSpeed's Muon with the compiler off. DeepSpeed imports it with any optimizer under ZeRO, and a
    ``torch.compile`` in it imports the compiler, which takes a quarter of the CPU time of a rank's start and is not used."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def initialize(module: nn.Module, config: dict[str, Any], optimizer: AdamWEMA | None = None) -> Any:
    import_muon()
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    # DeepSpeed compares the first batch of a tensor group by pickling it; `parallel.check_batches` compares every batch.
    if hook := getattr(engine, "first_dataloader_check", None):
        hook.remove()
    if optimizer is not None:
        install_step_skip(engine, optimizer)
        if not keep_gradients(engine):
            if not flatten_gradients(engine):
                order_streams(engine)
        elif engine.zero_optimization_stage():
            step_on_gradients(engine, optimizer)
    return engine
