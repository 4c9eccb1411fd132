"""The queue of a comparison's jobs: its signal handlers."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest
from rich.console import Console

from megastar.experiments.job_queue import Job, JobQueue, QueueStopped


class Text(io.StringIO):
    """Raises, as a buffered stream does, if a signal handler writes to it."""

    def write(self, text: str) -> int:
        assert not stopping, "written to by a signal handler"
        return super().write(text)


stopping: list[int] = []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1])
def test_a_signal_is_reported_outside_its_handler(tmp_path, monkeypatch, number):
    handle = JobQueue._handle_signal

    def watched(self, number, frame):
        stopping.append(number)
        try:
            handle(self, number, frame)
        finally:
            stopping.clear()

    monkeypatch.setattr(JobQueue, "_handle_signal", watched)
    former = signal.getsignal(number)
    file = Text()
    queue = JobQueue([{}], Console(file=file))
    job = Job("a", "train", ["doctor", "--help"], tmp_path / "log", 1)
    start = JobQueue._start

    def start_then_signal(self, job, bar):  # the handlers are installed now; the signal arrives while the job runs
        start(self, job, bar)
        if not sent:
            sent.append(threading.Timer(0.3, os.kill, (os.getpid(), number)))
            sent[0].start()

    sent: list[threading.Timer] = []
    monkeypatch.setattr(JobQueue, "_start", start_then_signal)
    with pytest.raises(QueueStopped) as error:
        queue.run([job], lambda attempt: [job])
    assert error.value.signal == number and "stopping: the runs save a checkpoint first" in file.getvalue()
    assert signal.getsignal(number) == former and not queue.running


def test_a_signal_after_the_last_job_is_reported_too(tmp_path):
    file = io.StringIO()

    def after(attempt):
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    with pytest.raises(QueueStopped):
        JobQueue([{}], Console(file=file)).run([Job("a", "train", ["--version"], tmp_path / "log", 1)], after)
    assert file.getvalue().count("stopping: the runs save a checkpoint first") == 1


def test_an_ignored_hangup_stays_ignored(tmp_path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        queue, seen = JobQueue([{}], Console(file=io.StringIO())), []

        def after(attempt):
            os.kill(os.getpid(), signal.SIGHUP)
            seen.append(attempt.status)
            return []

        queue.run([Job("a", "train", ["--version"], tmp_path / "log", 1)], after)
        assert seen == [0] and not queue.stop_signal
    finally:
        signal.signal(signal.SIGHUP, former)
