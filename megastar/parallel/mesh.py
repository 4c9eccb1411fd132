"""Layout of the ranks over data x tensor groups; the ranks of one tensor group are adjacent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """``world`` ranks = ``data`` x ``tensor``; a tensor group shares one copy of each layer and one batch."""

    world: int
    tensor: int
    rank: int

    @property
    def data(self) -> int:
        return self.world // self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor
