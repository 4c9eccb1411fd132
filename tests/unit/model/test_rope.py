"""2-D RoPE against an obvious loop."""

from __future__ import annotations

import math

import pytest
import torch

from megastar.model.rope import apply_rope, rope_table

CPU = torch.device("cpu")


def turned(x: torch.Tensor, grid: int, base: float) -> torch.Tensor:
    """The definition, number by number: x (S, d) float64."""
    size, d = x.shape
    out = torch.zeros_like(x)
    for s in range(1, size):  # the class position 0 stays zero
        row, column = divmod(s - 1, grid)
        for i in range(d // 2):
            where, index = (row, i) if i < d // 4 else (column, i - d // 4)
            angle = where * base ** (-2 * index / (d // 2))
            a, b = x[s, 2 * i].item(), x[s, 2 * i + 1].item()
            out[s, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[s, 2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize(("grid", "head_dim", "base"), [(4, 8, 10000.0), (3, 12, 100.0), (8, 64, 10000.0)])
def test_matches_the_loop(grid: int, head_dim: int, base: float) -> None:
    size = grid * grid
    x = torch.randn(2, 3, size, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = rope_table(grid, head_dim, base, CPU, torch.float64)[:size]
    got = apply_rope(x, table)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(got[b, h], turned(x[b, h], grid, base))
    single = apply_rope(x.float(), rope_table(grid, head_dim, base, CPU)[:size])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, got.float(), rtol=1e-5, atol=1e-5)


def test_class_position_vanishes_and_others_keep_their_length() -> None:
    table = rope_table(8, 64, 10000.0, CPU)
    assert table.shape == (65, 32, 2)
    assert table[0].abs().max() == 0
    torch.testing.assert_close(table[1:].norm(dim=-1), torch.ones(64, 32))
    torch.testing.assert_close(table[1], torch.tensor([1.0, 0.0]).expand(32, 2))  # token (0, 0) is not turned


def test_products_depend_on_the_difference_of_places() -> None:
    grid, d = 6, 16
    table = rope_table(grid, d, 10000.0, CPU, torch.float64)
    q, k = torch.randn(2, 1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def product(place_q: tuple[int, int], place_k: tuple[int, int]) -> float:
        rows = [1 + r * grid + c for r, c in (place_q, place_k)]
        return float((apply_rope(q, table[rows[:1]]) * apply_rope(k, table[rows[1:]])).sum())

    assert product((3, 4), (1, 1)) == pytest.approx(product((4, 5), (2, 2)))
    assert product((3, 4), (1, 1)) != pytest.approx(product((3, 4), (1, 2)))
    assert product((3, 4), (1, 1)) != pytest.approx(product((3, 4), (2, 1)))


def test_half_precision_is_turned_in_fp32() -> None:
    table = rope_table(8, 64, 10000.0, CPU)[:64]
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    got = apply_rope(x, table)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, apply_rope(x.float(), table).bfloat16(), rtol=0, atol=0)


def test_a_table_first_made_while_sampling_serves_training() -> None:
    rope_table.cache_clear()
    with torch.inference_mode():
        table = rope_table(2, 8, 10000.0, CPU)
    x = torch.randn(1, 1, 5, 8, requires_grad=True)
    apply_rope(x, table).sum().backward()
    assert x.grad is not None and x.grad[0, 0, 0].abs().max() == 0
