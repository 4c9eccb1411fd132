"""Lines of ``megastar plan`` about one plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megastar.config.schema import RunConfig
    from megastar.parallel.cost import Plan
    from megastar.parallel.gpus import Machine


def gib(value: float) -> str:
    from megastar.parallel.budget import GIB

    size = value / GIB
    return f"{size:.1f}" if size >= 0.05 or size == 0 else "<0.1"


def largest_of(memory: dict[str, int]) -> str:
    """The two largest causes, as text."""
    return ", ".join(f"{name} {gib(memory[name])} GiB" for name in sorted(memory, key=lambda n: -memory[n])[:2])


def evaluation_line(plan: Plan) -> str:
    """What an evaluation needs on each rank."""
    causes = ", ".join(f"{name} {gib(size)}" for name, size in plan.evaluation.items() if size)
    text = f"an evaluation of {plan.eval_batch} images at once: {gib(plan.evaluating)} GiB per rank at its peak ({causes}; the rest is what the training holds)"
    if plan.evaluating > plan.total:
        text += f", more than a step, which needs {gib(plan.total)}: a smaller eval.batch lowers it"
    return text


def kept_line(cfg: RunConfig, plan: Plan, dtype: str) -> str:
    """What the teacher, which runs on all micro-batches of a step first, leaves in memory; empty where it does not."""
    from megastar.parallel.budget import kept_bytes

    sizes = kept_bytes(cfg.model, cfg.self_guided, plan.micro, plan.data, dtype, plan.accumulation)
    if not sizes["targets"]:
        return ""
    kept = cfg.parallel.teacher_features == "keep"
    text = f"the teacher runs first, on {plan.accumulation} passes: its targets for the step take {sizes['targets'] / 2**20:.1f} MiB"
    if not cfg.self_guided.alpha:
        return text
    size = f"{sizes['teacher features'] / 2**20:.1f} MiB"
    if kept:
        return f"{text}, its last features {size} (parallel.teacher_features=recompute: 0, and its first {cfg.self_guided.contrastive_block} blocks run twice)"
    return f"{text}, its last features are recomputed (parallel.teacher_features=keep: {size}, and no block runs twice)"


def features_of(cfg: RunConfig) -> dict[str, int]:
    """Bytes of the stored features of a crop, and of those that all ranks read in a step; 0 without alignment."""
    from megastar.parallel.alignment import stored_bytes

    crop = stored_bytes(cfg.repa, cfg.model) if cfg.repa.active and not cfg.repa.online else 0
    return {"crop": crop, "step": crop * cfg.train.global_batch * cfg.views}


def features_line(cfg: RunConfig) -> str:
    """What the features of representation alignment take on disk, and what is read of them."""
    from rich.filesize import decimal

    from megastar.parallel.alignment import encoder_width

    size, images = features_of(cfg), 1_281_167
    if cfg.repa.online:
        return (
            f"features of {cfg.model.grid} x {cfg.model.grid} patches, width {encoder_width(cfg.repa)}, are computed in training: each "
            f"image of a step is read, decoded and encoded {cfg.views} times; the encoder's time and memory are not counted"
        )
    return (
        f"features of {cfg.model.grid} x {cfg.model.grid} patches, width {encoder_width(cfg.repa)}: {decimal(size['crop'])} a "
        f"stored crop, {decimal(10 * size['crop'] * images)} for 10 crops of the {images:,} images of ImageNet; all ranks "
        f"read {decimal(size['step'])} of them a step"
    )


def muon_line(cfg: RunConfig, machine: Machine, dtype: str, plan: Plan) -> str:
    """What Muon costs beside AdamW, and saves."""
    from megastar.parallel.budget import GIB, parameter_shapes, state_bytes
    from megastar.parallel.cost import step_flops
    from megastar.parallel.muon import all_matrices

    place = (plan.zero.stage, plan.tensor, plan.data, dtype)
    held = [
        state_bytes(cfg.model, cfg.self_guided, *place, muon=m, repa=cfg.repa)[0]["optimizer"] for m in (False, True)
    ]
    count, flops = len(all_matrices(parameter_shapes(cfg.model), cfg.optim.muon.split_qkv)), step_flops(cfg)
    share = flops["newton_schulz"] / (flops["student"] + flops["teacher"])
    return (
        f"Muon: {count} matrices on {min(count, machine.gpus)} owners; one momentum instead of two moments saves "
        f"{(held[0] - held[1]) / GIB:.2f} GiB per rank; Newton-Schulz {flops['newton_schulz'] / 1e12:.3g} TFLOP per step "
        f"({share:.2%} of the networks'), {plan.newton_schulz * 1e3:.2g} ms on the most loaded rank"
    )
