"""Sets of so many shards that manifest.json has them listed in a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megastar.data.order import OrderSpec, sample_ids
from megastar.data.shards import manifest as manifests
from megastar.data.shards.manifest import Manifest, load_manifest, write_manifest
from megastar.data.shards.reader import ShardSet
from megastar.data.shards.shard_table import (
    TABLE,
    TABLE_ABOVE,
    ShardTable,
    describe_table,
    digest_of,
    largest,
    pack_table,
)
from megastar.data.shards.verify import verify
from megastar.data.storage.shard_info import ShardInfo
from megastar.data.storage.store import FolderStore
from megastar.errors import UserError
from tests.unit.data.shards.test_shards import write_set

SHARDS = [ShardInfo(f"sch\u00e4rd-{i}.tar", i % 3, 5000 + 7 * i % 11, f"{i:064x}") for i in range(9)]


def as_table(folder: Path, monkeypatch) -> Manifest:
    """Write the manifest of ``folder`` again, with a table; returns the former one."""
    former = load_manifest(folder)
    monkeypatch.setattr(manifests, "TABLE_ABOVE", 0)
    write_manifest(FolderStore(folder), former)
    return former


def test_a_table_holds_what_the_list_holds():
    table = ShardTable(pack_table(SHARDS))
    assert list(table) == SHARDS and table[2:7:2] == SHARDS[2:7:2] and table[-1] == SHARDS[-1]
    assert table.samples.tolist() == [s.samples for s in SHARDS]
    assert digest_of(table) == digest_of(SHARDS)
    assert largest(table, 4) == largest(SHARDS, 4) == sorted(SHARDS, key=lambda s: -s.bytes)[:4]


def test_a_set_with_a_table_reads_as_one_with_a_list(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "s", (5, 0, 4, 3))
    views = np.zeros((12, 1), np.int64)
    before = ShardSet(folder).gather(np.arange(12), views)
    former = as_table(folder, monkeypatch)
    found = load_manifest(folder)
    assert isinstance(found.shards, ShardTable) and list(found.shards) == former.shards
    assert replace(found, shards=former.shards, format=1) == former
    after = ShardSet(folder).gather(np.arange(12), views)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert verify(folder) == []
    for window in (2, 16):
        rows = [sample_ids(OrderSpec(3, m.shard_sizes, window), 7, 20) for m in (former, found)]
        assert all(np.array_equal(a, b) for a, b in zip(*rows, strict=True))


def test_few_shards_are_listed_in_the_manifest_as_before(tmp_path):
    folder = write_set(tmp_path / "s")
    text = (folder / "manifest.json").read_bytes()
    write_manifest(FolderStore(folder), load_manifest(folder))
    assert (folder / "manifest.json").read_bytes() == text and not (folder / TABLE).exists() and TABLE_ABOVE == 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1] + b"x", "has SHA-256 .*, the manifest records .*: it is damaged or was changed"),
        (lambda raw: raw[:-40], "has SHA-256"),
        (lambda raw: None, "is missing though the manifest lists it"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, monkeypatch, change, message):
    folder = write_set(tmp_path / "s")
    as_table(folder, monkeypatch)
    raw = change((folder / TABLE).read_bytes())
    (folder / TABLE).unlink() if raw is None else (folder / TABLE).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"x" * 100, "not a table of shards"),
        (b"MSTARTAB" + bytes(3), "damaged"),
        (pack_table(SHARDS) + b"x", "not those of 9 rows"),
        (pack_table([replace(SHARDS[0], samples=-1), replace(SHARDS[1], samples=10)]), "declares -1 samples"),
        (pack_table([replace(SHARDS[0], samples=9, bytes=10)]), "declares 9 samples of 96 bytes in the 10 bytes"),
        (pack_table([replace(SHARDS[0], samples=9, name="../a.tar")]), "'../a.tar': it must be the plain name"),
    ],
)
def test_a_table_of_another_writer_is_checked(tmp_path, monkeypatch, raw, message):
    folder = write_set(tmp_path / "s")
    as_table(folder, monkeypatch)
    (folder / TABLE).write_bytes(raw)
    data = json.loads((folder / "manifest.json").read_text()) | {"table": describe_table(raw)}
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        list(load_manifest(folder).shards)


@pytest.mark.parametrize("entry", [None, {}, {"name": "../x", "bytes": 99, "sha256": "0" * 64}, {"name": TABLE}])
def test_a_bad_entry_of_a_table(tmp_path, monkeypatch, entry):
    folder = write_set(tmp_path / "s")
    as_table(folder, monkeypatch)
    data = json.loads((folder / "manifest.json").read_text()) | {"table": entry}
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="is not a manifest of token shards"):
        load_manifest(folder)
