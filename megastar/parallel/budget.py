"""Memory of one rank by cause, computed from shapes: no module is built, neither torch nor DeepSpeed is imported.

Legend: D width, F SwiGLU width, H heads, S sequence, V vocabulary, N sequences of a forward pass, e bytes of an element
of the compute type. State bytes are exact except for ZeRO's padding; activations are what autograd saves in model/.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megastar.config.rules.problem import words
from megastar.config.schema import ModelConfig, SelfGuidedConfig
from megastar.config.sections.optim import MuonConfig
from megastar.config.sections.repa import RepaConfig
from megastar.errors import UserError
from megastar.parallel.alignment import alignment_bytes, projector_shapes
from megastar.parallel.head import check_tensor, embedding_shapes, head_bytes, head_shapes
from megastar.parallel.muon import muon_traffic, working_bytes
from megastar.parallel.plan import block_matrix, own_masters, split_of

GIB = 2**30
ELEMENT = {"bf16": 2, "fp32": 4}  # bytes of an element of the compute type

# Temporary bytes per element in the optimizer's step: the fp32 gradient and a flat copy of the bf16 one.
STEP_BYTES = 6
IN_PLACE_STEP_BYTES = 4  # with one data rank: the fp32 gradient alone, and not even that in fp32 with AdamW


@dataclass(frozen=True)
class Zero:
    """The settings of DeepSpeed's ``zero_optimization`` that affect memory; sizes in elements, DeepSpeed's defaults."""

    stage: int
    offload: tuple[str, ...] = ()  # of "optimizer" and "param": what is in host memory
    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    persistence: int = 100_000
    overlap: bool = False
    wide: bool = False  # gradients are summed over ranks in fp32
    file: str = ""  # the JSON it was read from

    @property
    def label(self) -> str:
        return f"{self.stage}+offload" if self.offload else str(self.stage)

    @classmethod
    def read(cls, json: Mapping[str, Any], file: str = "") -> Zero:
        """From a DeepSpeed JSON that config/deepspeed.py has validated."""
        z = json["zero_optimization"]
        values = {
            "reduce_bucket": z.get("reduce_bucket_size"),
            "prefetch": z.get("stage3_prefetch_bucket_size"),
            "max_live": z.get("stage3_max_live_parameters"),
            "max_reuse": z.get("stage3_max_reuse_distance"),
            "persistence": z.get("stage3_param_persistence_threshold"),
        }
        sizes = {name: int(value) for name, value in values.items() if value not in (None, "auto")}
        if z.get("contiguous_gradients") is False:
            sizes["reduce_bucket"] = 0
        offload = [k for k in ("optimizer", "param") if (z.get(f"offload_{k}") or {}).get("device", "none") != "none"]
        overlap = z.get("overlap_comm")
        return cls(
            z["stage"],
            tuple(offload),
            overlap=z["stage"] == 3 if overlap is None else overlap,
            wide=json.get("communication_data_type") == "fp32",
            file=file,
            **sizes,
        )


# Shapes ------------------------------------------------------------------------------------------------------------
def has_projector(guided: SelfGuidedConfig) -> bool:
    """Whether a contrastive loss is enabled, so that the student has a projector (engine/student.py)."""
    return guided.enabled and guided.beta > 0 and (guided.step_loss or guided.view_loss)


def runs_teacher_first(guided: SelfGuidedConfig, accumulation: int) -> bool:
    """Whether the teacher runs on all ``accumulation`` micro-batches of a step before the student's first pass."""
    return accumulation > 1 and has_projector(guided) and guided.negatives != "micro_batch"


def parameter_shapes(
    model: ModelConfig, guided: SelfGuidedConfig | None = None, repa: RepaConfig | None = None
) -> dict[str, tuple[int, ...]]:
    """Every weight of the student by its name, in the module's order: ``transformer.*``, then those of its projectors."""
    D, F = model.dim, model.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.cls_embedding.embedding_table.weight": (model.num_classes + 1, D),
        **embedding_shapes(model),
    }
    for i in range(model.n_layer):
        block = {
            "attention_norm.weight": (D,),
            "attention.wqkv.weight": (3 * D, D),
            "attention.wo.weight": (D, D),
            "ffn_norm.weight": (D,),
            "feed_forward.w1.weight": (F, D),
            "feed_forward.w3.weight": (F, D),
            "feed_forward.w2.weight": (D, F),
        }
        shapes |= {f"transformer.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"transformer.norm.weight": (D,), **head_shapes(model)}
    if model.target_position != "none":
        shapes |= {"transformer.target_embeddings.weight": (model.image_tokens, D)}
    if guided is not None and has_projector(guided):
        P = guided.projector_dim
        for name, rows, columns in (("w1", P, D), ("w2", P, P), ("w3", D, P)):
            shapes |= {f"projector.{name}.weight": (rows, columns), f"projector.{name}.bias": (rows,)}
    return shapes | projector_shapes(model, repa)


def elements(
    model: ModelConfig, guided: SelfGuidedConfig, tensor: int = 1, repa: RepaConfig | None = None
) -> dict[str, int]:
    """Elements of each weight on one tensor rank: split weights divided by ``tensor``, others replicated."""
    check_tensor(model, tensor)
    counts = {name: math.prod(shape) for name, shape in parameter_shapes(model, guided, repa).items()}
    return {name: n // tensor if split_of(name) else n for name, n in counts.items()}


def trunk(counts: Mapping[str, int]) -> int:
    """Elements of the transformer, which the teacher also has; only the student has projectors."""
    return sum(n for name, n in counts.items() if name.startswith("transformer."))


def block_elements(counts: Mapping[str, int]) -> int:
    """Elements of one block."""
    return sum(n for name, n in counts.items() if name.startswith("transformer.layers.0."))


def matrix_elements(counts: Mapping[str, int]) -> int:
    """Elements of the weights that Muon updates."""
    return sum(n for name, n in counts.items() if block_matrix(name))


# States ------------------------------------------------------------------------------------------------------------
def state_bytes(
    model: ModelConfig,
    guided: SelfGuidedConfig,
    stage: int,
    tensor: int = 1,
    data: int = 1,
    dtype: str = "bf16",
    offload: Collection[str] = (),
    muon: bool = False,
    repa: RepaConfig | None = None,
) -> tuple[dict[str, int], int]:
    """Bytes on one rank's device between steps, and in its host memory. By cause: weights, gradients, optimizer (fp32
    masters and two moments), ema (in the optimizer), teacher (its compute copy, transformer only).

    ``data`` is the number of data ranks, ``dtype`` the compute type, bf16 or fp32; ``offload`` contains "optimizer" or
    "param" (stage 3); ``muon``: the blocks' matrices have one moment. Exact except for padding: at stage 3 each weight is split into ``data`` equal parts, rounded up;
    at 1 and 2 their sum is. Raises ``UserError`` for an invalid ``tensor``, stage or type.
    """
    if stage not in (0, 1, 2, 3):
        raise UserError(f"ZeRO stage {stage}: must be 0, 1, 2 or 3")
    if dtype not in ELEMENT:
        raise UserError(f"dtype {dtype!r}: must be {words(list(ELEMENT))}")
    if stage == 0 and dtype != "fp32":
        raise UserError(f"ZeRO stage 0 with dtype {dtype} loses precision (no fp32 masters): use stage 1 to 3")
    if offload and stage != 3:
        raise UserError(f"offload of {words(sorted(offload))} with ZeRO stage {stage}: use stage 3")
    e, counts = ELEMENT[dtype], elements(model, guided, tensor, repa)
    whole = sum(counts.values())
    if stage == 3:
        split = {name: -(-n // data) for name, n in counts.items()}
        part, teacher_part, matrices = sum(split.values()), trunk(split), matrix_elements(split)
    else:
        ranks = 1 if stage == 0 else data
        part, teacher_part, matrices = -(-whole // ranks), trunk(counts), -(-matrix_elements(counts) // ranks)
    states = {
        "weights": e * (part if stage == 3 else whole),
        "gradients": e * (part if stage >= 2 else whole),
        "optimizer": part * (8 if own_masters(stage, data, dtype) else 12) - 4 * muon * matrices,
        "ema": part * 4,
        "teacher": e * teacher_part if guided.enabled else 0,
    }
    host: dict[str, int] = {}
    if "optimizer" in offload:
        # DeepSpeed's buffer of gradient partitions is with the optimizer, and an fp32 copy of it.
        host = {name: states[name] for name in ("gradients", "optimizer", "ema")} | {"fp32 gradients": part * 4}
    if "param" in offload:
        host |= {name: states[name] for name in ("weights", "teacher")}
    return {name: 0 if name in host else value for name, value in states.items()}, sum(host.values())


# Activations -------------------------------------------------------------------------------------------------------
def block_activation_bytes(
    model: ModelConfig, sequences: int, tensor: int = 1, dtype: str = "bf16", compiled: bool = False
) -> int:
    """What autograd saves of one block for the backward pass on a GPU (model/transformer.py, attention.py, fused.py).

    Replicated on each tensor rank: of each norm the input, the output (the next layers' input) and 1 / rms in fp32, and a
    one-byte mask per dropout. Split over the tensor ranks: the fused q, k, v (kept by v, a view of it), q and k after
    RoPE, attention's output, its log-sum-exp in fp32, and w1's output, its SiLU, w3's output, their product. A
    ``compiled`` block computes the SiLU again.
    """
    e, D, F = ELEMENT[dtype], model.dim, model.ffn_dim
    masks = D * ((model.resid_dropout_p > 0) + (model.ffn_dropout_p > 0))
    whole = 2 * (2 * e * D + 4) + masks
    split = (3 + 2 + 1) * e * D + 4 * model.n_head + (3 if compiled else 4) * e * F
    return sequences * model.image_tokens * whole + sequences * model.image_tokens * split // tensor


def kept_activation_bytes(
    model: ModelConfig,
    sequences: int,
    tensor: int = 1,
    dtype: str = "bf16",
    checkpointing: bool = False,
    compiled: bool = False,
) -> int:
    """What the student's forward pass keeps for its backward pass, without the loss.

    With ``checkpointing`` a block keeps only its input. The embedding (indices, mask) and the final norm are always kept.
    """
    e, tokens = ELEMENT[dtype], sequences * model.image_tokens
    block = tokens * e * model.dim
    if not checkpointing:
        block = block_activation_bytes(model, sequences, tensor, dtype, compiled)
    ends = tokens * (8 + model.dim * (model.token_dropout_p > 0) + 2 * e * model.dim + 4)
    return model.n_layer * block + ends


def forward_working_bytes(
    model: ModelConfig, sequences: int, tensor: int = 1, dtype: str = "bf16", compiled: bool = False
) -> int:
    """Peak of a forward pass without a graph, in the SwiGLU: its operands, the norm's input and output, the block's input,
    and the features that are returned."""
    e, tokens = ELEMENT[dtype], sequences * model.image_tokens
    return tokens * e * (4 * model.dim + (3 if compiled else 4) * model.ffn_dim // tensor)


def backward_working_bytes(
    model: ModelConfig, sequences: int, tensor: int = 1, dtype: str = "bf16", compiled: bool = False
) -> int:
    """What one block's backward pass allocates beyond what it frees: gradients of the SwiGLU's operands and the residual."""
    e, tokens = ELEMENT[dtype], sequences * model.image_tokens
    return tokens * e * (model.dim + (1 if compiled else 2) * model.ffn_dim // tensor)


def loss_bytes(
    m: ModelConfig, g: SelfGuidedConfig, micro: int, tensor: int, data: int, dtype: str, accumulation: int = 1
) -> dict[str, int]:
    """Memory of the losses of ``micro`` images: the head's gradients, kept for the backward pass; features of L_MIM; the
    contrastive losses over ``data`` ranks, and all ``accumulation`` passes where the teacher runs first.

    L_MIM: both networks' last features, in fp32 the student's (a copy in bf16) and the teacher's unit vectors.
    Contrastive: the gathered targets (unless ``kept_bytes`` counts them), their fp32 unit vectors and copies for each pair of views, and four copies of
    the logits (product, selection, log-softmax, gradient).
    """
    e, N = ELEMENT[dtype], micro * g.sequences
    out = {"head": head_bytes(m, N, tensor, dtype)[0], "features": 0, "contrastive": 0}
    if g.enabled and g.alpha:
        out["features"] = N * m.image_tokens * m.dim * (2 * e + 4 + (4 if e < 4 else 0))
    if has_projector(g):
        first = runs_teacher_first(g, accumulation)
        K, Ms, pairs = g.positions, g.student_views, g.student_views * (g.views - 1)
        images = micro * data * (accumulation if first else 1)
        vectors = images * K * m.dim * (e * g.views * (not first) + 4 * (2 * g.views + pairs))
        logits = micro * images * (Ms * K * (4 * K - 3) * g.step_loss + 4 * pairs * K * g.view_loss)
        out["contrastive"] = vectors + 4 * logits
    return out


def kept_bytes(
    m: ModelConfig, g: SelfGuidedConfig, micro: int, data: int, dtype: str, accumulation: int, keep: bool = True
) -> dict[str, int]:
    """What a step holds where the teacher runs first: targets of all images of the step, and with ``keep`` the last
    features of this rank's micro-batches other than the current one."""
    if not runs_teacher_first(g, accumulation):
        return {"targets": 0, "teacher features": 0}
    e = ELEMENT[dtype]
    features = (accumulation - 1) * micro * g.sequences * m.image_tokens * m.dim * e
    targets = accumulation * micro * data * g.views * g.positions * m.dim * e
    return {"targets": targets, "teacher features": features if keep and g.alpha else 0}


# ZeRO's buffers ----------------------------------------------------------------------------------------------------
def kept_elements(counts: Mapping[str, int], zero: Zero) -> int:
    """Weights that stage 3 keeps gathered from forward to backward pass: those within the maximum reuse distance.

    A weight p elements before the end of the forward pass is used again 2 p elements later.
    """
    return min(sum(counts.values()), zero.max_reuse // 2, zero.max_live)


def buffer_bytes(
    model: ModelConfig,
    guided: SelfGuidedConfig,
    zero: Zero,
    tensor: int = 1,
    dtype: str = "bf16",
    repa: RepaConfig | None = None,
) -> dict[str, int]:
    """gather: weights that stage 3 has gathered at once; buckets: of the gradients' reduction.

    Student: the weights kept for the backward pass, or one block, and the prefetched ones, at most all; teacher: one
    block, or its largest weight, and the prefetched ones. Two buckets: with ``overlap_comm`` one is filled while the
    other is sent (stages 1 and 2), and stage 3's reduce-scatter copies its bucket; a sum in fp32 requires a wide copy.
    """
    e, counts = ELEMENT[dtype], elements(model, guided, tensor, repa)
    gather = 0
    if zero.stage == 3:
        largest = max(block_elements(counts), *counts.values())
        small = sum(n for n in counts.values() if n <= zero.persistence)
        student = min(sum(counts.values()), max(kept_elements(counts, zero), largest + small) + zero.prefetch)
        teacher = min(trunk(counts), largest + zero.prefetch) if guided.enabled else 0
        gather = e * (student + teacher)
    buckets = 0 if zero.stage == 0 else e * zero.reduce_bucket * (2 if zero.stage == 3 or zero.overlap else 1)
    if zero.stage and zero.wide and e < 4:
        buckets += 4 * zero.reduce_bucket
    return {"gather": gather, "buckets": buckets}


# Everything --------------------------------------------------------------------------------------------------------
def memory_bytes(
    model: ModelConfig,
    guided: SelfGuidedConfig,
    zero: Zero,
    tensor: int,
    data: int,
    micro: int,
    checkpointing: bool,
    dtype: str = "bf16",
    compiled: bool = False,
    accumulation: int = 1,
    keep_features: bool = True,
    muon: MuonConfig | None = None,
    repa: RepaConfig | None = None,
) -> tuple[dict[str, int], int]:
    """Peak bytes of one rank's device by cause, and bytes of its host memory. The sum of the former is the peak of a step
    of ``accumulation`` passes of ``micro`` images; each value is that at the peak.

    ``activations`` is kept for the backward pass, with the mask; ``head``, ``features``, ``contrastive`` belong to the
    losses; ``working`` is what the phase of the peak needs besides: the head, the teacher's forward pass, a recomputed
    block and its backward pass, or the optimizer's step; ``kept`` is ``kept_bytes``, which passes of the step share.
    """
    N, options = micro * guided.sequences, (tensor, dtype)
    states, host = state_bytes(model, guided, zero.stage, tensor, data, dtype, zero.offload, muon is not None, repa)
    kept = kept_activation_bytes(model, N, *options, checkpointing, compiled)
    if guided.enabled and guided.mask_ratio:  # sdpa's additive mask, once for all blocks (model/masks.py)
        kept += N * model.image_tokens**2 * ELEMENT[dtype]
    if model.target_position != "none":  # RoPE's rows of each sequence, once for all blocks (model/token_order.py)
        kept += 4 * N * model.image_tokens * model.head_dim * (2 if model.target_position == "rotary" else 1)
    losses = loss_bytes(model, guided, micro, tensor, data, dtype, accumulation)
    losses["features"] += alignment_bytes(model, repa, N, ELEMENT[dtype])
    buffers = buffer_bytes(model, guided, zero, *options, repa)
    first = keep_features and runs_teacher_first(guided, accumulation)
    held = {"kept": sum(kept_bytes(model, guided, micro, data, dtype, accumulation, keep_features).values())}
    head_kept, head = {"activations": kept, "head": losses["head"]}, head_bytes(model, N, *options)[1]
    backward = backward_working_bytes(model, N, *options, compiled)
    block = block_activation_bytes(model, N, *options, compiled)
    late = {"gradients": states.pop("gradients"), "buckets": buffers.pop("buckets")}
    in_place = data == 1 and zero.stage < 3  # engine/zero/one_data_rank.py
    if in_place:
        late["buckets"] = 0
    early = {"gradients": late["gradients"]} if accumulation > 1 or (zero.stage >= 2 and not in_place) else {}
    first_bucket = min(late["buckets"], ELEMENT[dtype] * zero.reduce_bucket)
    # Gathered weights of the teacher are released after its pass, those of the student after the backward pass; with one
    # data rank they are views. At stage 3 the buckets exist from the first step on.
    student = {"gather": buffer_bytes(model, replace(guided, enabled=False), zero, *options, repa)["gather"]}
    if data == 1:
        student = buffers = {}
    early |= {"buckets": 2 * first_bucket} if zero.stage == 3 else {}
    shard = sum(elements(model, guided, tensor, repa).values()) // (data if zero.stage else 1)
    in_step = (IN_PLACE_STEP_BYTES if dtype == "bf16" or muon else 0) if in_place else STEP_BYTES
    updating = 0 if "optimizer" in zero.offload else in_step * shard
    if muon:
        traffic = muon_traffic(parameter_shapes(model), muon, tensor, data, zero.stage == 0)
        updating += working_bytes(traffic, ELEMENT[muon.type_of(dtype)], tensor * data == 1)
    teacher = forward_working_bytes(model, micro * guided.views, *options, compiled) if guided.enabled else 0
    phases: list[dict[str, int]] = [
        head_kept | early | student | held | {"working": head},
        ({} if first else head_kept) | early | buffers | held | {"working": teacher},
        head_kept | early | student | held | losses,
        # The backward pass: before the first bucket of gradients is full, and when only the first block is left.
        head_kept | {"buckets": first_bucket} | early | student | held | {"working": backward + checkpointing * block},
        late | student | {"activations": 0 if checkpointing else block, "working": backward + checkpointing * block},
        late | {"buckets": (1 + (zero.stage == 3)) * first_bucket, "working": updating},
    ]
    causes = ("gradients", "activations", "head", "features", "contrastive", "kept", "working", "gather", "buckets")
    peak = max(phases, key=lambda phase: sum(phase.values()))
    return states | {name: peak.get(name, 0) for name in causes}, host
