"""Our Triton kernels without a GPU: in Triton's interpreter, through its assembler, and the tiles they visit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megastar.model.kernels import check, tiles
from megastar.model.kernels import triton as ours
from megastar.model.masks import PATTERNS

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
DTYPES = ("float32", "float16")
QUICK = [  # every pattern; sizes below, across and at the edges of tiles; padded and whole head dimensions
    ("hidden", 176, 64, "float32"),
    ("neighbourhood", 144, 100, "float16"),
    ("documents", 128, 64, "float16"),
    ("prefix", 80, 128, "float32"),
    ("row_blocks", 144, 100, "float32"),
    ("sliding_window", 176, 64, "float16"),
    ("causal", 144, 128, "float16"),
    ("rope", 16, 64, "float32"),
    ("rope", 37, 100, "float16"),
    ("rope", 1, 16, "float32"),
]
ALL = [(w, s, d, t) for w in PATTERNS for s in (16, 64, 176) for d in (64, 100, 128) for t in DTYPES]


def in_the_interpreter(cases) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "tests/interpreted.py", json.dumps(cases)], capture_output=True, text=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(cases)
    for case, row in zip(cases, rows, strict=True):
        assert max(row) < (2e-5 if case[3] == "float32" else 1.5e-2), (case, row)


def test_triton_forward_and_backward_in_the_interpreter() -> None:
    in_the_interpreter(QUICK)


@pytest.mark.slow
def test_triton_everywhere_in_the_interpreter() -> None:
    in_the_interpreter(ALL)


def assembled(arch: int, head_dim: int, dtype: str, mask: str, size: int) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "tests/aot.py", str(arch), str(head_dim), dtype, mask, str(size)], capture_output=True, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


SHARED = {80: 99, 90: 227}  # KiB a block may use; of 8.x, 8.6 and 8.9 have the least
SPILLED = 32  # bytes a thread, as a budget: a ragged last tile costs a few registers


def check_resources(arch: int, head_dim: int, dtype: str, mask: str, size: int) -> None:
    rows = assembled(arch, head_dim, dtype, mask, size)
    assert [r["kernel"] for r in rows] == ["forward", "delta", "dq", "dkv"]
    for row in rows:
        assert row["spilled"] <= SPILLED and row["registers"] <= 255 and row["shared"] <= SHARED[arch] * 1024, row


@pytest.mark.parametrize(("arch", "head_dim", "size"), [(80, 64, 256), (90, 100, 576)])
def test_triton_assembles_within_the_budget(arch: int, head_dim: int, size: int) -> None:
    check_resources(arch, head_dim, "bf16", "hidden", size)


def test_the_rotation_assembles_without_shared_memory() -> None:
    rows = assembled(90, 64, "bf16", "rope", 256)
    assert [r["kernel"] for r in rows] == ["rope", "rope_backward"]
    for row in rows:  # pairs are exchanged in registers, and four blocks of four warps share a processor
        assert row["spilled"] == row["shared"] == 0 and row["registers"] <= 64, row


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 576, 176])  # whole tiles of either height, and a last one in part
@pytest.mark.parametrize("mask", ["causal", "hidden", "window", "prefix"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_dim", [64, 100, 128])
@pytest.mark.parametrize("arch", [80, 90])
def test_triton_assembles_everything_within_the_budget(
    arch: int, head_dim: int, dtype: str, mask: str, size: int
) -> None:
    check_resources(arch, head_dim, dtype, mask, size)


@pytest.mark.parametrize("head_dim", [64, 100])
def test_strides_that_the_kernels_do_not_count_on_are_copied_away(head_dim: int) -> None:
    q, _, v, grad = check.draw(2, 2, 16, head_dim, torch.bfloat16, CPU)
    for t in (q, v, grad, grad[..., :1].expand(grad.shape).contiguous(), v[:1, :1]):
        assert ours.aligned(t) is t
    for t in (torch.randn(2, 2, 16, head_dim + 2)[..., :head_dim], v.transpose(2, 3).contiguous().transpose(2, 3)):
        assert ours.aligned(t).is_contiguous() and torch.equal(ours.aligned(t), t)


@pytest.mark.parametrize("size", [48, 64, 80])
@pytest.mark.parametrize("which", PATTERNS)
def test_tiles_by_brute_force(which: str, size: int) -> None:
    spec = check.example(which, 2, size)
    for queries, keys in [(16, 16), (32, 16), (16, 32)]:
        seen = spec.dense(size)[:, 0]  # (R, S, S)
        states = tiles.tile_states(spec, size, queries, keys, CPU)
        by_query, by_key = tiles.tiles(spec, size, queries, keys, CPU)
        for r, m, n in torch.cartesian_prod(*(torch.arange(x) for x in states.shape)).tolist():
            tile = seen[r, m * queries : (m + 1) * queries, n * keys : (n + 1) * keys]
            state = states[r, m, n].item()
            if spec.window is None:  # exact; a window is judged by rows alone
                whole = bool(tile.all()) and tile.shape[1] == keys
                assert state == (0 if whole else 1 if tile.any() else 2)
            assert state != 2 or not tile.any()
            assert state != 0 or tile.all()
            for listed, at, other in ((by_query, m, n), (by_key, n, m)):
                place = listed.order[r, at].tolist().index(other)
                full, visited = listed.full[r, at].item(), listed.visited[r, at].item()
                assert state == (0 if place < full else 1 if place < visited else 2)
    if which == "neighbourhood":
        assert (states == 2).sum() > torch.triu(torch.ones(states.shape[1:]), 1).sum()  # the window skips tiles too
