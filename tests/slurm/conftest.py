"""One cluster of four nodes for all tests here, and the settings a site would write into slurm/env.sh."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import world  # noqa: F401
from tests.slurm.array import lose_a_task
from tests.slurm.cluster import Cluster
from tests.slurm.hosts import fail_hosts
from tests.slurm.settings import write_site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")
    # Last: they have run by then, behind the waits of the training.
    items.sort(key=lambda item: item.path == Path(__file__).with_name("test_jobs.py"))


class Behind:
    """Work that goes on while a test waits for SLURM; ``result`` starts it where nobody did."""

    def __init__(self, work: Callable[[], Any]):
        self.work, self.pool = work, ThreadPoolExecutor(1)
        self.future: Future | None = None

    def start(self) -> None:
        self.future = self.future or self.pool.submit(self.work)

    def result(self) -> Any:
        self.start()
        return self.future.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=4) as c:
        c.env |= {"MEGASTAR_ENV": str(write_site(c.folder))}
        yield c


@pytest.fixture(scope="session")
def array_that_loses_a_task(cluster, world, tmp_path_factory):  # noqa: F811
    with Behind(lambda: lose_a_task(cluster, world, tmp_path_factory.mktemp("array"))) as behind:
        yield behind


@pytest.fixture(scope="session")
def hosts_that_fail(world, tmp_path_factory):  # noqa: F811
    with Behind(lambda: fail_hosts(world, tmp_path_factory.mktemp("hosts"))) as behind:
        yield behind
