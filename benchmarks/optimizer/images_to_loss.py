"""Images that a variant of a comparison needs to reach the final validation loss of another, divided by the other's.

    python -m benchmarks.optimizer.images_to_loss OUT REFERENCE:VARIANT ...     e.g. runs/compare_muon ar:ar_muon

Reads the runs of a finished `megastar compare` (OUT/runs/VARIANT-seedN). Between two validations (train.val_every) the loss
is interpolated linearly. The reference's own schedule is not shortened: a ratio below 1 is of two equally long schedules.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path

from megastar.config.load import load_config
from megastar.run_dir.jsonl import read_jsonl
from megastar.run_dir.layout import CONFIG, METRICS


def losses_of(run: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of a run, by step."""
    found = {row["step"]: row["val_loss_ar"] for row in read_jsonl(run / METRICS) if "val_loss_ar" in row}
    if not found:
        raise SystemExit(f"{run / METRICS} has no val_loss_ar: set base.train.val_every and data.val_shards")
    return sorted(found.items())


def steps_to(losses: list[tuple[int, float]], target: float) -> float | None:
    """The first step at which the loss is at most ``target``; None if it never is."""
    before: tuple[int, float] | None = None
    for step, loss in losses:
        if loss <= target:
            if before is None:
                return step
            (a, high) = before
            return a + (step - a) * (high - target) / (high - loss)
        before = (step, loss)
    return None


def seeds_of(out: Path, variant: str) -> dict[int, Path]:
    matches = ((re.fullmatch(re.escape(variant) + r"-seed(\d+)", p.name), p) for p in (out / "runs").iterdir())
    found = {int(m[1]): p for m, p in matches if m}
    if not found:
        raise SystemExit(f"{out}/runs holds no run of {variant}")
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("pairs", nargs="+", metavar="REFERENCE:VARIANT")
    a = p.parse_args()
    for pair in a.pairs:
        reference, _, variant = pair.partition(":")
        theirs, ours = seeds_of(a.out, reference), seeds_of(a.out, variant)
        ratios = []
        for seed in sorted(theirs.keys() & ours.keys()):
            batch = load_config(theirs[seed] / CONFIG).train.global_batch
            (end, target), losses = losses_of(theirs[seed])[-1], losses_of(ours[seed])
            step = steps_to(losses, target)
            reached = "never" if step is None else f"{step * batch:,.0f} images, {step / end:.3f} of {end * batch:,}"
            print(f"seed {seed}: {reference} ends at {target:.4f}; {variant}: {reached}; ends at {losses[-1][1]:.4f}")
            ratios += [] if step is None else [step / end]
        if ratios:
            spread = f" +- {statistics.stdev(ratios):.3f}" if len(ratios) > 1 else ""
            print(f"{variant} / {reference}: {statistics.fmean(ratios):.3f}{spread} of the images, {len(ratios)} seeds")


if __name__ == "__main__":
    main()
