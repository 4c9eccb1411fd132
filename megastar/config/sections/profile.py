"""``train.profile``: which steps torch.profiler records, and on which ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import MOST_STEPS, knob

MOST_PROFILED = 100  # steps: a trace has tens of thousands of events for each


@dataclass
class ProfileConfig:
    """The profiled steps are the ``steps`` steps after the run's first ``start`` ones."""

    start: int = knob(10, "steps of the run before the first profiled one", low=0, high=MOST_STEPS)
    steps: int = knob(0, "number of profiled steps; 0: no profile", low=0, high=MOST_PROFILED)
    ranks: list[int] = knob([0], "ranks that write a profile into RUN/profile", low=0, high=10**6)
