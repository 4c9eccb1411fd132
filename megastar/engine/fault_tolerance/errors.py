"""Why training stopped by itself."""

from megastar.errors import UserError


class NonFiniteLoss(UserError):
    """Losses or gradients that are not finite, or spikes, and no skipping or going back helped."""


class CorruptReplica(RuntimeError):
    """What must be equal on several ranks is not: no mistake of the user's, the job may start again elsewhere."""
