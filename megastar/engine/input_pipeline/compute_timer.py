"""Time of a rank's own work in a step, without its waiting for other ranks."""

from __future__ import annotations

import statistics
import time
from collections import deque

import torch

SAMPLES = 16  # timings of the part of the network a row, at most


class ComputeTimer:
    """This rank's work of its own, seconds. ``arrived`` and ``computed`` are called for each micro-batch."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._clock = time.perf_counter if self.cuda else time.thread_time
        self._host, self._since = 0.0, 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=SAMPLES)
        self._begun: torch.cuda.Event | None = None

    def arrived(self) -> None:
        self._since = self._clock()

    def computed(self) -> None:
        self._host += self._clock() - self._since

    def sample(self, part: torch.nn.Module) -> None:
        """Time this part of the network on a GPU. Its hooks must come behind those of DeepSpeed, which wait for others."""
        if self.cuda:
            part.register_forward_pre_hook(lambda *_: self._begin())
            part.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._begun = torch.cuda.Event(enable_timing=True)
        self._begun.record()

    def _end(self) -> None:
        if self._begun is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._begun, end))
            self._begun = None

    def take(self) -> tuple[float, float]:
        """Since the last call: the host's seconds, and the mean of the part on the GPU (0 on a CPU)."""
        host, self._host = self._host, 0.0
        done = [begin.elapsed_time(end) / 1e3 for begin, end in self._events if end.query()]
        self._events.clear()
        return host, statistics.fmean(done) if done else 0.0
