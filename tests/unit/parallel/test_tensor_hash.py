"""The hash of a tensor's bits, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megastar.parallel.tensor_hash import CHUNK, ODD, hash_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_any_flipped_bit_changes_the_hash_tensor(dtype):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(100, generator=g) * 50).to(dtype)
    bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    whole = hash_tensor(x).item()
    for place in (0, 1, 57, 99):
        for bit in range(8 * x.element_size() - 1):
            bits[place] ^= 1 << bit
            assert hash_tensor(x).item() != whole, (place, bit)
            bits[place] ^= 1 << bit
    assert hash_tensor(x).item() == whole != hash_tensor(x.flip(0)).item()


def test_the_hash_matches_its_definition():
    x = torch.arange(CHUNK + 3, dtype=torch.int32)  # over the end of a chunk
    factor = 2 * ODD
    places = np.arange(len(x), dtype=np.uint64)
    with np.errstate(over="ignore"):
        expected = (x.numpy().astype(np.uint64) * (places * np.uint64(factor) | np.uint64(1))).sum()
    assert hash_tensor(x).item() == int(expected.astype(np.int64))
