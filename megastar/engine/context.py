"""The device, precision and process groups of this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megastar.parallel.mesh import Mesh


@dataclass
class Context:
    """Device, precision, mesh and process groups (None: no other rank) of this process."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    tensor: int = 1
    data_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    secret: bytes = b""  # shared by the ranks of this launch: authenticates what they write to their store

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.world, self.tensor, self.rank)
