"""Hostile and damaged rows and logs of a run folder, through `megastar status` and `report`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.fuzz import DEEP, Tally, byte_variants, json_variants, odd_files
from tests.integration.fuzz.conftest import Box

COMMANDS = [
    ["status", "run"],
    ["status", "run", "--json"],
    ["report", "run", "--out", "r.html", "--no-samples", "--no-attention"],
]
LINES = [
    b'{"event": 5, "time": 3}', b"[1]", b"null", b'{"step": "x", "loss_ar": "y", "event": "saved", "time": "x"}',
    b'{"step": 1e400, "loss_ar": 1, "event": "saved", "time": "9999-99-99"}', b'{"loss_ar": [1]}', DEEP.encode(),
    b'{"step": 2, "loss_ar": NaN, "loss": Infinity, "step_s": Infinity, "images_per_s": NaN}', b"\xff\xfe", b"\0" * 300,
    b'{"step": 3, "loss_ar": 1, "loss": ' + b"9" * 400 + b', "step_s": 1e308, "images_per_s": -1}',
    b'{"time": "2026-01-31T12:00:00+00:00", "event": "resumed", "step": ' + b"9" * 400 + b"}",
    b'{"time": "0001-01-01T00:00:00", "event": "started", "step": 0, "ranks": 0, "packages": [1]}',
    b'{"time": "2026-01-31T12:00:00+00:00", "event": "started", "step": 0, "ranks": 99999999999, "steps": -5}',
    b'{"time": "2026-01-31T12:00:00+00:00", "event": "saved", "step": null, "text": null, "host": 5}',
    b'{"time": "2026-01-31T12:00:00+00:00", "event": "warning", "step": 1, "situation": ["x"], "over": "x", "text": "[/]"}',
    b'{"step": 5, "epoch": NaN, "metric": "[/]", "value": 1, "samples": 9, "cfg_scale": 1, "weights": "ema", "against": "", "key": ""}',
    b'{"step": 5, "epoch": 1e400, "metric": "x", "value": 1e400, "samples": 0, "cfg_scale": null, "weights": 5, "against": []}',
    b'{"step": true, "loss_ar": true, "loss": false, "step_s": true}', b'{"step": 4, "a": ' + b"1" * 2_000_000 + b"}",
]  # fmt: skip
FILES = (
    "events.jsonl",
    "metrics.jsonl",
    "evaluations.jsonl",
    "evaluating.json",
    "heartbeats/rank-00000.json",
    "requeues.log",
    "bad_hosts.log",
)


@pytest.mark.parametrize("name", FILES)
def test_rows(box: Box, name: str) -> None:
    tally, rng = Tally(name), random.Random(name)
    path = box.path / "run" / name
    whole = path.read_bytes()
    variants: list[tuple[str, bytes]] = list(byte_variants(whole, rng, 16))
    if name.endswith((".jsonl", ".json")):
        rows = [json.loads(line) for line in whole.splitlines()]
        for number in range(20):
            i = rng.randrange(len(rows))
            for label, text in json_variants(rows[i], rng, 1):
                lines = whole.splitlines()
                lines[i] = text
                variants.append((f"{number} row {i}: {label}", b"\n".join(lines) + b"\n"))
        variants += [(f"line {i}", line + b"\n" + whole) for i, line in enumerate(LINES)]
        variants += [(f"last line {i}", whole + line) for i, line in enumerate(LINES)]
        variants += [("many names", b"".join(b'{"step": 1, "loss_ar": 1, "x%d": 1}\n' % i for i in range(20_000)))]
    variants += [("one line of 20 MB", b"x" * 20_000_000), ("many lines", b"[]\n" * 1_000_000), ("empty", b"")]
    for i, (label, data) in enumerate(variants):
        box.variant(path, data)
        box.run(tally, label, *COMMANDS[i % 3])
    for kind, make in odd_files().items():
        for words in COMMANDS[::2]:
            box.instead(path, make)
            box.run(tally, f"a {kind}", *words)
    tally.check()


def test_a_run_folder_of_other_things(box: Box) -> None:
    tally = Tally("run folder")
    for kind, make in odd_files().items():
        for name in ("run", "run/checkpoints", "run/heartbeats", "run/samples", "run/checkpoints/step-00000009"):
            box.fresh()
            path = box.path / name
            if path.exists():
                path.rename(Path(f"{path}.before"))
            make(path)
            for words in COMMANDS[::2]:
                box.run(tally, f"{name} is a {kind}", *words)
    tally.check()
