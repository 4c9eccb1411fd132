"""Long waits for batches, in the events of a run while they last."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megastar.run_dir.events import append_event
from megastar.utils.hostname import host_name

if TYPE_CHECKING:  # it imports deepspeed
    from megastar.data.loader import TokenLoader
    from megastar.engine.context import Context

SAY_AFTER = 10.0  # seconds of waiting for one batch


class WaitReporter:
    """``begin`` before each batch, ``poll`` now and then while it does not come, ``end`` when it is there.

    Whichever rank is the first to wait so long tells, through the events of ``run``: the main rank may have its batch
    and then stands in a collective, where it waits for the others.
    """

    def __init__(self, loader: TokenLoader, ctx: Context, run: Path):
        self.loader, self.ctx, self.run = loader, ctx, run
        self.host = host_name()
        self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
        self.step = 0  # whose batch is waited for, counted from 1
        self._since = 0.0  # 0: there is no wait
        self._asked = self._tells = False
        self._trouble = ""

    def begin(self) -> None:
        self.step, self._since, self._asked, self._tells = self.loader.step + 1, 0.0, False, False

    def poll(self) -> None:
        now = time.monotonic()
        self._since = self._since or now
        if self._asked or now - self._since < SAY_AFTER:
            return
        self._asked, self._tells = True, self._first(f"wait/{self.step}")
        if self._tells:
            said = self.loader.said()[0] or f"they are read from {self.loader.shards.folder}"
            text = f"has waited {SAY_AFTER:.0f} s for its batch of step {self.step}, and all others with it: {said}"
            self._tell(f"rank {self.ctx.rank} on {self.host} {text}", "data")

    def end(self) -> None:
        """The batch is there."""
        if self._tells:
            waited = time.monotonic() - self._since
            self._tell(f"the batch of step {self.step} came after {waited:.0f} s", "data", over=True)
        if (
            trouble := self.loader.said()[1]
        ) != self._trouble:  # lasts longer than a batch: one rank of each host tells
            over, self._trouble = not trouble, trouble
            if self._first(f"trouble/{self.host}/{self.step}/{over}"):
                text = "the cache takes shards again" if over else trouble
                self._tell(f"{self.host}: {text}", f"cache {self.host}", over=over)

    def _first(self, what: str) -> bool:
        """Whether no other rank was here before."""
        return bool(self.store.add(f"megastar/told/{what}", 1) == 1)

    def _tell(self, text: str, situation: str, over: bool = False) -> None:
        append_event(self.run, "warning", self.step - 1, text, situation=situation, over=over)
        print(text, flush=True)
