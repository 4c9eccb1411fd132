"""What representation alignment adds to a run, from shapes: weights, operations, memory, stored features.

N sequences, P aligned patches, D width of the network, W hidden width of the projector, C width of the encoder.
"""

from __future__ import annotations

from megastar.config.schema import ModelConfig
from megastar.config.sections.repa import RepaConfig
from megastar.errors import UserError

PROJECTOR = "repa_projector."  # of the student's weights
PROJECTORS = ("projector.", PROJECTOR)  # these are the student's alone; the former is ST-AR's
WIDTHS = {"efflite0": 112}  # of encoders whose width their name determines
FEATURE_BYTES = 2  # of a stored feature, float16


def encoder_width(repa: RepaConfig) -> int:
    """C. Raises ``UserError`` where neither ``repa.width``, which training takes from the shards, nor the encoder tells it."""
    if width := repa.width or WIDTHS.get(repa.encoder, 0):
        return width
    raise UserError(
        "repa.width = 0: no token shards are here whose features tell the encoder's width; set it, as 768 for DINOv2 ViT-B"
    )


def projector_shapes(model: ModelConfig, repa: RepaConfig | None) -> dict[str, tuple[int, ...]]:
    """The projector's weights by name, in the module's order; empty without alignment."""
    if repa is None or not repa.active:
        return {}
    D, W, shapes = model.dim, repa.projector_dim, dict[str, tuple[int, ...]]()
    for name, rows, columns in (("w1", W, D), ("w2", W, W), ("w3", encoder_width(repa), W)):
        shapes |= {f"{PROJECTOR}{name}.weight": (rows, columns), f"{PROJECTOR}{name}.bias": (rows,)}
    return shapes


def projector_flops(model: ModelConfig, repa: RepaConfig, sequences: int) -> int:
    """Operations of the projector's forward pass on all aligned positions."""
    weights = [shape for shape in projector_shapes(model, repa).values() if len(shape) == 2]
    return sequences * repa.patches(model.image_tokens) * 2 * sum(rows * columns for rows, columns in weights)


def alignment_bytes(model: ModelConfig, repa: RepaConfig | None, sequences: int, element: int) -> int:
    """Memory of the loss of ``sequences``: the projector's hidden layers, before and after their activation, its output, in
    fp32 output, target and their products, and the batch's features."""
    if repa is None or not repa.active:
        return 0
    C, T = encoder_width(repa), model.image_tokens
    projector = element * (4 * repa.projector_dim + C)
    wide = 4 * 3 * C
    return sequences * (repa.patches(T) * (projector + wide) + T * C * FEATURE_BYTES)


def stored_bytes(repa: RepaConfig, model: ModelConfig) -> int:
    """Bytes of the features of one stored crop."""
    return model.image_tokens * encoder_width(repa) * FEATURE_BYTES
