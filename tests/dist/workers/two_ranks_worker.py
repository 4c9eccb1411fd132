"""Run on two ranks from test_gradients.py: flat gradients against DeepSpeed's buckets at stage 1."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megastar.engine.zero import flat_gradients, setup
from megastar.engine.zero.flat_gradients import flatten_gradients
from tests.dist.workers.guards_worker import engines_of, one_step, state_of


def run(out: Path, accumulation: int, flat: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    applied = []
    setup.flatten_gradients = lambda engine: applied.append(flat and flatten_gradients(engine)) or applied[-1]
    torch.manual_seed(0)
    cfg, ctx, engines = engines_of(out, 1, "configs/ds/zero1.json", accumulation, dtype="fp32")
    assert any(applied) is flat
    norms = []
    for step in range(5):
        moved = one_step(cfg, ctx, engines, step, scale=float("nan") if step == 1 else 1.0, skip=step == 3)
        assert moved == (step not in (1, 3))
        if moved:
            norms.append(engines.grad_norm())
    return state_of(engines), norms


def main(out: Path) -> None:
    cases = ((1, 1 << 23), (2, 1 << 23), (2, 1 << 10))
    for accumulation, bucket in cases:
        flat_gradients.BUCKET = bucket
        want, got = (run(out, accumulation, flat) for flat in (False, True))
        assert got[1] == want[1] and len(got[1]) == 3, (accumulation, bucket, got[1], want[1])
        for name, tensor in want[0].items():
            assert torch.equal(got[0][name], tensor), (accumulation, bucket, name)
    if dist.get_rank() == 0:
        (out / "passed").write_text(str(len(cases)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
