"""Errors by which training stops itself."""

from megastar.errors import UserError


class NonFiniteLoss(UserError):
    """Non-finite or spiking losses or gradients that neither skipping steps nor rolling back has cured."""


class CorruptReplica(RuntimeError):
    """Replicas that must be equal differ. Not a user error: the job may be restarted on other hosts."""
