"""The tests run on the CPU, also where there is a GPU: several gloo ranks, and results equal to the last bit."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megastar.utils.signals import RANK_SIGNALS

if not os.environ.get("MEGASTAR_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

with suppress(ImportError):  # some environments run no test that needs it
    from hypothesis import settings

    # The same examples each time; `make test-fuzz` draws others.
    settings.register_profile("same", derandomize=True)
    settings.load_profile("default" if os.environ.get("MEGASTAR_FUZZ") == "all" else "same")

HERE = Path(__file__).parent
# Files that take more than 20 s, longest first. `make test` runs them in this order before all others: a worker that starts
# one of them at the end would leave the other one without work.
LONG = (
    "dist/test_engine.py",
    "integration/test_compare.py",
    "dist/test_muon.py",
    "unit/test_benchmarks.py",
    "integration/fuzz/test_run_folder.py",
    "dist/test_repa.py",
    "integration/evaluation/test_interrupted.py",
    "integration/evaluation/test_compared.py",
    "integration/test_outage.py",
    "integration/test_watchdog.py",
    "integration/run_folder/test_token_order.py",
    "integration/codebooks/test_launched_training.py",
    "integration/evaluation/test_scheduled.py",
    "integration/test_local_launch.py",
    "integration/fuzz/test_data.py",
    "integration/methods/test_repa.py",
    "integration/run_folder/test_negatives.py",
    "dist/test_elastic.py",
    "integration/test_disks.py",
    "unit/data/pretokenize/test_many_processes.py",
    "integration/hub/test_folder.py",
    "unit/tokenizer/test_tokenizer.py",
    "integration/test_faults.py",
    "integration/test_scores.py",
    "dist/test_token_order.py",
    "dist/test_cut.py",
    "unit/evaluation/test_fd_dinov2.py",
    "integration/test_train.py",
    "integration/storage/test_store.py",
    "dist/test_convert.py",
    "dist/test_exactly_once.py",
    "integration/test_doctor.py",
    "integration/run_folder/test_finetune.py",
    "integration/test_api.py",
    "integration/hub/test_server.py",
    "integration/test_muon.py",
    "integration/fuzz/test_weights.py",
    "unit/test_scale_benchmark.py",
    "integration/run_folder/test_moved_run.py",
)
PLACES = {HERE / name: place for place, name in enumerate(LONG)}
assert all(path.is_file() for path in PLACES), f"{[str(p) for p in PLACES if not p.is_file()]}: renamed, or gone"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACES.get(item.path, len(PLACES)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither read nor fill the user's cache, also in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGASTAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws from torch's generator does not depend on the tests before it."""
    if (torch := sys.modules.get("torch")) is not None:  # tests without torch do not import it
        torch.manual_seed(0)


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
