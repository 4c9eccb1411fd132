"""Reports long waits for batches in the events of a run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch.distributed as dist

from megastar.data.loader import TokenLoader
from megastar.engine.context import Context
from megastar.run_dir.events import append_event
from megastar.utils.hostname import host_name

logger = logging.getLogger(__name__)
REPORT_AFTER = 10.0  # seconds of waiting for one batch


class WaitReporter:
    """``begin`` before each batch, ``poll`` now and then while it is not ready, ``end`` when it is.

    The first rank that waits so long reports it, in the events of ``run``: the main rank may have its batch and wait
    for the others in a collective.
    """

    def __init__(self, loader: TokenLoader, ctx: Context, run: Path):
        self.loader, self.ctx, self.run = loader, ctx, run
        self.host = host_name()
        self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        # A later run of this process group repeats steps: the keys of its reports contain its number.
        self.prefix = f"megastar/reported/{self.store.add(f'megastar/starts/{ctx.rank}', 1)}"
        self.step = 0  # whose batch is waited for, counted from 1
        self._since = 0.0  # 0: there is no wait
        self._polled = self._reports = False
        self._trouble = ""

    def begin(self) -> None:
        self.step, self._since, self._polled, self._reports = self.loader.step + 1, 0.0, False, False

    def poll(self) -> None:
        now = time.monotonic()
        self._since = self._since or now
        if self._polled or now - self._since < REPORT_AFTER:
            return
        self._polled, self._reports = True, self._first(f"wait/{self.step}")
        if self._reports:
            why = self.loader.messages()[0] or f"they are read from {self.loader.shards.folder}"
            text = (
                f"has waited {REPORT_AFTER:.0f} s for its batch of step {self.step}, and all other ranks with it: {why}"
            )
            self._report(f"rank {self.ctx.rank} on {self.host} {text}", "data")

    def end(self) -> None:
        """The batch is ready."""
        if self._reports:
            waited = time.monotonic() - self._since
            self._report(f"the batch of step {self.step} arrived after {waited:.0f} s", "data", over=True)
        trouble = self.loader.messages()[1]
        if trouble != self._trouble:  # lasts longer than a batch: one rank of each host reports it
            over, self._trouble = not trouble, trouble
            if self._first(f"trouble/{self.host}/{self.step}/{over}"):
                text = "shards are cached again" if over else trouble
                self._report(f"{self.host}: {text}", f"cache {self.host}", over=over)

    def _first(self, what: str) -> bool:
        """Whether no other rank has reported this."""
        return bool(self.store.add(f"{self.prefix}/{what}", 1) == 1)

    def _report(self, text: str, situation: str, over: bool = False) -> None:
        append_event(self.run, "warning", self.step - 1, text, situation=situation, over=over)
        logger.warning(text)
