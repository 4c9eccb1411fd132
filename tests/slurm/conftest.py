"""One cluster of three nodes for all tests here, and the settings a site would write into slurm/env.sh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, world  # noqa: F401
from tests.slurm.cluster import Cluster

SIZE = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")  # of the nodes here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as c:
        site = c.folder / "env.sh"
        text = (ROOT / "slurm/env.sh").read_text()
        ours = f"\nMEGASTAR_VENV={sys.prefix}\nexport PYTHONPATH={ROOT} OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo\n"
        site.write_text(text + ours)
        c.env |= {"MEGASTAR_ENV": str(site)}
        for name in [n for n in c.env if n.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SBATCH_"))]:
            del c.env[name]
        yield c
