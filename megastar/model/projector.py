"""The student's projectors: their outputs are compared with a teacher's or an encoder's unprojected features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Module):
    """Linear-SiLU-Linear-SiLU-Linear, no batch norm: (..., D) -> (..., C), with C = ``out``, by default D.

    D to D it is SimSiam-like; to an encoder's width it is REPA's (arXiv 2410.06940).
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(hidden, hidden)
        self.w3 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w2(F.silu(self.w1(x)))))
