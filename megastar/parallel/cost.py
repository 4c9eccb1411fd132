"""Communication, arithmetic and time of a step, and the plans of a run on a machine. Estimates: see ``ASSUMPTIONS``.

Communication is what a rank sends in ring collectives; arithmetic is computed from shapes, fused multiply-adds as two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megastar.config.load import resolve_batch
from megastar.config.rules.model import tensor_parallel_degrees
from megastar.config.rules.problem import words
from megastar.config.schema import ModelConfig, RunConfig, SelfGuidedConfig, TokenizerConfig
from megastar.config.sections.optim import MuonConfig
from megastar.config.sections.repa import RepaConfig
from megastar.errors import UserError
from megastar.parallel.alignment import projector_flops
from megastar.parallel.budget import (
    ELEMENT,
    GIB,
    Zero,
    block_elements,
    elements,
    has_projector,
    kept_elements,
    memory_bytes,
    parameter_shapes,
    runs_teacher_first,
    trunk,
)
from megastar.parallel.evaluation_memory import evaluation_bytes, held_bytes
from megastar.parallel.gpus import BANDWIDTH_EFFICIENCY, Machine
from megastar.parallel.head import OUTPUT, check_tensor, head_products, logits_per_token
from megastar.parallel.muon import muon_traffic, owner_flops

# Assumptions, not measured on the machines below.
RESERVED_GIB = 2.0  # driver, CUDA context, NCCL's and cuBLAS's buffers
FRAGMENTATION = 0.05  # share of the peak that the allocator cannot use
MATMUL_EFFICIENCY = 0.55  # of the GPU's dense peak, in the matrix products
MEMORY_EFFICIENCY = 0.8  # of the GPU's memory bandwidth, in norms, rotations, dropouts, activations, losses, AdamW
LATENCY = 25e-6  # seconds per collective in addition to its bytes
OVERLAP = 0.5  # share of the compute time that can overlap with the data ranks' gathers and reductions
FP32_SLOWDOWN = 16  # bf16 peak over fp32 peak
LOGIT_BYTES = 28  # per bf16 logit: moved by cross_entropy.py besides its matrix products, with the conversion to fp32
SPLIT_LOGIT_BYTES = 44  # the same if the vocabulary is split, with an explicit softmax
BACKWARD = 2  # computation of a backward pass relative to its forward pass
# Bytes per element: fused AdamW 28, average 12, widened gradient 6, its norm 4, clipping 8, weights 6.
OPTIMIZER_TRAFFIC = 64
HOST_LINK = 20e9  # bytes per second between a GPU and host memory
HOST_MEMORY = 20e9  # bytes per second of host memory per rank, for AdamW under offload
NEAR = 0.03  # plans within this share of the fastest are considered equally fast: the simplest of them is recommended
SPARE = 0.05  # share of the GPU's memory that a recommended plan leaves free, if possible


class Moved(NamedTuple):
    """Bytes per token and block that a bf16 pass moves besides its matrix products: ``stream`` per width in norms, dropouts
    and sums; ``split`` per width in RoPE and attention and ``ffn`` per SwiGLU width, both split over the tensor ranks."""

    stream: float
    split: float
    ffn: float

    def bytes(self, model: ModelConfig, tensor: int) -> float:
        return self.stream * model.dim + (self.split * model.dim + self.ffn * model.ffn_dim) / tensor


# Forward and backward pass, counted by benchmarks/gpu/bytes_moved.py; attention is 8 of split forward, 16 backward.
EAGER = (Moved(30, 16, 10), Moved(40, 28, 18))
COMPILED = (Moved(21, 18, 6), Moved(35, 28, 10))

ASSUMPTIONS = {
    "reserved for driver and libraries": f"{RESERVED_GIB:g} GiB, and {FRAGMENTATION:.0%} of the peak lost to fragmentation",
    "matrix products": f"{MATMUL_EFFICIENCY:g} of the dense peak (fp32: a {FP32_SLOWDOWN}th of the bf16 peak)",
    "everything else": f"{MEMORY_EFFICIENCY:g} of the memory bandwidth; the loss moves {LOGIT_BYTES} bytes per logit (split: "
    f"{SPLIT_LOGIT_BYTES}), AdamW {OPTIMIZER_TRAFFIC} per element",
    "backward pass": f"{BACKWARD} times the operations of its forward pass",
    "collectives": f"{BANDWIDTH_EFFICIENCY:g} of the bandwidth, {LATENCY * 1e6:g} us each; those of data ranks overlap "
    f"with {OVERLAP:g} of the computation, those of tensor ranks with none",
    "offload": f"{HOST_LINK / 1e9:g} GB/s to host memory, AdamW there at {HOST_MEMORY / 1e9:g} GB/s per rank",
}


@dataclass(frozen=True)
class Transfer:
    """One kind of collective: bytes that a rank sends in an optimizer step, in ``count`` calls."""

    what: str
    link: str  # "tensor" or "data"
    bytes: int
    count: int
    hidden: bool = False  # whether it can overlap with computation


def assumptions(cfg: RunConfig) -> dict[str, str]:
    """``ASSUMPTIONS`` and what the blocks of this run move."""
    rows = {"eager": EAGER} if cfg.train.compile == "off" else {"compiled": COMPILED, "eager": EAGER}
    where = {"compiled": " without tensor ranks", "eager": " with them" if len(rows) > 1 else ""}
    moved = [
        f"{way}{where[way]}: "
        + ", ".join(
            f"{m.stream:g} D + {m.split:g} D / tp + {m.ffn:g} F / tp {name}"
            for name, m in zip(("forward", "backward"), passes, strict=True)
        )
        for way, passes in rows.items()
    ]
    text = f"train.compile={cfg.train.compile}; bytes moved per token, {'; '.join(moved)}"
    return {**ASSUMPTIONS, "blocks": text}


@dataclass
class Plan:
    """One configuration of a run; bytes per rank, seconds per optimizer step."""

    tensor: int
    zero: Zero
    checkpointing: bool
    compiled: bool
    data: int
    micro: int
    accumulation: int
    memory: dict[str, int]
    host: int
    need: float  # bytes with reserve and fragmentation
    limit: float  # bytes of the GPU
    transfers: list[Transfer]
    compute: float
    communication: float  # what is not hidden
    optimizer: float
    mfu: float
    newton_schulz: float = 0.0  # Muon's iterations on the most loaded rank, part of ``optimizer``
    evaluation: dict[str, int] = field(default_factory=dict)  # memory by cause (evaluation_memory.py), empty without
    evaluating: int = 0  # bytes at the peak of an evaluation, with what exists between steps
    eval_batch: int = 0  # images that it samples at once

    @property
    def fits(self) -> bool:
        return self.need <= self.limit

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.optimizer

    def sent(self, link: str) -> int:
        return sum(t.bytes for t in self.transfers if t.link == link)

    @property
    def overrides(self) -> list[str]:
        """The run's fields that select this plan."""
        return [
            f"parallel.deepspeed={self.zero.file}",
            f"parallel.tensor_parallel={self.tensor}",
            f"parallel.activation_checkpointing={str(self.checkpointing).lower()}",
        ]


# Arithmetic --------------------------------------------------------------------------------------------------------
def teacher_blocks(model: ModelConfig, g: SelfGuidedConfig, again: bool = False) -> int:
    """Blocks that the teacher runs on an image's views: those without a student end at the contrastive block.

    ``again``: it runs on all views up to that block first (``parallel.teacher_features: recompute``)."""
    if not g.enabled:
        return 0
    others = (g.views - (not again) * g.student_views) * g.contrastive_block if has_projector(g) else 0
    return g.student_views * model.n_layer + others


def step_flops(cfg: RunConfig) -> dict[str, int]:
    """Floating-point operations of an optimizer step of all ranks: student (forward and backward), teacher, and recompute
    (the student's blocks again, under checkpointing; not part of MFU); with Muon also newton_schulz, not part of MFU.

    A weight that multiplies each token costs 2 per token in a forward pass; attention 4 S D per token and block (logits
    and values, the causal half not deducted, as in PaLM's MFU). Embeddings cost nothing.
    """
    m, g, B, T = cfg.model, cfg.self_guided, cfg.train.global_batch, cfg.model.image_tokens
    shapes = {n: math.prod(s) for n, s in parameter_shapes(m, g).items() if len(s) == 2}
    block = 2 * T * (block_elements(shapes) + 2 * T * m.dim)  # one block, one sequence, forward
    N = B * cfg.student_views
    head = N * 2 * T * head_products(m)
    projector = N * 2 * g.positions * sum(n for name, n in shapes.items() if name.startswith("projector."))
    projector += projector_flops(m, cfg.repa, N)
    blocks = N * m.n_layer * block
    muon = cfg.optim.of_matrices
    return {
        "student": (1 + BACKWARD) * (blocks + head + projector),
        "teacher": B * teacher_blocks(m, g) * block,
        "recompute": blocks,
        **({"newton_schulz": owner_flops(parameter_shapes(m), muon, 1)[0]} if muon else {}),
    }


def compute_seconds(
    cfg: RunConfig, machine: Machine, tensor: int, checkpointing: bool, compiled: bool, dtype: str, again: bool = False
) -> float:
    """Matrix products split over all GPUs, the rest bound by memory, the residual stream replicated on tensor ranks."""
    m, e, flops = cfg.model, ELEMENT[dtype], step_flops(cfg)
    once, ran = teacher_blocks(m, cfg.self_guided), teacher_blocks(m, cfg.self_guided, again)
    operations = flops["student"] + flops["teacher"] * ran / max(1, once) + checkpointing * flops["recompute"]
    peak = machine.gpu.tflops * 1e12 / (FP32_SLOWDOWN if dtype == "fp32" else 1)
    images = cfg.train.global_batch * tensor / machine.gpus  # per rank
    blocks = cfg.student_views * m.n_layer
    forward, backward = (pass_.bytes(m, tensor) for pass_ in (COMPILED if compiled else EAGER))
    moved = ((blocks * (1 + checkpointing) + ran) * forward + blocks * backward) * e / 2
    moved += (
        cfg.student_views
        * (SPLIT_LOGIT_BYTES if tensor > 1 and m.head == "full" else LOGIT_BYTES)
        * logits_per_token(m, tensor)
    )
    traffic = images * m.image_tokens * moved / (machine.gpu.hbm * 1e9 * MEMORY_EFFICIENCY)
    return operations / (machine.gpus * peak * MATMUL_EFFICIENCY) + traffic


# Communication -----------------------------------------------------------------------------------------------------
def transfers(
    m: ModelConfig,
    g: SelfGuidedConfig,
    zero: Zero,
    tensor: int,
    data: int,
    micro: int,
    accumulation: int,
    checkpointing: bool,
    dtype: str,
    again: bool = False,
    muon: MuonConfig | None = None,
    repa: RepaConfig | None = None,
) -> list[Transfer]:
    """The collectives of an optimizer step on ``tensor`` x ``data`` ranks, without small reductions of metrics.

    AutoTP sums two outputs per block forward (wo, w2) and three input gradients backward (wqkv, w1, w3), and the head's.
    DeepSpeed's stages 1 and 2 reduce gradients by all-reduce (use_multi_rank_bucket_allreduce), stage 3 by
    reduce-scatter; from stage 2 on for each micro-batch. Stages 1 and 2 gather new weights, and the teacher's, once.
    Muon's matrices go to their owners and back over all ranks (engine/zero/matrix_exchange.py).
    """
    e, A, ran = ELEMENT[dtype], accumulation, teacher_blocks(m, g, again)
    counts = elements(m, g, tensor, repa)
    P, teacher, L = sum(counts.values()), trunk(counts), m.n_layer
    out: list[Transfer] = []
    if tensor > 1:
        sequences, ring = micro * g.sequences, 2 * (tensor - 1) / tensor
        sequence = m.image_tokens * m.dim * e * ring

        def reduce(name: str, calls: int, size: float) -> None:
            out.append(Transfer(name, "tensor", round(A * calls * size), A * calls))

        reduce("all-reduce outputs, student", 2 * L * (1 + checkpointing), sequences * sequence)
        whole_head = m.head == "full"  # a factorised one is replicated
        reduce("all-reduce input gradients", 3 * L + whole_head, sequences * sequence)
        if whole_head:
            reduce("all-reduce loss", 2, sequences * m.image_tokens * 1.5 * 4 * ring)
        if g.enabled:
            calls = 2 * (L + (ran > g.student_views * L) * g.contrastive_block)
            size = micro * ran * 2 * sequence / calls
            reduce("all-reduce outputs, teacher", calls, size)
    if data > 1:
        ring = (data - 1) / data
        wide = 4 / e if zero.wide else 1  # of a gradient on the wire

        def share(name: str, size: float, times: int, bucket: int = 0, hidden: bool = True) -> None:
            calls = max(1, math.ceil(size / bucket)) if bucket else 1
            out.append(Transfer(name, "data", round(times * e * size * ring), times * calls, hidden))

        if zero.stage == 3:
            ahead, reused = max(zero.prefetch, block_elements(counts)), kept_elements(counts, zero)
            share("all-gather weights", 2 * P - reused, A, ahead)
            share("reduce-scatter gradients", wide * P, A, zero.reduce_bucket or P)
            if g.enabled:
                unused = sum(n for name, n in counts.items() if name.startswith((OUTPUT, "transformer.norm.")))
                used = teacher - unused
                second = (ran > g.student_views * L) * g.contrastive_block * block_elements(counts)
                share("all-gather teacher", used + second, A, ahead)
        else:
            share("all-reduce gradients", wide * 2 * P, A if zero.stage == 2 else 1, zero.reduce_bucket or 2 * P)
            if zero.stage:
                share("all-gather weights", P, 1, hidden=False)
            if zero.stage and g.enabled:
                share("all-gather teacher", teacher, 1, hidden=False)
        if has_projector(g):
            passes = A if runs_teacher_first(g, A) else 1  # of one gather
            share(
                "all-gather targets", passes * micro * data * g.views * g.positions * m.dim, A // passes, hidden=False
            )
    if muon and data * tensor > 1:
        sent = muon_traffic(parameter_shapes(m), muon, tensor, data, zero.stage == 0)
        e, link = ELEMENT[muon.type_of(dtype)], "data" if data > 1 else "tensor"
        for name, size in (("momentum to owners", sent.collect), ("updates from owners", sent.spread)):
            out.append(Transfer(f"all-to-all {name}", link, round(e * size), sent.buckets))
    return out


# Plans -------------------------------------------------------------------------------------------------------------
def make_plan(
    cfg: RunConfig, machine: Machine, zero: Zero, tensor: int, checkpointing: bool, dtype: str,
    tokenizer: TokenizerConfig | None = None,
) -> Plan:  # fmt: skip
    """One plan. ``tokenizer`` decodes the samples of evaluations; None: LlamaGen's. Raises ``UserError`` if the data ranks
    do not divide the batch."""
    data = machine.gpus // tensor
    micro, accumulation = resolve_batch(cfg.train, tensor, machine.gpus)
    compiled = cfg.train.compile != "off" and tensor == 1
    keep = cfg.parallel.teacher_features == "keep"
    again = not keep and bool(cfg.self_guided.alpha) and runs_teacher_first(cfg.self_guided, accumulation)
    memory, host = memory_bytes(
        cfg.model, cfg.self_guided, zero, tensor, data, micro, checkpointing, dtype, compiled, accumulation, keep,
        cfg.optim.of_matrices, cfg.repa,
    )  # fmt: skip
    evaluation = evaluation_bytes(cfg, tokenizer or TokenizerConfig(), dtype)
    evaluating = held_bytes(memory, zero.stage, data) + sum(evaluation.values()) if evaluation else 0
    need = max(sum(memory.values()), evaluating) * (1 + FRAGMENTATION) + RESERVED_GIB * GIB
    muon = cfg.optim.of_matrices
    sent = transfers(
        cfg.model, cfg.self_guided, zero, tensor, data, micro, accumulation, checkpointing, dtype, again, muon,
        cfg.repa,
    )  # fmt: skip
    compute = compute_seconds(cfg, machine, tensor, checkpointing, compiled, dtype, again)
    exposed, hidden = 0.0, 0.0
    for t in sent:
        rate = machine.tensor_rate() if t.link == "tensor" else machine.data_rate(tensor)
        seconds = t.bytes / rate + t.count * LATENCY
        exposed, hidden = exposed + seconds * (not t.hidden), hidden + seconds * t.hidden
    shard = sum(elements(cfg.model, cfg.self_guided, tensor, cfg.repa).values()) / (data if zero.stage else 1)
    e = ELEMENT[dtype]
    if "optimizer" in zero.offload:  # gradients to the host, new weights back, unless they are offloaded too
        optimizer = shard * (e * (accumulation + 1) / HOST_LINK + OPTIMIZER_TRAFFIC / HOST_MEMORY)
    else:
        optimizer = shard * OPTIMIZER_TRAFFIC / (machine.gpu.hbm * 1e9 * MEMORY_EFFICIENCY)
    if "param" in zero.offload:  # student forward and backward, teacher
        optimizer += 3 * accumulation * shard * e / HOST_LINK
    newton_schulz = 0.0
    if muon:
        slow = FP32_SLOWDOWN if muon.type_of(dtype) == "fp32" else 1
        most = owner_flops(parameter_shapes(cfg.model), muon, machine.gpus)[1]
        newton_schulz = most * slow / (machine.gpu.tflops * 1e12 * MATMUL_EFFICIENCY)
    optimizer += newton_schulz
    flops = step_flops(cfg)
    communication = exposed + max(0.0, hidden - OVERLAP * compute)
    peak = machine.gpus * machine.gpu.tflops * 1e12
    mfu = (flops["student"] + flops["teacher"]) / ((compute + communication + optimizer) * peak)
    return Plan(
        tensor, zero, checkpointing, compiled, data, micro, accumulation, memory, host, need, machine.gpu.memory * GIB, sent,
        compute, communication, optimizer, mfu, newton_schulz, evaluation, evaluating,
        min(cfg.eval.batch, cfg.eval.samples),
    )  # fmt: skip


def make_plans(
    cfg: RunConfig, machine: Machine, zeros: Sequence[Zero], tensor: int = 0, dtype: str = "bf16",
    tokenizer: TokenizerConfig | None = None,
) -> list[Plan]:  # fmt: skip
    """All valid plans, or those of one degree; tensor groups are inside a node. ``UserError`` if there is none."""
    degrees = [d for d in tensor_parallel_degrees(cfg.model) if machine.per_node % d == 0]
    if tensor and tensor not in degrees:
        check_tensor(cfg.model, tensor)
        raise UserError(
            f"tensor parallel degree {tensor}: must divide the {machine.per_node} GPUs of a node; use {words(degrees)}"
        )
    out, errors = [], []
    for degree in [tensor] if tensor else degrees:
        try:
            out += [make_plan(cfg, machine, z, degree, c, dtype, tokenizer) for z in zeros for c in (False, True)]
        except UserError as error:
            errors.append(error)
    if not out:
        raise errors[0]
    return out


def recommend(plans: Sequence[Plan]) -> Plan | None:
    """The simplest of the fastest plans that fit: few tensor ranks, no offload, no recomputation, low stage; None if none.

    Plans that use nearly all of the memory are recommended only if there are no others.
    """
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return None
    fitting = [p for p in fitting if p.need <= (1 - SPARE) * p.limit] or fitting
    best = min(p.seconds for p in fitting)
    near = [p for p in fitting if p.seconds <= best * (1 + NEAR)]
    return min(near, key=lambda p: (p.tensor, bool(p.zero.offload), p.checkpointing, p.zero.stage))
