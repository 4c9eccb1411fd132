"""The result of a check, checks with a timeout, and the results of many nodes merged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from megastar.errors import UserError

OK, WARNING, FAILURE = "OK", "warning", "failure"
LEVELS = (OK, WARNING, FAILURE)
hung: list[str] = []  # checks that timed out; their threads still run
cancelled = threading.Event()  # checks end early
SHOWN = 4  # different OK results of a check that are shown; all warnings and failures are


class Finding(NamedTuple):
    """``remedy`` is empty if nothing is wrong."""

    name: str
    level: str
    finding: str
    remedy: str = ""


@dataclass
class Answer:
    """A finding and the nodes that share it."""

    finding: Finding
    nodes: list[str]
    everywhere: bool  # the same on all nodes that ran the check

    def as_dict(self) -> dict[str, Any]:
        return {**self.finding._asdict(), "nodes": self.nodes, "everywhere": self.everywhere}


def with_timeout(name: str, check: Callable[[], Iterable[Finding]], seconds: float, remedy: str = "") -> list[Finding]:
    """The findings of ``check``; one failure if it raises, or does not return in time (a disk that hangs)."""
    findings: list[Finding] = []
    ended = threading.Event()

    def work() -> None:
        try:
            findings.extend(check())
        except UserError as error:  # a sentence that ends with its remedy
            text, _, advice = str(error).rpartition(": ")
            findings.append(Finding(name, FAILURE, text or advice, advice if text else remedy))
        except Exception as error:
            findings.append(Finding(name, FAILURE, " ".join(f"{type(error).__name__}: {error}".split())[:400], remedy))
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        if ended.wait(seconds):
            return findings
    except BaseException:  # a stop signal: the check removes its files
        cancelled.set()
        ended.wait(2.0)
        raise
    hung.append(name)
    remedy = remedy or "find out what blocks it on that node (dmesg, mounts)"
    return [Finding(name, FAILURE, f"no response within {seconds:g} s", remedy)]


def merge(nodes: dict[str, list[Finding]]) -> list[Answer]:
    """The findings of all nodes in the order of the checks: equal ones once, the worst of a check first."""
    answers = []
    for name in dict.fromkeys(f.name for findings in nodes.values() for f in findings):
        by_finding: dict[Finding, list[str]] = {}
        for node, findings in nodes.items():
            for finding in dict.fromkeys(f for f in findings if f.name == name):
                by_finding.setdefault(finding, []).append(node)
        checked = {node for where in by_finding.values() for node in where}
        merged = [Answer(f, where, len(where) == len(checked)) for f, where in by_finding.items()]
        answers += sorted(merged, key=lambda a: -LEVELS.index(a.finding.level))
    return answers


def shortened(answers: list[Answer]) -> list[Answer]:
    """``answers`` with at most ``SHOWN`` OK results per check (speeds of 64 disks), and how many more there are."""
    out: list[Answer] = []
    for name, group in groupby(answers, key=lambda a: a.finding.name):
        members = list(group)
        good = [a for a in members if a.finding.level == OK]
        out += [a for a in members if a.finding.level != OK] + good[:SHOWN]
        if len(good) > SHOWN:
            text = f"and {len(good) - SHOWN} more, all OK (--json prints them)"
            out.append(Answer(Finding(name, OK, text), [], True))
    return out


def compact(nodes: list[str]) -> str:
    """ "node1, node2, node3 and 5 more" """
    return ", ".join(nodes[:6]) + (f" and {len(nodes) - 6} more" if len(nodes) > 6 else "")
