"""A batch that does not come is in the events while it does not."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from megastar.data.shards.reader import ShardSet
from megastar.engine.input_pipeline import wait_reporter as waits_module
from megastar.engine.input_pipeline.wait_reporter import WaitReporter
from megastar.run_dir.events import open_situations, read_events
from tests.unit.data.shards.test_shards import write_set
from tests.unit.data.test_loader import loader


def test_a_long_wait_is_told_once_while_it_lasts_and_when_it_is_over(tmp_path, monkeypatch, caplog):
    gate, original = threading.Event(), ShardSet.gather

    def held(*arguments):
        assert gate.wait(60)
        return original(*arguments)

    monkeypatch.setattr(ShardSet, "gather", held)
    monkeypatch.setattr(waits_module, "REPORT_AFTER", 0.2)
    source = loader(write_set(tmp_path / "codes", (12, 12)))
    waits = WaitReporter(source, SimpleNamespace(rank=3), tmp_path)
    during: list[dict] = []

    def poll() -> bool:
        waits.poll()
        during.extend(open_situations(read_events(tmp_path)))
        if len(during) == 4:  # three more polls after the report
            gate.set()
        return False

    batches = source.batches(give_up=poll)
    for _ in range(3):
        waits.begin()
        next(batches)
        waits.end()
        monkeypatch.setattr(waits_module, "REPORT_AFTER", 600.0)  # later batches may be slow without a report
    source.close()
    first, over = read_events(tmp_path)
    assert len(during) >= 4 and all(found == first for found in during)
    assert first["event"] == "warning" and first["step"] == 0
    assert "rank 3 on " in first["text"] and "for its batch of step 1" in first["text"]
    assert f"they are read from {tmp_path / 'codes'}" in first["text"] and first["text"] in caplog.text
    assert over["over"] and over["text"].startswith("the batch of step 1 arrived after")


def test_what_ails_the_store_is_told_by_one_rank_of_a_host(tmp_path):
    source = SimpleNamespace(step=4, messages=lambda: ("", trouble))
    trouble = ""
    ranks = [WaitReporter(source, SimpleNamespace(rank=r), tmp_path) for r in range(2)]
    ranks[1].store = ranks[0].store
    for trouble in ("", "the cache is full", "the cache is full", ""):  # noqa: B007
        for rank in ranks:
            rank.begin()
            rank.end()
    full, over = read_events(tmp_path)
    assert full["text"].endswith(": the cache is full") and not full["over"] and over["over"]


def test_a_second_fit_in_one_process_reports_the_same_step_again(tmp_path, monkeypatch):
    monkeypatch.setattr(waits_module, "REPORT_AFTER", 0.0)
    store = waits_module.dist.HashStore()
    monkeypatch.setattr(waits_module.dist, "HashStore", lambda: store)
    shards = SimpleNamespace(folder="codes")
    source = SimpleNamespace(step=4, messages=lambda: ("", ""), shards=shards)
    for _ in range(2):
        ranks = [WaitReporter(source, SimpleNamespace(rank=r), tmp_path) for r in range(2)]
        for rank in ranks:
            rank.begin()
            rank.poll()
    assert [e["step"] for e in read_events(tmp_path)] == [4, 4]
