"""The event ``mesh_changed``: a start on other ranks or nodes than the previous one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megastar.config.schema import RunConfig
from megastar.data.shards.manifest import Manifest
from megastar.engine.context import Context
from megastar.engine.elastic.node_memory import VARIABLE
from megastar.engine.metrics.environment import process_environment
from megastar.engine.metrics.logger import MetricsLogger
from megastar.engine.rank_sync import gather, on_all_ranks
from megastar.engine.resume_checks import start_event
from megastar.engine.zero.engines import Engines
from megastar.engine.zero.setup import chosen_kernels
from megastar.run_dir.events import STARTED, read_events
from megastar.run_dir.training_checks import compares_one_pass, contrastive_images
from megastar.utils.hostname import host_name


def nodes_of_run(ctx: Context) -> list[str]:
    """The host of each node with an elastic agent, in the order of the ranks; empty without agents. A collective."""
    places = gather(ctx, [os.environ.get("GROUP_RANK", "0"), host_name()])
    return [host for _, host in dict.fromkeys(map(tuple, places))] if VARIABLE in os.environ else []


def record_start(
    metrics: MetricsLogger,
    cfg: RunConfig,
    ctx: Context,
    engines: Engines,
    manifest: Manifest,
    found: Path | None,
    steps: int,
    changes: list[str],
) -> None:
    """Record the events of a start: ``started`` or ``resumed`` from ``found``, and ``mesh_changed``. A collective."""
    nodes = nodes_of_run(ctx)

    def record() -> None:
        changed = (
            describe_change(cfg, ctx, nodes, engines.micro_batch, engines.accumulation) if found and ctx.main else ""
        )
        kind, text = start_event(cfg, ctx, manifest, found, metrics.done, steps)
        facts = process_environment(ctx.device) | chosen_kernels(engines.student.module.transformer)
        facts |= {"changes": changes} | ({"nodes": nodes} if nodes else {})
        metrics.event(kind, text, steps=steps, ranks=ctx.world, **facts)
        if changed:
            metrics.event("mesh_changed", changed, ranks=ctx.world, nodes=nodes)

    on_all_ranks(ctx, record)


def describe_change(cfg: RunConfig, ctx: Context, nodes: list[str], micro: int, passes: int) -> str:
    """What differs from the run's previous start, or "" if nothing does. Call it before this start is recorded."""
    before: dict[str, Any] = next((e for e in reversed(read_events(Path(cfg.run))) if e["event"] in STARTED), {})
    former, ranks = before.get("nodes") or [], before.get("ranks")
    if not isinstance(ranks, int) or (ranks == ctx.world and (not nodes or not former or former == nodes)):
        return ""
    gone, new = ([host for host in some if host not in others] for some, others in ((former, nodes), (nodes, former)))
    moves = [f"{', '.join(hosts)} {what}" for hosts, what in ((gone, "left"), (new, "joined")) if hosts]
    text = (
        f"{_ranks(ctx.world, nodes)}, previously {_ranks(ranks, former)}{': ' if moves else ''}{', '.join(moves)}; "
        f"train.global_batch {cfg.train.global_batch} = {ctx.mesh.data} data rank(s) x {micro} images x {passes} pass(es)"
    )
    if compares_one_pass(cfg.self_guided) and passes > 1:
        text += f"; the contrastive losses compare the {contrastive_images(cfg, ctx.world)} images of one pass"
    return text


def _ranks(ranks: int, nodes: list[str]) -> str:
    return f"{ranks} rank(s)" + (f" on {len(nodes)} node(s) ({', '.join(nodes)})" if nodes else "")
