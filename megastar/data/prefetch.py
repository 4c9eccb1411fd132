"""Between reading batches and using them: a thread that reads ahead, and copies to a GPU."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Batch = dict[str, Any]
_POLL = 0.1  # seconds between checks whether a wait is over
_END = object()


class GaveUp(Exception):
    """The consumer stopped waiting before a batch was ready."""


class ReadAhead:
    """Runs an iterator of lists of batches in a thread, ``depth`` lists ahead; an error is raised in place of its list. A
    list is handed over at once, because a hand-over between threads costs more than reading a small batch.

    ``stop`` ends the thread; ``close`` sets it and joins. ``waited``: seconds that the consumer has waited.
    """

    def __init__(self, items: Iterator[list[Batch]], depth: int, stop: threading.Event):
        self.waited = 0.0
        self._items = items
        self._queue: queue.Queue[Any] = queue.Queue(max(1, depth))
        self._stop = stop
        self._thread = threading.Thread(target=self._work, name="token-loader", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(_END)
        except BaseException as error:
            self._put(error)

    def _put(self, item: object) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def iterate(self, give_up: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """The batches until the end or ``close``. Raises ``GaveUp`` when none is ready and ``give_up()`` is true."""
        while not self._stop.is_set():
            item = self._take(give_up)
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            for batch in item:
                if self._stop.is_set():
                    return
                yield batch

    def _take(self, give_up: Callable[[], bool]) -> Any:
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            pass
        started = time.perf_counter()
        try:
            while not self._stop.is_set():
                if give_up():
                    raise GaveUp
                try:
                    return self._queue.get(timeout=_POLL)
                except queue.Empty:
                    continue
            return _END
        finally:
            self.waited += time.perf_counter() - started

    def close(self) -> None:
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


class ToDevice:
    """Copies batches to ``device`` (None or a CPU: no copy): ``send`` ahead of use, ``receive`` on use.

    Until ``receive`` codes have their stored bytes: two as int16, which every kernel supports, or int32. For a GPU the reading
    thread pins the arrays and copies them on its own stream during the previous step; the consumer's stream waits for
    that copy only.
    """

    ON_DEVICE = {"codes", "labels", "true_labels", "features"}  # features where the batch has them

    def __init__(self, device: torch.device | str | None):
        self.device = torch.device(device or "cpu")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def send(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch
        # Threads start on the first GPU, and leaving the stream would create a context there, half a GiB a rank.
        torch.cuda.set_device(self.device)
        with torch.cuda.stream(self._stream):
            for name in self.ON_DEVICE & batch.keys():  # the allocator keeps pinned memory until the copy is done
                batch[name] = batch[name].pin_memory().to(self.device, non_blocking=True)
            two_bytes = batch["codes"].dtype == torch.int16
            batch["codes"] = batch["codes"].to(torch.int64)  # (b, M, T)
            if two_bytes:
                batch["codes"].bitwise_and_(0xFFFF)
            batch["copied"] = self._stream.record_event()
        return batch

    def receive(self, batch: Batch) -> Batch:
        """The batch with codes in int64, ready for the caller's current stream."""
        if self._stream is None:
            codes = batch["codes"].numpy()
            codes = codes.view(np.uint16) if codes.itemsize == 2 else codes
            batch["codes"] = torch.from_numpy(codes.astype(np.int64))  # (b, M, T)
            return batch
        current = torch.cuda.current_stream(self.device)
        current.wait_event(batch.pop("copied"))
        for name in self.ON_DEVICE & batch.keys():
            batch[name].record_stream(current)  # it was allocated on the other stream
        return batch
