"""The whole examination: each node for itself, then the nodes together. Every step ends in bounded time."""

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
from megastar.diagnosis.finding import FAILURE, OK, Answer, Finding, bounded, merge
from megastar.diagnosis.meeting import Meeting, absent, slurm_hosts
from megastar.utils.hostname import host_name


@dataclass
class Wishes:
    """What to look at beyond the node itself; ``patience``: seconds that one check, or one node, may be silent."""

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


def examine(wishes: Wishes, rank: int, world: int, tell: Callable[[str], None]) -> Report | None:
    """All findings, on rank 0; None on the others. ``tell`` takes lines of progress.

    Raises ``UserError`` on a rank that cannot reach rank 0.
    """
    if world == 1:
        name = host_name()
        findings = of_node(this_node(wishes, True, ""), [])
        cure = "start it as the training is: srun, torchrun, or --nproc"
        findings.append(Finding("links", OK, f"one process: bandwidth and clocks were not measured; {cure}"))
        return Report([name], 1, merge({name: findings}))
    meeting = Meeting(rank, world, wishes.patience)
    meeting.say("hello", meeting.node)
    if rank == 0:
        return lead(meeting, wishes, tell)
    follow(meeting, wishes)
    return None


# One node ----------------------------------------------------------------------------------------------------------
def this_node(wishes: Wishes, first: bool, mark: str) -> dict[str, Any]:
    """Everything about this process's node that JSON holds. Only the ``first`` rank of a node looks at more than GPUs.

    ``mark``: a file in the run folder that rank 0 made, which must be seen here too.
    """
    look = partial(bounded, seconds=wishes.patience)
    rows: list[dict[str, str]] = []
    sees: dict[str, Any] = {"cuda": "", "count": 0, "why": "no answer"}
    problem: list[str] = []

    def ask() -> list[Finding]:
        try:
            rows.extend(gpus.parse(gpus.ask(wishes.patience / 2)))
        except gpus.NoGpus as error:
            problem.append(str(error))
        if rows:
            sees.update(gpus.torch_sees())
        return []

    found = look("driver", ask)
    versions: dict[str, str] = {}
    if first:
        checks: list[tuple[str, Callable[[], list[Finding]]]] = [
            ("this node", packages.about_this_node),
            ("packages", packages.needed),
            ("packages", packages.optional),
            ("flash-attn", packages.flash_attention),
            ("apex", packages.apex),
            ("C++ compiler", packages.compiler),
            ("cores", node.cores),
            ("memory", node.memory),
            ("shared memory", node.shared_memory),
            ("open files", node.limits),
            ("names", node.names),
        ]
        if wishes.run:
            checks.append(("run folder", partial(node.disk, "run", Path(wishes.run))))
        if mark:
            checks.append(("run folder shared", partial(shared, Path(mark))))
        if wishes.cache:
            checks.append(("cache folder", partial(node.disk, "cache", Path(wishes.cache))))
        if wishes.s3:
            checks.append(("S3", partial(node.s3_reading, wishes.s3)))
        if wishes.upload:
            checks.append(("S3 upload", partial(node.s3_writing, wishes.upload)))
        for name, check in checks:
            found += look(name, check)
        found += look("versions alike", lambda: versions.update(packages.fingerprint()) or [])
    return {
        "findings": [list(f) for f in found], "versions": versions, "gpus": rows, "sees": sees,
        "problem": next(iter(problem), ""), "network": links.network_rate(),
    }  # fmt: skip


def of_node(first: dict[str, Any], others: list[dict[str, Any]]) -> list[Finding]:
    """The findings of a node, of what its ranks sent; the first rank's come with its GPUs'."""
    found = [Finding(*f) for part in (first, *others) for f in part["findings"]]
    rows = gpus.merged([part["gpus"] for part in (first, *others)])
    at = next((i for i, f in enumerate(found) if f.name in packages.NEEDED), 0)
    return found[:at] + gpus.findings(rows, first["sees"], first["problem"]) + found[at:]


def shared(mark: Path, seconds: float = 5.0) -> list[Finding]:
    """Whether rank 0's file is seen here; a network file system may need a moment."""
    deadline = time.monotonic() + seconds
    while not mark.exists():
        if time.monotonic() > deadline:
            cure = (
                "put the run folder on a file system that all nodes share: checkpoints are written there by every rank"
            )
            return [Finding("run folder shared", FAILURE, f"{mark.parent} is not the one of rank 0's node", cure)]
        with suppress(OSError):
            os.listdir(mark.parent)  # asks the server anew
        time.sleep(0.1)
    return [Finding("run folder shared", OK, f"{mark.parent} is the same on all nodes")]


# All nodes ---------------------------------------------------------------------------------------------------------
def follow(meeting: Meeting, wishes: Wishes) -> None:
    """A rank that is not 0."""
    patience = 30 * wishes.patience  # rank 0 has a dozen checks to make, and others to wait for
    word = meeting.hear("members", patience)
    nodes = {int(r): n for r, n in word["nodes"].items()}
    if meeting.rank not in nodes:
        return  # came too late, and is named already
    first = min(r for r, n in nodes.items() if n == meeting.node) == meeting.rank
    meeting.say("node", this_node(wishes, first, word["mark"]))
    places = meeting.hear("places", patience)
    if meeting.rank in places:
        meeting.say("links", measured(meeting, wishes, places, nodes))


def measured(meeting: Meeting, wishes: Wishes, places: list[int], nodes: dict[int, str]) -> dict[str, Any]:
    """This rank's part of the measurements that need all: their result, or {"problem": sentence}."""
    import torch.distributed as dist

    result: dict[str, Any] = {}
    store = dist.PrefixStore("group", meeting.store)

    def check() -> list[Finding]:
        place = places.index(meeting.rank)
        result.update(links.measure(store, place, [nodes[r] for r in places], wishes.patience))
        return []

    problems = bounded("links", check, 2 * wishes.patience)
    return {"problem": problems[0].finding} if problems else result


def lead(meeting: Meeting, wishes: Wishes, tell: Callable[[str], None]) -> Report:
    """Rank 0: who is there, what each node says, what they measure together."""
    tell(f"waiting for {meeting.world} ranks, {wishes.patience:g} s at most")
    nodes: dict[int, str] = meeting.collect("hello", list(range(meeting.world)))
    general: list[Finding] = []

    def missing(there: dict[int, str], when: str) -> None:
        sentence = absent(meeting.world, there, lambda: slurm_hosts(os.environ), when)
        cure = "see those nodes (sinfo -R, ping, ssh); leave a bad one out with sbatch --exclude"
        general.append(Finding("nodes", FAILURE, sentence, cure))

    if len(nodes) < meeting.world:
        missing(nodes, f"did not start, or cannot reach {meeting.node}, within {wishes.patience:g} s")
    mark = make_mark(wishes.run) if wishes.run and len(set(nodes.values())) > 1 else ""
    try:
        meeting.announce("members", {"nodes": nodes, "mark": mark})
        tell(f"{len(nodes)} ranks on {len(set(nodes.values()))} node(s) look at their own")
        meeting.say("node", this_node(wishes, True, mark))
        said = meeting.collect("node", list(nodes))
        if len(said) < len(nodes):
            silent = {r: nodes[r] for r in nodes if r not in said}
            cure = "see what hangs there (dmesg, the disks, nvidia-smi); leave it out with sbatch --exclude"
            text = ", ".join(f"rank {r} on {n}" for r, n in list(silent.items())[:8])
            general.append(Finding("nodes", FAILURE, f"{text}: no answer within {wishes.patience:g} s", cure))
        places = meeting.announce("places", list(said))
        tell("all-reduce and clocks")
        meeting.say("links", measured(meeting, wishes, places, nodes))
        results = meeting.collect("links", places, 2 * wishes.patience)
    finally:
        if mark:
            with suppress(OSError):
                Path(mark).unlink()
    return Report(list(dict.fromkeys(nodes.values())), len(nodes), put_together(nodes, said, places, results, general))


def make_mark(run: str) -> str:
    """An empty file in the run folder, or in the nearest folder above that is there; empty where none can be made."""
    folder = Path(run).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    path = folder / f".megastar-doctor-{secrets.token_hex(6)}.mark"
    try:
        path.touch()
    except OSError:  # the check of the folder says so
        return ""
    return str(path)


def put_together(
    nodes: dict[int, str],
    said: dict[int, dict[str, Any]],
    places: list[int],
    results: dict[int, dict[str, Any]],
    general: list[Finding],
) -> list[Answer]:
    """``nodes``, ``said`` and ``results`` by rank."""
    if not general:
        general.append(Finding("nodes", OK, f"all {len(nodes)} ranks on {len(set(nodes.values()))} node(s) are there"))
    of: dict[str, list[Finding]] = {}
    versions: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(nodes[r] for r in said):
        parts = [said[r] for r in said if nodes[r] == name]
        first = next((p for p in parts if p["versions"]), parts[0])
        of[name] = of_node(first, [p for p in parts if p is not first])
        versions[name] = first["versions"]
    general += packages.versions_alike({n: v for n, v in versions.items() if v})
    problems = {r: p["problem"] for r, p in results.items() if "problem" in p}
    problems |= {r: "no answer" for r in places if r not in results}
    if problems:
        kinds: dict[str, list[str]] = {}
        for rank, problem in problems.items():
            kinds.setdefault(problem, []).append(f"{rank} ({nodes[rank]})")
        text = "; ".join(f"rank {', '.join(ranks[:4])}: {problem}" for problem, ranks in kinds.items())
        general.append(Finding("links", FAILURE, f"all-reduce failed: {text}", links.network_hint()))
    elif results:
        cards = [p["network"] for p in said.values() if p["network"]]
        by_place = {places.index(r): result for r, result in results.items()}
        general += links.judged(by_place, [nodes[r] for r in places], min(cards, default=None))
    return [Answer(f, [], True) for f in general] + merge(of)
