"""Attention behind one signature: ``attention(q, k, v, mask)``. Backends: sdpa (the reference), flex, flash, triton."""

from megastar.model.kernels.select import Like, Plan, attention, plan, set_backend

__all__ = ["Like", "Plan", "attention", "plan", "set_backend"]
