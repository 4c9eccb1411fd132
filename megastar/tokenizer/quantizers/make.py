"""The quantizer that a configuration names."""

from __future__ import annotations

from megastar.config.schema import TokenizerConfig
from megastar.tokenizer.quantizers.base import Quantizer
from megastar.tokenizer.quantizers.fsq import FiniteScalarQuantizer
from megastar.tokenizer.quantizers.ibq import IndexBackpropagationQuantizer
from megastar.tokenizer.quantizers.lfq import LookupFreeQuantizer
from megastar.tokenizer.quantizers.vq import VectorQuantizer


def make_quantizer(c: TokenizerConfig) -> Quantizer:
    """The quantizer ``c.quantizer``; config/validate.py has checked the number of codes."""
    V, E = c.codebook_size, c.codebook_embed_dim
    if c.quantizer == "lfq":
        return LookupFreeQuantizer(V, E)
    if c.quantizer == "fsq":
        return FiniteScalarQuantizer(V, c.fsq_levels)
    if c.quantizer == "ibq":
        return IndexBackpropagationQuantizer(V, E)
    return VectorQuantizer(V, E, c.codebook_l2_norm)
