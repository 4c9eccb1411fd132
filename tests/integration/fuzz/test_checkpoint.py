"""Hostile and damaged checkpoints through the commands that read them."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import DEEP, Tally, byte_variants, json_variants, odd_files
from tests.integration.fuzz.conftest import Box

STATE = "state-00000.safetensors"
COMMANDS = {
    "inspect": ["convert", "--inspect", "run"],
    "verify": ["convert", "--inspect", "--verify", "run"],
    "safetensors": ["convert", "run", "--to", "safetensors", "--out", "o.safetensors"],
    "universal": ["convert", "run", "--to", "universal", "--out", "u"],
    "reshard": ["convert", "run", "--to", "checkpoint", "--data", "1", "--out", "c"],
    "sample": ["sample", "run", "--count", "1", "--out", "s.png", "--device", "cpu"],
    "status": ["status", "run"],
    "report": ["report", "run", "--out", "r.html", "--no-samples", "--no-attention"],
}


def manifest(box: Box) -> Any:
    return json.loads((box.checkpoint / "megastar.json").read_text())


def rehash(folder: Path) -> None:
    """Let the manifest record what the files hold now."""
    path = folder / "megastar.json"
    content = json.loads(path.read_text())
    for name, entry in content["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(content))


def split_header(data: bytes) -> tuple[Any, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def test_manifest(box: Box) -> None:
    tally, rng = Tally("megastar.json"), random.Random("manifest")
    whole = manifest(box)
    names = list(COMMANDS)
    for i, (label, data) in enumerate(json_variants(whole, rng, 60)):
        box.variant(box.checkpoint / "megastar.json", data)
        box.run(tally, label, *COMMANDS[names[i % len(names)]])
    text = json.dumps(whole).encode()
    for i, (label, data) in enumerate(byte_variants(text, rng, 30)):
        box.variant(box.checkpoint / "megastar.json", data)
        box.run(tally, label, *COMMANDS[names[i % len(names)]])
    tally.check()


def test_manifest_by_hand(box: Box) -> None:
    """Values that a random variant hits rarely."""
    tally = Tally("megastar.json by hand")
    whole = manifest(box)
    first = next(iter(whole["parameters"]))

    def entry(name: str, size: int) -> dict[str, Any]:
        return {"files": whole["files"] | {name: {"bytes": size, "sha256": "0" * 64, "whose": "[/]"}}}

    def model(**fields: Any) -> dict[str, Any]:
        return {"config": whole["config"] | {"model": whole["config"]["model"] | fields}}

    cases: dict[str, dict[str, Any]] = {
        "list of files": {"files": ["x"]},
        "no tensor ranks": {"mesh": whole["mesh"] | {"tensor": 0}},
        "many tensor ranks": {"mesh": whole["mesh"] | {"tensor": 10**9}},
        "text as ranks": {"mesh": whole["mesh"] | {"tensor": "2"}},
        "true as ranks": {"mesh": whole["mesh"] | {"tensor": True}},
        "many data ranks": {"mesh": whole["mesh"] | {"data": 10**12}},
        "file outside": entry("../../../victim", 10),
        "absolute file": entry("/etc/passwd", 10),
        "device": entry("state-9/../../../../../../../dev/zero", 0),
        "control characters": entry("state-\x1b[31m\n", 0),
        "huge file": entry("state-00009.safetensors", 10**30),
        "huge step": {"step": 10**30},
        "step with markup": {"step": "[/b]"},
        "step outside": {"step": "1/../../../escape"},
        "huge shape": {"parameters": whole["parameters"] | {first: [10**9, 10**9]}},
        "negative shape": {"parameters": whole["parameters"] | {first: [-5, 7]}},
        "text as shape": {"parameters": whole["parameters"] | {first: "x"}},
        "parameter outside": {"parameters": whole["parameters"] | {"../../../../escape": [4]}},
        "another parameter": {"parameters": whole["parameters"] | {"transformer.other": [2, 2]}},
        "no parameters": {"parameters": {}},
        "no files": {"files": {}},
        "many classes": model(num_classes=10**12),
        "many blocks": model(n_layer=10**7),
        "wide": model(dim=10**6, n_head=1000, n_layer=10**6),
        "prime": model(dim=2**61 - 1, n_head=2**61 - 1, vocab_size=2**61 - 1),
        "many tokens": model(image_tokens=10**10),
        "markup": model(name="[/red]\x1b[31m") | {"command": "megastar [/x] \x1b]0;title\x07"},
        "format of a newer version": {"format": 10**20},
        "unknown fields": {"added": {"later": [1]}},
        "classes of another kind": {"classes": [1, None]},
        "many class names": {"classes": ["x"] * 200_000},
        "rollbacks": {"guard": {"rollbacks": "x"}},
        "guard": {"guard": [1]},
        "converted": {"converted": {"from": 1}},
        "validation loss": {"val_loss_ar": "x"},
        "steps": {"steps": -1},
        "dtype": {"dtype": 5},
    }
    others = list(COMMANDS)[1:]
    for i, (label, fields) in enumerate(cases.items()):
        for name in ("inspect", others[i % len(others)], others[(i + 3) % len(others)]):
            box.variant(box.checkpoint / "megastar.json", json.dumps(whole | fields).encode())
            box.run(tally, label, *COMMANDS[name])
    tally.check()


def test_state_headers(box: Box) -> None:
    tally, rng = Tally("state headers"), random.Random("state")
    path = box.checkpoint / STATE
    header, data = split_header(path.read_bytes())
    names = [n for n in header if n != "__metadata__"]
    pieces = json.loads(header["__metadata__"]["pieces"])

    def with_entry(**fields: Any) -> bytes:
        return json.dumps(header | {names[0]: header[names[0]] | fields}).encode()

    def with_pieces(content: Any) -> bytes:
        text = content if isinstance(content, str) else json.dumps(content)
        return json.dumps(header | {"__metadata__": {"pieces": text}}).encode()

    start, stop = header[names[0]]["data_offsets"]
    first = next(iter(pieces))
    rank, low, high = pieces[first]
    variants = list(json_variants(header, rng, 16)) + [
        (f"pieces {n}", with_pieces(d.decode(errors="replace"))) for n, d in json_variants(pieces, rng, 12)
    ]
    variants += [
        (
            "overlap",
            json.dumps(
                header | {names[1]: header[names[1]] | {"data_offsets": header[names[0]]["data_offsets"]}}
            ).encode(),
        ),
        ("negative offsets", with_entry(data_offsets=[start - 10**6, stop - 10**6])),
        ("huge offsets", with_entry(data_offsets=[10**18, 10**18 + stop - start])),
        ("deep", DEEP.encode()),
        ("list", b"[1, 2]"),
        ("no metadata", json.dumps({n: header[n] for n in names}).encode()),
        ("negative piece", with_pieces(pieces | {first: [rank, low - 100, high - 100]})),
        ("float piece", with_pieces(pieces | {first: [rank, float(low), float(high)]})),
        ("huge piece", with_pieces(pieces | {first: [rank, 10**30, 10**30 + high - low]})),
        ("piece of another parameter", with_pieces(pieces | {"../../../../escape": [0, 0, 4]})),
        ("spaces", b" " * 50_000_000),
    ]
    words = [COMMANDS[n] for n in ("inspect", "safetensors", "sample")]
    for i, (label, text) in enumerate(variants):
        box.variant(path, join_header(text, data))
        rehash(box.checkpoint)
        box.run(tally, label, *words[i % 3])
    for length in (0, 1, 2**31, 2**62, 2**63, 2**64 - 1):
        box.variant(path, struct.pack("<Q", length) + path.read_bytes()[8:])
        rehash(box.checkpoint)
        box.run(tally, f"header of {length}", *words[0])
    for i, (label, text) in enumerate(byte_variants(path.read_bytes(), rng, 18)):
        box.variant(path, text)
        if i % 2:
            rehash(box.checkpoint)
        box.run(tally, label, *words[i % 3])
    tally.check()


def test_files_of_other_kinds(box: Box) -> None:
    """Pipes, folders, devices and links where files are expected."""
    tally = Tally("files of other kinds")
    names = ("megastar.json", STATE, "random-00000.pt", "../latest", "../../config.yaml")
    for name in names:
        for kind, make in odd_files().items():
            for command in ("inspect", "status", "report") if kind in ("pipe", "zeros", "sparse") else ("status",):
                box.instead(box.checkpoint / name, make)
                box.run(tally, f"{name} is a {kind}", *COMMANDS["verify" if command == "inspect" else command])
    tally.check()


def test_latest(box: Box) -> None:
    tally = Tally("latest")
    latest = box.checkpoint.parent / "latest"
    contents: dict[str, bytes] = {
        "outside": b"../../else/step-00000003\n", "binary": b"\xff\x00\xfe" * 10, "NUL": b"step\0x", "long": b"a" * 5000,
        "missing": b"step-00000999\n", "empty": b"", "absolute": b"/etc\n", "dot": b".\n", "large": b"x" * 10**7,
    }  # fmt: skip
    for label, data in contents.items():
        for command in ("inspect", "status"):
            box.variant(latest, data)
            box.run(tally, label, *COMMANDS[command])
    tally.check()


def damage() -> dict[str, Callable[[Path], None]]:
    """Ways in which the newest checkpoint may be cut."""

    def cut(name: str, size: int) -> Callable[[Path], None]:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return {
        "manifest cut": cut("megastar.json", 300),
        "manifest empty": cut("megastar.json", 0),
        "state cut": cut(STATE, 1000),
        "state missing": lambda folder: (folder / STATE).unlink(),
    }


def test_the_older_checkpoint_is_offered(box: Box) -> None:
    tally = Tally("cut newest checkpoint")
    for label, make in damage().items():
        for command in ("safetensors", "universal", "sample"):
            box.fresh()
            make(box.checkpoint)
            outcome = box.run(tally, label, *COMMANDS[command])
            assert outcome.kind == "sentence" and "step-00000002" in outcome.output, outcome
        box.fresh()
        make(box.checkpoint)
        assert "step-00000002" in box.run(tally, label, *COMMANDS["status"]).output
    tally.check()
