"""``megastar plan``: estimate memory, communication and time of a run on a machine."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megastar.commands._shared.common import (
    MOST,
    Parser,
    bounded,
    config_and_overrides,
    positive,
    processes,
    terminal_width,
)
from megastar.commands._shared.json_output import PlanReport, only_json
from megastar.commands._shared.plan_text import (
    evaluation_line,
    features_line,
    features_of,
    gib,
    kept_line,
    largest_of,
    muon_line,
)
from megastar.errors import UserError, nearest
from megastar.utils.printable import one_line, say

if TYPE_CHECKING:
    from rich.table import Table

    from megastar.config.schema import ParallelConfig, RunConfig, TokenizerConfig
    from megastar.parallel.budget import Zero
    from megastar.parallel.cost import Plan
    from megastar.parallel.gpus import Machine

EXAMPLES = """
megastar plan configs/run/star_xl_300ep.yaml --gpus 8 --gpu h100
megastar plan xl --gpus 16 --gpus-per-node 8 --gpu a100-40
megastar plan 3b --gpus 32 --all train.global_batch=1024
megastar plan xxl --tensor-parallel 2 --json
megastar plan b --gpus 1 --gpu rtx4090 --memory 16 train.global_batch=64
"""
SIZES = {  # size -> its ST-AR run
    "nano": "configs/run/demo.yaml",
    "b": "configs/run/star_b_300ep.yaml",
    "l": "configs/run/star_l_300ep.yaml",
    "xl": "configs/run/star_xl_300ep.yaml",
    "xxl": "configs/run/star_xxl.yaml",
    "3b": "configs/run/star_3b.yaml",
}
STAGES = ("configs/ds/zero1.json", "configs/ds/zero2.json", "configs/ds/zero3.json", "configs/ds/zero3_offload.json")
SHOWN, NEAREST = 5, 3  # rows without --all: the best that fit, the closest that do not
MEASURES = {  # of a GPU -> help of the option that overrides it
    "memory": "memory of a GPU, GiB",
    "tflops": "dense bf16 peak, TFLOP/s",
    "hbm": "memory bandwidth, GB/s",
    "nvlink": "bandwidth within a node, GB/s per GPU, both directions together",
    "network": "bandwidth between nodes, GB/s per GPU and direction",
}


def parser() -> Parser:
    p = Parser(
        "plan",
        "Show what a run needs on a machine for every valid split, and recommend one. Exit status 1 if nothing fits.",
        EXAMPLES,
    )
    items = f"configuration or size ({', '.join(SIZES)}), fields to override"
    p.add_argument("items", nargs="*", metavar="RUN section.field=value", help=items)
    p.add_argument("--gpus", type=bounded(int, 1, 10**6), default=8, help="total number of GPUs")
    p.add_argument("--gpus-per-node", type=processes, help="GPUs per node (default 8, or all if fewer)")
    p.add_argument("--gpu", default="h100", help="type of GPU (default h100); an unknown name lists the types")
    for name, text in MEASURES.items():
        p.add_argument(f"--{name}", type=bounded(float, 1e-6, MOST), help=f"{text} (default: by --gpu)")
    p.add_argument("--tensor-parallel", type=positive, default=0, help="consider only this degree (default: all)")
    p.add_argument("--all", action="store_true", help="show every plan, not only the best")
    p.add_argument("--json", action="store_true", help="print every plan as JSON, in bytes and seconds")
    return p


def main(words: list[str]) -> int:
    args = parser().parse(words)
    with only_json(args.json) as print_json:
        return plan(args, print_json)


def plan(args: argparse.Namespace, print_json: Callable[[object], None]) -> int:
    from megastar.config.load import load_config
    from megastar.data.shards.local_sizes import take_local_sizes
    from megastar.parallel.cost import make_plans, recommend

    run, overrides = config_and_overrides(args.items)
    if run is None:
        raise UserError(f"name a run configuration or a size, {', '.join(SIZES)}; see megastar plan --help")
    if run not in SIZES and "." not in run and "/" not in run and not os.path.isfile(run):
        raise UserError(f"size {run!r} is unknown: {nearest(run, SIZES)}")
    cfg = load_config(SIZES.get(run, run), overrides)
    sizes = take_local_sizes(cfg)
    if sizes and not cfg.model.unset:
        say(one_line(sizes), sys.stderr)
    tokenizer, assumed = tokenizer_of(cfg)
    if assumed:
        say(assumed, sys.stderr)
    machine = describe_machine(args)
    dtype = "bf16" if cfg.train.dtype == "auto" else cfg.train.dtype
    plans = make_plans(cfg, machine, zeros_of(cfg.parallel, dtype), args.tensor_parallel, dtype, tokenizer)
    plans.sort(key=lambda p: (not p.fits, p.seconds if p.fits else p.need))
    best = recommend(plans)
    if args.json:
        print_json(as_json(cfg, machine, dtype, plans, best))
    else:
        show(cfg, machine, dtype, plans, best, args.all)
    return 0 if best else 1


def describe_machine(args: argparse.Namespace) -> Machine:
    from megastar.parallel.gpus import GPUS, Machine

    if args.gpu not in GPUS:
        # Of several GPUs of one name, which differ in memory, the larger one first.
        alike = sorted((g for g in GPUS if g.split("-")[0] == args.gpu.lower()), key=lambda g: -GPUS[g].memory)
        known = f"choose {' or '.join(alike)}." if alike else nearest(args.gpu, GPUS)
        raise UserError(
            f"gpu {args.gpu!r} is unknown: {known} "
            "For another GPU give the closest type and override --memory, --tflops, --hbm, --nvlink, --network"
        )
    overrides = {name: getattr(args, name) for name in MEASURES if getattr(args, name) is not None}
    per_node = args.gpus_per_node or min(8, args.gpus)
    if args.gpus % per_node:
        raise UserError(
            f"--gpus {args.gpus} is not a multiple of {per_node} GPUs per node: change --gpus or --gpus-per-node"
        )
    name = args.gpu + "".join(f", {k} {v:g}" for k, v in overrides.items())
    return Machine(name, dataclasses.replace(GPUS[args.gpu], **overrides), args.gpus, per_node)


def tokenizer_of(cfg: RunConfig) -> tuple[TokenizerConfig | None, str]:
    """The architecture that decodes the samples of ``eval.every``, and a line about one that is assumed."""
    from pathlib import Path

    from megastar.config.schema import TokenizerConfig
    from megastar.tokenizer.io import read_tokenizer_metadata

    if not cfg.eval.every:
        return None, ""
    path = cfg.data.tokenizer
    if path and Path(path).is_file():
        return read_tokenizer_metadata(path)[0], ""
    shape = TokenizerConfig()
    shape.image_size = cfg.model.grid * shape.downsample
    return (
        shape,
        f"{path} is not here: the memory of evaluations is that of LlamaGen's VQ-16 at {shape.image_size} pixels",
    )


def zeros_of(parallel: ParallelConfig, dtype: str) -> list[Zero]:
    """The ZeRO stages to compare: those of configs/ds, with the run's own JSON in place of its stage."""
    from megastar.config.deepspeed import read_deepspeed
    from megastar.parallel.budget import Zero

    own = Zero.read(read_deepspeed(parallel.deepspeed), parallel.deepspeed)
    found = {z.label: z for z in (Zero.read(read_deepspeed(f), f) for f in STAGES)} | {own.label: own}
    return [found[label] for label in sorted(found) if not (label == "0" and dtype == "bf16")]


# Output ------------------------------------------------------------------------------------------------------------
def why(plan: Plan, plans: list[Plan]) -> str:
    """The reason for a recommendation."""
    from megastar.parallel.cost import NEAR, SPARE

    fitting = [p for p in plans if p.fits]
    fastest = min(fitting, key=lambda p: p.seconds)
    without = [n for n, used in (("tensor ranks", plan.tensor > 1), ("recomputing", plan.checkpointing)) if not used]
    without += [] if plan.zero.offload else ["offload"]
    simple = f" (no {', no '.join(without)})" if without else ""
    if len(fitting) == 1:
        return "it is the only plan that fits"
    if plan is fastest:
        return f"its estimated time is the shortest of the {len(fitting)} plans that fit{simple}"
    slower = plan.seconds / fastest.seconds - 1
    if slower > NEAR:
        return f"faster plans leave less than {SPARE:.0%} of the memory free; of the others it is the simplest{simple}"
    return f"it is simple{simple}, and its estimated time is only {slower:.1%} above the shortest"


def hint(plans: list[Plan], machine: Machine, one_pass: bool) -> str:
    """Advice if nothing fits."""
    near = min(plans, key=lambda p: p.need)
    if near.evaluating > near.total:
        return (
            f"no plan fits {machine.gpu.memory:g} GiB: the closest one needs {gib(near.need)} GiB, for the evaluations "
            f"({largest_of(near.evaluation)}); set eval.batch below {near.eval_batch}, or use GPUs with more memory"
        )
    more = "use more GPUs" + (f", or set train.micro_batch below {near.micro}" if near.micro > 1 else "")
    note = " (which leaves the contrastive losses fewer negatives)" if near.micro > 1 and one_pass else ""
    return f"no plan fits {machine.gpu.memory:g} GiB: the closest one needs {gib(near.need)} GiB; {more}{note}"


def row(plan: Plan, best: Plan | None) -> list[str]:
    m = plan.memory
    return [
        ("-> " if plan is best else "") + str(plan.tensor),
        plan.zero.label,
        "yes" if plan.checkpointing else "no",
        *(gib(m[k]) for k in ("weights", "gradients")),
        gib(m["optimizer"] + m["ema"]),
        *(gib(m[k]) for k in ("teacher", "activations", "head")),
        gib(m["features"] + m["contrastive"] + m["kept"] + m["working"]),
        gib(m["gather"] + m["buckets"]),
        gib(plan.need),
        f"{plan.sent('tensor') / 1e9:.1f}",
        f"{plan.sent('data') / 1e9:.1f}",
        f"{plan.seconds:.3f}",
        f"{plan.mfu:.0%}",
    ]


HEADS = (
    "tp ZeRO recom-/pute wei-/ghts gra-/dients AdamW/+_EMA tea-/cher acti-/vations log-/its other buf-/fers needs/GiB "
    "tensor/GB data/GB step/s MFU"
)


def table_of(plans: list[Plan], best: Plan | None, optimizer: str = "adamw") -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in (HEADS.replace("AdamW", "Muon") if optimizer == "muon" else HEADS).split():
        table.add_column(head.translate({ord("/"): "\n", ord("_"): " "}), justify="right", no_wrap=True)
    for plan in sorted(plans, key=lambda p: not p.fits):
        if not plan.fits and plan is next(p for p in plans if not p.fits):
            table.add_section()
        table.add_row(*row(plan, best), style=None if plan.fits else "dim")
    return table


def show(cfg: RunConfig, machine: Machine, dtype: str, plans: list[Plan], best: Plan | None, every: bool) -> None:
    from megastar.parallel.budget import trunk
    from megastar.parallel.cost import assumptions, elements
    from megastar.run_dir.training_checks import compares_one_pass
    from megastar.utils.console import PlainConsole

    # Not a terminal: use the width that the table needs.
    width = None if sys.stdout.isatty() else max(118, terminal_width())
    console = PlainConsole(width=width)
    counts, g, gpu = elements(cfg.model, cfg.self_guided, repa=cfg.repa), cfg.self_guided, machine.gpu
    P, extra = trunk(counts), sum(counts.values()) - trunk(counts)
    views = f" x {cfg.student_views} views (teacher {g.views})" if g.enabled else ""
    data = "network" if machine.nodes > 1 else "NVLink"
    console.print(
        f"{cfg.model.name}: {P / 1e6:.1f} M parameters"
        + (f" + projector {extra / 1e6:.1f} M" if extra else "")
        + f", {dtype}, {cfg.train.global_batch} images{views} per step"
    )
    console.print(
        f"{machine.gpus} x {machine.name}, {machine.nodes} node{'s' * (machine.nodes > 1)}: {gpu.memory:g} GiB, "
        f"{gpu.tflops:g} TFLOP/s, memory {gpu.hbm:g} GB/s, NVLink {gpu.nvlink:g} GB/s, network {gpu.network:g} GB/s"
    )
    fitting, others = [p for p in plans if p.fits], [p for p in plans if not p.fits]
    shown = plans if every else fitting[:SHOWN] + others[:NEAREST]
    if best and best not in shown:
        shown.insert(0, best)
    console.print(table_of(shown, best, cfg.optim.name))
    if len(shown) < len(plans):
        console.print(f"{len(shown)} of {len(plans)} plans shown, {len(fitting)} fit; --all shows all\n")
    console.print(
        "GiB per rank at the peak of a step. other: features of L_MIM and REPA, contrastive losses, what accumulated passes share, working memory; buffers: ZeRO-3's gathered "
        "weights, reduction buckets; needs: the sum, or what an evaluation needs if that is more, with a reserve; plans below the line do not fit. tensor, data: GB that "
        f"a rank sends per step in tensor groups (NVLink) and between data ranks ({data}). MFU counts student and teacher."
    )
    if best is None:
        console.print(f"\n{hint(plans, machine, compares_one_pass(g))}")
    else:
        console.print(f"\nrecommended: {' '.join(best.overrides)}", soft_wrap=True)
        console.print(f"  because {why(best, plans)}", soft_wrap=True)
        host = f", {gib(best.host)} GiB of host memory per rank" if best.host else ""
        console.print(
            f"  {best.data} data ranks x {best.micro} images x {best.accumulation} accumulated, "
            f"{cfg.train.global_batch / best.seconds:.0f} images/s{host}"
        )
        if kept := kept_line(cfg, best, dtype):
            console.print(f"  {kept}", soft_wrap=True)
        if cfg.repa.active:
            console.print(f"  {features_line(cfg)}", soft_wrap=True)
        if best.evaluation:
            console.print(f"  {evaluation_line(best)}", soft_wrap=True)
        saved = checkpoint_of(cfg, machine, best)
        console.print(f"  a checkpoint: {saved['files']:,} files, {saved['bytes'] / 1e9:.1f} GB")
        if cfg.optim.of_matrices:
            console.print(f"  {muon_line(cfg, machine, dtype, best)}")
        for t in best.transfers:
            console.print(f"  {t.what}: {t.bytes / 1e9:.2f} GB in {t.count} calls ({t.link} ranks)")
    console.print("\nTimes are estimates, not measurements. Assumptions:")
    for name, text in assumptions(cfg).items():
        console.print(f"  {name}: {text}")


def checkpoint_of(cfg: RunConfig, machine: Machine, plan: Plan) -> dict[str, int]:
    """Files and bytes of one: a state of four fp32 values an element, or three of Muon's, a rank; a random state a data
    rank; the manifest."""
    from megastar.parallel.budget import matrix_elements
    from megastar.parallel.cost import elements

    counts = elements(cfg.model, cfg.self_guided, repa=cfg.repa)
    size = 16 * sum(counts.values()) - (4 * matrix_elements(counts) if cfg.optim.of_matrices else 0)
    return {"files": machine.gpus + plan.data + 1, "bytes": size}


def as_json(cfg: RunConfig, machine: Machine, dtype: str, plans: list[Plan], best: Plan | None) -> PlanReport:
    from megastar.parallel.cost import assumptions, step_flops

    def one(p: Plan) -> dict[str, Any]:
        derived = {"total": p.total, "fits": p.fits, "seconds": p.seconds, "overrides": p.overrides}
        derived |= {"images_per_s": cfg.train.global_batch / p.seconds}
        return dataclasses.asdict(p) | derived | {"zero": p.zero.label, "deepspeed": p.zero.file}

    extra = {"why": why(best, plans), "checkpoint": checkpoint_of(cfg, machine, best)} if best else {}
    return PlanReport(
        model=cfg.model.name,
        dtype=dtype,
        global_batch=cfg.train.global_batch,
        machine=machine,
        flops=step_flops(cfg),
        feature_bytes=features_of(cfg),
        recommended=one(best) | extra if best else None,
        plans=[one(p) for p in plans],
        assumptions=assumptions(cfg),
    )
