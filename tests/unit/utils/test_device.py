"""Settings of a GPU that several threads share, and memory that is pinned for it. On a CPU: CUDA's own part is not run."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from megastar.utils.device import exact_convolutions, pinned_buffer


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_until_the_last_thread_has_left(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    first, second = exact_convolutions(), exact_convolutions()  # of two threads
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 == before
    with pytest.raises(ZeroDivisionError), exact_convolutions():
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("status", [0, 2])  # 2: cudaErrorMemoryAllocation
def test_a_buffer_is_pinned_for_as_long_as_it_exists(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    pinned: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        pinned[address] = size
        return status

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    buffer = pinned_buffer(1000)
    assert pinned == {buffer.data_ptr(): 4000}  # not rounded up
    part = buffer.narrow(0, 10, 10)
    part.fill_(1.0)
    assert buffer[10:20].sum() == 10
    del buffer, part
    gc.collect()
    assert bool(pinned) == bool(status)  # what was not pinned is not unpinned
    assert pinned_buffer(0).numel() == 0
