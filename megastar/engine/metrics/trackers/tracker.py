"""What an experiment tracker does, and what it is told about the run."""

from __future__ import annotations

import json
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megastar.config.env_text import recorded
from megastar.config.load import flatten
from megastar.run_dir.layout import TRACKERS
from megastar.utils.files import write_json
from megastar.utils.json_file import dict_of, read_json, text, validator
from megastar.utils.redact import redact

PROJECT = "megastar"  # of a run, where the tracker's own variable names none
QUIET_KINDS = ("started", "resumed", "saved", "finished", "evaluated")  # the other events are warnings
_IDS = validator(dict_of(text(100), dict_of(text(100), text(4096))))
_LOCK = threading.Lock()


@dataclass(frozen=True)
class TrackedRun:
    """``start``: steps done at this start. ``config``: dotted name of a field -> its value, without secrets."""

    folder: Path
    start: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def identity(self, tracker: str, create: Callable[[], dict[str, str]]) -> dict[str, str]:
        """What identifies the run for ``tracker``, recorded in RUN/trackers.json at its first start: a later start
        continues it. Raises ``OSError``, and ``UserError`` for a damaged file."""
        path = self.folder / TRACKERS
        with _LOCK:
            known: dict[str, dict[str, str]] = read_json(path, _IDS, "remove it") if path.exists() else {}
            if tracker not in known:
                known[tracker] = create()
                write_json(path, known)
            return known[tracker]

    def new_name(self) -> str:
        """The run's name with a suffix that no other run has."""
        return f"{self.name}-{secrets.token_hex(4)}"


class Tracker(ABC):
    """A sink for one run. ``TrackerThread`` calls it from one thread, so a call may block or raise any exception.

    A resumed or rolled-back run repeats steps: of two values for one step, the one sent last is valid.
    """

    @abstractmethod
    def start(self, run: TrackedRun) -> None:
        """Open or continue the run, with its configuration."""

    @abstractmethod
    def row(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a row of metrics.jsonl, under the same names."""

    @abstractmethod
    def event(self, step: int, kind: str, text: str) -> None:
        """A line of events.jsonl."""

    @abstractmethod
    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        """A PNG file, such as a grid of samples."""

    @abstractmethod
    def finish(self, complete: bool) -> None:
        """``complete``: the last step of the run is done."""


def public_config(cfg: Any) -> dict[str, Any]:
    """The configuration ``cfg``, a dataclass, as dotted names and values, without secrets."""
    fields = flatten(recorded(asdict(cfg)))
    return {name: redact(value) if isinstance(value, str) else value for name, value in fields.items()}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values of a row that are numbers."""
    return {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
