"""The tests run on the CPU, also where there is a GPU: several gloo ranks, and results equal to the last bit."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

from megastar.utils.signals import RANK_SIGNALS

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


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command that ends ignores stop signals, and processes of later tests would inherit that."""
    before = {number: signal.getsignal(number) for number in RANK_SIGNALS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
