"""The fields of the section token_order: the order of an image's tokens. That of the samples: data/order.py."""

from __future__ import annotations

from dataclasses import dataclass

from megastar.config.knob import MOST_STEPS, knob


@dataclass
class TokenOrderConfig:
    """The order in which the network reads and predicts the tokens of an image (docs/random_order.md)."""

    kind: str = knob(
        "raster",
        "raster: row by row; random: a permutation per sequence, with the position of the next token as an input "
        "(model.target_position)",
        choices=("raster", "random"),
    )
    anneal_start: float = knob(
        1.0,
        "random: until here every image is permuted; 1.0 of the run: to its end [C; RAR: 0.5]",
        low=0,
        high=MOST_STEPS,
    )
    anneal_end: float = knob(
        1.0,
        "random: from here on every image is in raster order; the share of permuted ones falls linearly in between "
        "[C; RAR: 0.75]",
        low=0,
        high=MOST_STEPS,
    )
    anneal_unit: str = knob(
        "run",
        "unit of both: run, fractions of the run's steps; epochs, passes over the shards",
        choices=("run", "epochs"),
    )

    def random_share(self, epoch: float, epochs: float) -> float:
        """Share of the images that are permuted after ``epoch`` of ``epochs`` passes over the shards: 1 before
        ``anneal_start``, 0 from ``anneal_end`` on, linear in between, as RAR (arXiv 2411.00776)."""
        if self.kind != "random":
            return 0.0
        place = epoch if self.anneal_unit == "epochs" else epoch / epochs
        if place < self.anneal_start:
            return 1.0
        if place >= self.anneal_end:
            return 0.0
        return (self.anneal_end - place) / (self.anneal_end - self.anneal_start)

    @property
    def text(self) -> str:
        """Of a random order, for people."""
        unit = " epochs" if self.anneal_unit == "epochs" else " of the run"
        never = (self.anneal_start, self.anneal_unit) == (1.0, "run")
        return "random order" + ("" if never else f", annealed from {self.anneal_start:g} to {self.anneal_end:g}{unit}")

    def anneals(self, epochs: float) -> bool:
        """Whether a run of that many epochs reads images in raster order before its end."""
        return self.kind == "random" and self.anneal_start < (epochs if self.anneal_unit == "epochs" else 1.0)
