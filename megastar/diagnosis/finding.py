"""One answer of the doctor, checks that end in bounded time, and what many nodes say put together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megastar.errors import UserError

OK, WARNING, FAILURE = "OK", "warning", "failure"
LEVELS = (OK, WARNING, FAILURE)
hung: list[str] = []  # checks whose threads this process has given up on
SHOWN = 4  # different good answers to one question that are shown; bad ones always are


class Finding(NamedTuple):
    """``remedy`` is empty where nothing is wrong."""

    name: str
    level: str
    finding: str
    remedy: str = ""


@dataclass
class Answer:
    """A finding and the nodes that share it."""

    finding: Finding
    nodes: list[str]
    everywhere: bool  # all nodes that were asked say so

    def as_dict(self) -> dict[str, Any]:
        return {**self.finding._asdict(), "nodes": self.nodes, "everywhere": self.everywhere}


def bounded(name: str, check: Callable[[], Iterable[Finding]], seconds: float, remedy: str = "") -> list[Finding]:
    """What ``check`` finds; one failure when it raises, or does not return in time (a disk that hangs, say)."""
    found: list[Finding] = []
    ended = threading.Event()

    def work() -> None:
        try:
            found.extend(check())
        except UserError as error:  # a sentence with its remedy
            finding, _, cure = str(error).rpartition(": ")
            found.append(Finding(name, FAILURE, finding or cure, cure if finding else remedy))
        except Exception as error:
            found.append(Finding(name, FAILURE, " ".join(f"{type(error).__name__}: {error}".split())[:400], remedy))
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    if ended.wait(seconds):
        return found
    hung.append(name)
    return [Finding(name, FAILURE, f"no answer within {seconds:g} s", remedy or "see what it waits for on that node")]


def merge(nodes: dict[str, list[Finding]]) -> list[Answer]:
    """The answers of all nodes, in the order of the questions: equal ones once, the worst of a question first."""
    names: dict[str, None] = {}
    for findings in nodes.values():
        names.update(dict.fromkeys(f.name for f in findings))
    answers = []
    for name in names:
        asked = [node for node, findings in nodes.items() if any(f.name == name for f in findings)]
        alike: dict[Finding, list[str]] = {}
        for node in asked:
            for finding in dict.fromkeys(f for f in nodes[node] if f.name == name):
                alike.setdefault(finding, []).append(node)
        found = [Answer(f, where, len(where) == len(asked)) for f, where in alike.items()]
        answers += sorted(found, key=lambda a: -LEVELS.index(a.finding.level))
    return answers


def shortened(answers: list[Answer]) -> list[Answer]:
    """``answers`` for a person: of many good ones to a question (speeds of 64 disks) the first few, and how many more."""
    out: list[Answer] = []
    good: dict[str, int] = {}
    for answer in answers:
        name, level = answer.finding.name, answer.finding.level
        good[name] = good.get(name, 0) + (level == OK)
        if level != OK or good[name] <= SHOWN:
            out.append(answer)
    for name, count in good.items():
        if count > SHOWN:
            at = max(i for i, a in enumerate(out) if a.finding.name == name)
            out[at + 1 : at + 1] = [
                Answer(Finding(name, OK, f"and {count - SHOWN} more, all OK: --json has them"), [], True)
            ]
    return out


def compact(nodes: list[str]) -> str:
    """ "node1, node2, node3 and 5 more" """
    return ", ".join(nodes[:6]) + (f" and {len(nodes) - 6} more" if len(nodes) > 6 else "")
