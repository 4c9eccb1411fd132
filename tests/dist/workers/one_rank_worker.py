"""Run on one rank from test_gradients.py: gradients kept in place against DeepSpeed's buckets."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megastar.engine.zero import setup
from megastar.engine.zero.one_data_rank import keep_gradients
from tests.dist.workers.guards_worker import engines_of, one_step, state_of


def run(
    out: Path, stage: str, accumulation: int, dtype: str, kept: bool
) -> tuple[dict[str, torch.Tensor], list[float]]:
    setup.keep_gradients = keep_gradients if kept else (lambda engine: False)
    torch.manual_seed(0)
    cfg, ctx, engines = engines_of(out, 1, stage, accumulation, dtype=dtype)
    hooks = getattr(engines.student.optimizer, "_grad_acc_hooks", [])
    assert stage.endswith("zero0.json") or bool(hooks) != kept
    norms = []
    for step in range(5):
        moved = one_step(cfg, ctx, engines, step, scale=float("nan") if step == 1 else 1.0, skip=step == 3)
        assert moved == (step not in (1, 3))
        if moved:
            norms.append(engines.grad_norm())
    return state_of(engines), norms


def main(out: Path) -> None:
    cases = ((1, 1, "bf16"), (1, 2, "fp32"), (2, 1, "fp32"), (2, 2, "bf16"), (0, 2, "fp32"))
    for stage, accumulation, dtype in cases:
        file = f"{'tests/dist' if stage == 0 else 'configs'}/ds/zero{stage}.json"
        want, got = (run(out, file, accumulation, dtype, kept) for kept in (False, True))
        assert got[1] == want[1] and len(got[1]) == 3, (stage, accumulation, dtype)
        for name, tensor in want[0].items():
            assert torch.equal(got[0][name], tensor), (stage, accumulation, dtype, name)
    (out / "passed").write_text(str(len(cases)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
