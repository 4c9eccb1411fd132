"""Hostile and damaged folders in the Hub's layout, and summaries of profiles and trackers in run folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megastar.checkpoint.hub.convert_to import to_hub_folder
from tests.fuzz import Tally, byte_variants, dumps, json_variants
from tests.integration.fuzz.conftest import Box
from tests.integration.fuzz.test_weights import pairs, try_all

COMMANDS = [
    ["convert", "--inspect", "--verify", "hub"],
    ["sample", "hub", "--count", "1", "--device", "cpu"],
    ["convert", "hub", "--to", "safetensors", "--out", "o.safetensors"],
    ["convert", "hub", "--to", "hf", "--out", "again"],
]
PATHS = (
    "../../weights.safetensors",
    "/etc/passwd",
    "..",
    "a/b.safetensors",
    "tokenizer/tokenizer.safetensors",
    "x\0y",
    "",
)


def folder_of(whole: Path, name: str, shard_bytes: int = 1 << 30) -> Path:
    """Beside the files of every case; made once."""
    if not (whole / name).exists():
        to_hub_folder(
            whole / "weights.safetensors",
            whole / name,
            "w",
            tokenizer=whole / "tokenizer.safetensors",
            shard_bytes=shard_bytes,
        )
    return whole / name


def test_config(box: Box) -> None:
    tally, rng = Tally("config.json of a Hub folder"), random.Random("hub")
    folder_of(box.whole, "hub")
    box.fresh()
    path = box.path / "hub" / "config.json"
    whole: dict[str, Any] = json.loads(path.read_text())
    entry = whole["weights"]["model.safetensors"]
    variants = [
        (f"{n} = {v!s:.20}", dumps(whole | {"model": whole["model"] | {n: v}})) for n, v in pairs(whole["model"])[::3]
    ]
    variants += [(f"file {name!r}", dumps(whole | {"weights": {name: entry}})) for name in PATHS]
    variants += [
        ("no file", dumps(whole | {"weights": {}})),
        ("two files", dumps(whole | {"weights": {"a.safetensors": entry, "b.safetensors": entry}})),
    ]
    variants += [(label, text) for label, text in json_variants(whole, rng, 32)]
    variants += [(label, text) for label, text in byte_variants(path.read_bytes(), rng, 12)]
    try_all(box, tally, path, variants, COMMANDS)


def test_index(box: Box) -> None:
    tally, rng = Tally("model.safetensors.index.json"), random.Random("index")
    folder_of(box.whole, "hub-parts", 4000)
    box.fresh()
    path = box.path / "hub-parts" / "model.safetensors.index.json"
    whole = json.loads(path.read_text())
    first = next(iter(whole["weight_map"]))
    variants = [(f"file {name!r}", dumps({"weight_map": whole["weight_map"] | {first: name}})) for name in PATHS]
    variants += [(label, text) for label, text in json_variants(whole, rng, 32)]
    commands = [[word.replace("hub", "hub-parts") if word == "hub" else word for word in words] for words in COMMANDS]
    try_all(box, tally, path, variants, commands)


def test_profile(box: Box) -> None:
    tally, rng = Tally("RUN/profile"), random.Random("profile")
    row = {"name": "aten::mm", "calls": 3, "seconds": 0.5, "device_seconds": 0.0, "phase": "forward"}
    whole = {
        "rank": 0, "ranks": 1, "device": "CPU", "torch": "2", "first": 4, "steps": 2, "seconds": 1.0, "trace": "t.json.gz",
        "memory": "m.pickle", **{key: [row, row] for key in ("phases", "operators", "kernels", "host_syncs")},
    }  # fmt: skip
    folder = box.whole / "run" / "profile"
    folder.mkdir(exist_ok=True)
    (folder / "rank0-steps4-5.json").write_text(json.dumps(whole))
    box.fresh()
    path = box.path / "run" / "profile" / "rank0-steps4-5.json"
    variants = [(label, text) for label, text in json_variants(whole, rng, 48)]
    variants += [(label, text) for label, text in byte_variants(path.read_bytes(), rng, 12)]
    try_all(box, tally, path, variants, [["profile", "run"], ["profile", "run", "--rank", "0"]])
