"""The page of runs that are training: built again when their folders change."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megastar.errors import UserError
from megastar.run_dir.events import NAME as EVENTS
from megastar.run_dir.layout import CHECKPOINTS, CONFIG, METRICS, SAMPLES

POLL = 1.0  # seconds between looks at the folders
AGES = 15.0  # seconds after which the page is built again without a change: it shows the ages of rows and heartbeats
SHARE = 0.2  # of the time that may be spent on building pages
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LivePage:
    """``version`` changes with what is shown; ``problem``: why the folders cannot be read at present."""

    version: str
    html: bytes
    problem: str = ""


class LiveReport:
    """The newest page of the folders ``runs()``; ``build`` makes its HTML, with ``VERSION`` where its version belongs.

    A thread looks at the folders while someone is watching. ``build`` and ``runs`` may raise ``UserError`` or ``OSError``
    at any time (a folder is moved): the last page stays, with the problem.
    """

    def __init__(self, runs: Callable[[], list[Path]], build: Callable[[], str]):
        self.runs, self.build = runs, build
        self.changed = threading.Condition()
        self._stop = threading.Event()
        self.watchers = 0
        self._building, self._built = threading.Lock(), 0.0
        self._seen: list[tuple[str, int, int]] = []
        self.page = self._made()  # raises UserError
        self._thread = threading.Thread(target=self._watch, name="live report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        with self.changed:
            self.changed.notify_all()
        self._thread.join(5.0)

    @property
    def closed(self) -> bool:
        return self._stop.is_set()

    def current(self) -> LivePage:
        """The page as of now, also if nobody was watching."""
        with self._building:  # clients that ask at the same time share a page
            if not self.watchers and time.monotonic() - self._built > POLL:
                self._refresh()
                self._built = time.monotonic()
        return self.page

    def wait(self, version: str, seconds: float) -> LivePage:
        """The newest page, as soon as its version is another than ``version``, after at most ``seconds``."""
        with self.changed:
            self.changed.wait_for(lambda: self.page.version != version or self.closed, seconds)
            return self.page

    def _watch(self) -> None:
        built, took = time.monotonic(), 0.0
        while not self._stop.wait(POLL):
            now = time.monotonic()
            if not self.watchers or now - built < took / SHARE:
                continue
            if now - built >= AGES or self._fingerprint() != self._seen:
                self._refresh()
                built = time.monotonic()
                took = built - now

    def _refresh(self) -> None:
        try:
            page = self._made()
        except (UserError, OSError) as error:
            text = " ".join(str(error).split())
            page = LivePage(_digest(text), self.page.html, text)
        with self.changed:
            if page.version != self.page.version:
                self.page = page
                self.changed.notify_all()

    def _made(self) -> LivePage:
        self._seen = self._fingerprint()
        html = self.build()
        version = _digest(html)
        return LivePage(version, html.replace(VERSION, version).encode())

    def _fingerprint(self) -> list[tuple[str, int, int]]:
        """Times and sizes of what the page is made from."""
        try:
            runs = self.runs()
        except (UserError, OSError):
            return []
        names = (METRICS, EVENTS, CONFIG, SAMPLES, CHECKPOINTS)
        found = []
        for path in (run / name for run in runs for name in names):
            try:
                at = os.stat(path)
            except OSError:
                continue
            found.append((str(path), at.st_mtime_ns, at.st_size))
        return found


VERSION = "@megastar-page-version@"  # in the HTML, replaced by the digest of the rest


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
