"""Attention kernels behind one signature: ``attention(q, k, v, mask)``."""

from megastar.model.kernels.sdpa import attention

__all__ = ["attention"]
