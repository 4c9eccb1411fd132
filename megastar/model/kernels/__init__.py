"""Attention behind one signature: ``attention(q, k, v, mask)``. Backends: sdpa (the reference), flex, flash, triton."""

from megastar.model.kernels.select import attention, set_backend

__all__ = ["attention", "set_backend"]
