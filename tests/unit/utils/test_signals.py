"""The flag that stop signals set, and what happens to the handlers afterwards."""

from __future__ import annotations

import signal

import pytest

from megastar.utils.signals import StopFlag

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of this process, restored afterwards."""
    before = {n: signal.getsignal(n) for n in NUMBERS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_sets_the_flag_and_a_second_interrupt_ends_at_once(handlers):
    flag = StopFlag()
    assert flag.signal == 0
    signal.raise_signal(signal.SIGUSR1)
    assert flag.signal == signal.SIGUSR1
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    flag.restore()
    assert {n: signal.getsignal(n) for n in NUMBERS} == handlers


def test_a_handler_that_python_did_not_install_is_replaced_by_the_default(monkeypatch):
    original = signal.signal
    monkeypatch.setattr(signal, "signal", lambda n, h: original(n, h) and None)  # what Python returns for one in C
    flag = StopFlag()
    monkeypatch.undo()
    flag.restore()
    assert [signal.getsignal(n) for n in NUMBERS] == [signal.SIG_DFL] * 3


def test_a_caught_signal_is_raised_again_when_the_flag_is_released():
    caught = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    flag = StopFlag()
    signal.raise_signal(signal.SIGTERM)
    assert not caught
    flag.release()
    assert caught == [signal.SIGTERM]


def test_after_ignore_no_signal_has_an_effect():
    flag = StopFlag()
    flag.ignore()
    for number in NUMBERS:
        signal.raise_signal(number)
    flag.restore()
    assert flag.signal == 0 and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
