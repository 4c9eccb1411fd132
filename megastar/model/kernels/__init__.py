"""Attention behind one signature: ``attention(q, k, v, mask)``. Backends: sdpa (the reference), flex, flash, triton."""

from megastar.model.kernels.select import AttentionPlan, Like, attention, plan, set_backend

__all__ = ["Like", "AttentionPlan", "attention", "plan", "set_backend"]
