"""What a site would write into slurm/env.sh, for the clusters of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.integration.conftest import ROOT


def write_site(folder: Path, *more: str) -> Path:
    """``folder``/env.sh, with further lines of shell."""
    ours = (f"MEGASTAR_VENV={sys.prefix}", f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo", *more)
    site = folder / "env.sh"
    site.write_text((ROOT / "slurm/env.sh").read_text() + "\n" + "\n".join(ours) + "\n")
    return site
