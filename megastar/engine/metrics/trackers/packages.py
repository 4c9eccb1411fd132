"""Which trackers are installed. Nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.machinery import PathFinder

from megastar.errors import UserError

MODULES = {  # tracker -> what its extra installs and it imports
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}


def check_installed(names: Iterable[str], field: str) -> None:
    """Raise ``UserError`` for a tracker whose package is not installed."""
    for name in names:
        missing = [module for module in MODULES.get(name, ()) if not _is_installed(module)]
        if missing:
            raise UserError(
                f"{field} names {name}, whose package {missing[0]} is not installed: run pip install 'megastar[{name}]', or "
                f"leave {name} out"
            )


def _is_installed(module: str) -> bool:
    """A folder without code, such as the wandb/ of earlier runs, is importable but is no package."""
    found = PathFinder.find_spec(module)
    return found is not None and found.origin is not None
