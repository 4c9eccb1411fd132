"""All checks: of each node alone, then of the nodes together. Every step has a time limit."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megastar.diagnosis import gpus, links, node, packages
from megastar.diagnosis.finding import FAILURE, OK, Answer, Finding, merge, with_timeout
from megastar.diagnosis.rendezvous import Rendezvous, missing_ranks, slurm_hosts
from megastar.utils.files import existing_parent
from megastar.utils.hostname import host_name


@dataclass
class DoctorOptions:
    """What to check beside the node itself; ``patience``: seconds that one check, or one node, may take to respond."""

    run: str = ""
    cache: str = ""
    s3: str = ""
    upload: str = ""
    patience: float = 60.0


@dataclass
class Report:
    nodes: list[str]
    ranks: int
    answers: list[Answer] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(a.finding.level == FAILURE for a in self.answers)


def run_checks(options: DoctorOptions, rank: int, world: int, progress: Callable[[str], None]) -> Report | None:
    """All findings, on rank 0; None on the others. ``progress`` takes lines about what is being done.

    Raises ``UserError`` on a rank that cannot reach rank 0.
    """
    if world == 1:
        name = host_name()
        findings = node_findings(check_node(options, True, ""), [])
        text = "one process: bandwidth and clocks not measured; to measure them start it with srun, torchrun or --nproc"
        return Report([name], 1, merge({name: [*findings, Finding("links", OK, text)]}))
    ranks = Rendezvous(rank, world, options.patience)
    ranks.send("hello", ranks.node)
    if rank == 0:
        return lead(ranks, options, progress)
    follow(ranks, options)
    return None


# One node ----------------------------------------------------------------------------------------------------------
def check_node(options: DoctorOptions, first: bool, mark: str) -> dict[str, Any]:
    """The results of this process's node, as JSON values. Only the ``first`` rank of a node checks more than the GPUs.

    ``mark``: a file in the run folder, made by rank 0, that must be visible on this node.
    """
    check = partial(with_timeout, seconds=options.patience)
    result: dict[str, Any] = {"versions": {}, "gpus": [], "problem": "", "network": links.nic_bandwidth()}
    result["torch"] = {"cuda": "", "count": 0, "why": "no response"}

    def query_gpus() -> list[Finding]:
        try:
            result["gpus"] = gpus.parse_csv(gpus.query(options.patience / 2))
        except gpus.NvidiaSmiError as error:
            result["problem"] = str(error)
        result["torch"] = gpus.torch_info()
        return []

    findings = check("driver", query_gpus)
    if first:
        checks: list[tuple[str, Callable[[], list[Finding]]]] = [
            ("this node", packages.platform_versions),
            ("packages", packages.required),
            ("packages", packages.optional),
            ("flash-attn", packages.flash_attention),
            ("apex", packages.apex),
            ("C++ compiler", packages.compiler),
            ("cores", node.cores),
            ("memory", node.memory),
            ("shared memory", node.shared_memory),
            ("open files", node.limits),
            ("names", node.name_lookup),
        ]
        if options.run:
            checks.append(("run folder", partial(node.disk, "run", Path(options.run))))
        if mark:
            checks.append(("run folder shared", partial(is_shared, Path(mark))))
        if options.cache:
            checks.append(("cache folder", partial(node.disk, "cache", Path(options.cache))))
        if options.s3:
            checks.append(("S3", partial(node.s3_read, options.s3)))
        if options.upload:
            checks.append(("S3 upload", partial(node.s3_write, options.upload)))
        for name, function in checks:
            findings += check(name, function)
        findings += check("versions alike", lambda: result["versions"].update(packages.fingerprint()) or [])
    return result | {"findings": [list(f) for f in findings]}


def node_findings(first: dict[str, Any], others: list[dict[str, Any]]) -> list[Finding]:
    """The findings of a node from its ranks' results; those about GPUs use what all of its ranks see."""
    found = [Finding(*f) for part in (first, *others) for f in part["findings"]]
    rows = gpus.merge_rows([part["gpus"] for part in (first, *others)])
    at = next((i for i, f in enumerate(found) if f.name in packages.REQUIRED), 0)
    return found[:at] + gpus.findings(rows, first["torch"], first["problem"]) + found[at:]


def is_shared(mark: Path, seconds: float = 5.0) -> list[Finding]:
    """Whether the file of rank 0 is visible here; a network file system may need a moment."""
    deadline = time.monotonic() + seconds
    while not mark.exists():
        if time.monotonic() > deadline:
            remedy = "put the run folder on a file system that all nodes share: every rank writes checkpoints to it"
            text = f"{mark.parent} is not the same folder as on the node of rank 0"
            return [Finding("run folder shared", FAILURE, text, remedy)]
        with suppress(OSError):
            os.listdir(mark.parent)  # makes a network file system refresh its cache
        time.sleep(0.1)
    return [Finding("run folder shared", OK, f"{mark.parent} is the same folder on all nodes")]


# All nodes ---------------------------------------------------------------------------------------------------------
def follow(ranks: Rendezvous, options: DoctorOptions) -> None:
    """The part of every rank but 0."""
    patience = 30 * options.patience  # rank 0 runs a dozen checks and waits for other ranks
    message = ranks.receive("members", patience)
    nodes = {int(r): n for r, n in message["nodes"].items()}
    if ranks.rank not in nodes:
        return  # joined too late; rank 0 reports it
    first = min(r for r, n in nodes.items() if n == ranks.node) == ranks.rank
    ranks.send("node", check_node(options, first, message["mark"]))
    members = ranks.receive("places", patience)
    if ranks.rank in members:
        ranks.send("links", measure_links(ranks, options, members, nodes))


def measure_links(
    ranks: Rendezvous, options: DoctorOptions, members: list[int], nodes: dict[int, str]
) -> dict[str, Any]:
    """This rank's part of the collective measurements: their result, or {"problem": sentence}."""
    import torch.distributed as dist

    result: dict[str, Any] = {}
    store = dist.PrefixStore("group", ranks.store)

    def check() -> list[Finding]:
        place = members.index(ranks.rank)
        result.update(links.measure(store, place, [nodes[r] for r in members], options.patience))
        return []

    problems = with_timeout("links", check, 2 * options.patience)
    return {"problem": problems[0].finding} if problems else result


def lead(ranks: Rendezvous, options: DoctorOptions, progress: Callable[[str], None]) -> Report:
    """The part of rank 0: collect the members, their nodes' results, and what they measure together."""
    progress(f"waiting up to {options.patience:g} s for {ranks.world} ranks")
    nodes: dict[int, str] = ranks.collect("hello", list(range(ranks.world)))
    general: list[Finding] = []
    if len(nodes) < ranks.world:
        text = missing_ranks(ranks.world, nodes, slurm_hosts(os.environ))
        text += f" did not start, or cannot reach {ranks.node}, within {options.patience:g} s"
        remedy = "check these nodes (sinfo -R, ping, ssh); exclude a faulty one with sbatch --exclude"
        general.append(Finding("nodes", FAILURE, text, remedy))
    hosts = list(dict.fromkeys(nodes.values()))
    mark = make_mark(options.run) if options.run and len(hosts) > 1 else ""
    try:
        ranks.broadcast("members", {"nodes": nodes, "mark": mark})
        progress(f"{len(nodes)} ranks check their {len(hosts)} node(s)")
        ranks.send("node", check_node(options, True, mark))
        parts = ranks.collect("node", list(nodes))
        if silent := [f"rank {r} on {n}" for r, n in nodes.items() if r not in parts]:
            remedy = "find out what hangs there (dmesg, disks, nvidia-smi), or exclude the node with sbatch --exclude"
            text = f"{', '.join(silent[:8])}: no response within {options.patience:g} s"
            general.append(Finding("nodes", FAILURE, text, remedy))
        members = ranks.broadcast("places", list(parts))
        progress("measuring all-reduce and clocks")
        ranks.send("links", measure_links(ranks, options, members, nodes))
        results = ranks.collect("links", members, 2 * options.patience)
    finally:
        if mark:
            with suppress(OSError):
                Path(mark).unlink()
    return Report(hosts, len(nodes), combine(nodes, parts, members, results, general))


def make_mark(run: str) -> str:
    """An empty file in the run folder, or in its nearest existing parent; "" if it cannot be made."""
    path = existing_parent(Path(run)) / f".megastar-doctor-{secrets.token_hex(6)}.mark"
    try:
        path.touch()
    except OSError:  # reported by the check of the folder
        return ""
    return str(path)


def combine(
    nodes: dict[int, str],
    parts: dict[int, dict[str, Any]],
    members: list[int],
    results: dict[int, dict[str, Any]],
    general: list[Finding],
) -> list[Answer]:
    """All answers. ``nodes``, ``parts`` (of ``check_node``) and ``results`` (of ``measure_links``) are by rank."""
    if not general:
        general.append(Finding("nodes", OK, f"all {len(nodes)} ranks on {len(set(nodes.values()))} node(s) responded"))
    findings: dict[str, list[Finding]] = {}
    versions: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(nodes[r] for r in parts):
        own = [parts[r] for r in parts if nodes[r] == name]
        first = next((p for p in own if p["versions"]), own[0])
        findings[name] = node_findings(first, [p for p in own if p is not first])
        versions[name] = first["versions"]
    general += packages.versions_alike({n: v for n, v in versions.items() if v})
    problems = {r: p["problem"] for r, p in results.items() if "problem" in p}
    problems |= {r: "no response" for r in members if r not in results}
    if problems:
        kinds: dict[str, list[str]] = {}
        for rank, problem in problems.items():
            kinds.setdefault(problem, []).append(f"{rank} ({nodes[rank]})")
        text = "; ".join(f"rank {', '.join(which[:4])}: {problem}" for problem, which in kinds.items())
        general.append(Finding("links", FAILURE, f"all-reduce failed: {text}", links.network_hint()))
    elif results:
        cards = [p["network"] for p in parts.values() if p["network"]]
        by_place = {members.index(r): result for r, result in results.items()}
        general += links.findings(by_place, [nodes[r] for r in members], min(cards, default=None))
    return [Answer(f, [], True) for f in general] + merge(findings)
