"""megastar: self-guided (ST-AR) training of autoregressive image transformers, from a laptop to a cluster.

The public API (docs/api.md) is what ``__all__`` lists. Each name is imported at its first use, so that
``import megastar`` alone loads neither torch nor numpy.
"""

from typing import TYPE_CHECKING

from megastar.version import __version__

if TYPE_CHECKING:
    from megastar.api import Model, load
    from megastar.config.load import load_config
    from megastar.config.schema import RunConfig
    from megastar.data.dataset import TokenDataset
    from megastar.engine.trainer import Trainer
    from megastar.errors import UserError
else:
    _SOURCES = {
        "Model": "megastar.api",
        "RunConfig": "megastar.config.schema",
        "TokenDataset": "megastar.data.dataset",
        "Trainer": "megastar.engine.trainer",
        "UserError": "megastar.errors",
        "load": "megastar.api",
        "load_config": "megastar.config.load",
    }

    def __getattr__(name):
        if name not in _SOURCES:
            raise AttributeError(f"module 'megastar' has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_SOURCES[name]), name)
        return value

    def __dir__():
        return sorted(__all__)


__all__ = ["Model", "RunConfig", "TokenDataset", "Trainer", "UserError", "__version__", "load", "load_config"]
