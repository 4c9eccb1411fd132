"""The tensors and numbers of a checkpoint's state, by their places in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def leaves_of(value: Any, name: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves_of(one, (*name, key))
    elif isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            yield from leaves_of(one, (*name, i))
    elif isinstance(value, torch.Tensor):
        yield name, value
    else:
        assert isinstance(value, (int, float, str, bool, type(None))), value
        yield name, torch.tensor(hash(value))
