"""megastar: self-guided (ST-AR) training of autoregressive image transformers, from a laptop to a cluster."""

__version__ = "0.2.0"
