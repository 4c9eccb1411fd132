"""The tests run on the CPU, also where there is a GPU: several gloo ranks, and results equal to the last bit."""

import logging
import os
from collections.abc import Iterator

import pytest

if not os.environ.get("MEGASTAR_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands configure the package's logger; later tests see it as it was."""
    logger = logging.getLogger("megastar")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
