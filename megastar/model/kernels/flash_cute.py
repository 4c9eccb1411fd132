"""The column intervals as a mask function for flash-attn 4, in its kernel language (CuTe). Imported on first use.

Written for flash-attn-4 4.0.0b36; not yet run on a GPU.
"""

import cutlass
import cutlass.cute as cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def visible(batch, head, i, j, seqlen_info, aux_tensors):
    """Whether query i sees key j; aux_tensors: start and end, (B, S) int32 each."""
    start = scalar_to_ssa(aux_tensors[0][batch[0], j[0]], cutlass.Int32)
    end = scalar_to_ssa(aux_tensors[1][batch[0], j[0]], cutlass.Int32)
    return (i >= start) & (i < end)
