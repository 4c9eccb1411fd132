"""Why training stopped by itself."""

from megastar.errors import UserError

NONFINITE_GRADIENT = "step {}: the gradient is not finite; resume from the last checkpoint with a lower optim.lr"


class NonFiniteLoss(UserError):
    """The loss or its gradient stopped being finite; the last checkpoint is good."""
