"""Trackio: a local store in RUN/trackio unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name another."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megastar.engine.metrics.trackers.tracker import PROJECT, QUIET_KINDS, TrackedRun, Tracker

logger = logging.getLogger(__name__)
FOLDER = "trackio"


class TrackioTracker(Tracker):
    """Events are trackio's alerts. Trackio reads TRACKIO_DIR once in a process: a second run of a process has the
    first one's store."""

    def start(self, run: TrackedRun) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run.folder / FOLDER).resolve()))
        import trackio
        import trackio.run
        import trackio.utils

        for module in (trackio, trackio.run, trackio.utils):  # its notes would break the progress bar
            module.print = _to_log
        self._trackio: Any = trackio
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        found = run.identity("trackio", lambda: {"project": project, "name": run.new_name()})
        self._run: Any = trackio.init(
            project=found["project"], name=found["name"], resume="allow", embed=False, config=dict(run.config)
        )

    def row(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def event(self, step: int, kind: str, text: str) -> None:
        levels = self._trackio.AlertLevel
        self._run.alert(kind, text, level=levels.INFO if kind in QUIET_KINDS else levels.WARN, step=step)

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        self._run.log({name: self._trackio.Image(str(path), caption=caption)}, step=step)

    def finish(self, complete: bool) -> None:
        self._run.finish()


def _to_log(*words: Any, **options: Any) -> None:
    with suppress(Exception):
        logger.debug("%s", " ".join(map(str, words)))
