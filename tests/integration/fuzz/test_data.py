"""Hostile and damaged token shards and .npz archives, through `megastar data` and `megastar evaluate`."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import DEEP, Tally, byte_variants, json_variants, odd_files
from tests.integration.fuzz.conftest import Box

DATA = [
    ["data", "inspect", "codes"],
    ["data", "verify", "codes"],
    ["data", "stats", "codes"],
    ["data", "inspect", "codes", "--json"],
]
NETWORK = "tests.integration.fuzz.network:network"
EVALUATE = ["evaluate", "made.npz", "--real", "real.npz", "--features", NETWORK, "--allow-few", "--device", "cpu"]


def test_manifest(box: Box) -> None:
    tally, rng = Tally("manifest.json"), random.Random("shards")
    path = box.path / "codes" / "manifest.json"
    whole = json.loads(path.read_text())
    skipped = [
        {"skipped": [{"picture": 5}]},
        {"skipped": [{}]},
        {"skipped": [5]},
        {"made_by": {"a": [1], "\x1b": None}},
    ]
    variants = [*json_variants(whole, rng, 60), *byte_variants(path.read_bytes(), rng, 24)]
    variants += [(str(s), json.dumps(whole | s).encode()) for s in skipped] + [("deep", DEEP.encode()), ("empty", b"")]
    for i, (label, data) in enumerate(variants):
        box.variant(path, data)
        box.run(tally, label, *DATA[i % 4])
    other_kinds(box, tally, path, DATA[0])
    tally.check()


def other_kinds(box: Box, tally: Tally, path: Path, words: list[str]) -> None:
    for kind, make in odd_files().items():
        box.instead(path, make)
        box.run(tally, f"{path.name} is a {kind}", *words)


def test_index(box: Box) -> None:
    tally, rng = Tally("index"), random.Random("index")
    path = box.path / "codes" / "shard-00000.idx"
    box.run(tally, "whole", *DATA[0])
    whole = path.read_bytes()
    for i, (label, data) in enumerate(byte_variants(whole, rng, 24)):
        if i % 2 and len(data) > 32:
            data = data[:-32] + hashlib.sha256(data[:-32]).digest()
        box.variant(path, data)
        box.run(tally, label, *DATA[i % 3])
    other_kinds(box, tally, path, DATA[0])
    tally.check()


def test_features(box: Box) -> None:
    """A set with an encoder's features: its record in the manifest, its tar, its index."""
    tally, rng = Tally("features"), random.Random("features")
    folder = box.path / "encoded"
    commands = [["data", action, "encoded"] for action in ("inspect", "verify", "stats")]
    box.run(tally, "whole", *commands[1])
    whole = json.loads((folder / "manifest.json").read_text())
    hostile = [5, [], "x", {"encoder": "efflite0"}, {str(i): i for i in range(10_000)}]
    hostile += [whole["features"] | {"grid": n, "width": n} for n in (10**30, -1, 2**31, 0, 1.5, None)]
    hostile += [
        whole["features"] | {"width": 65_536},
        whole["features"] | {"encoder": "\x1b[31m[/red]", "layer": "x" * 10**6},
    ]
    variants = [(str(value)[:40], json.dumps(whole | {"features": value}).encode()) for value in hostile]
    for label, data in json_variants(whole["features"], rng, 24):
        text = json.dumps(whole | {"features": "@"}).encode()
        variants.append((label, text.replace(b'"@"', data)))
    for i, (label, data) in enumerate(variants):
        box.variant(folder / "manifest.json", data)
        box.run(tally, label, *commands[i % 3])
    shard = folder / "shard-00000.tar"
    for i, (label, data) in enumerate(byte_variants(shard.read_bytes(), rng, 24)):
        box.variant(shard, data)
        record = whole["shards"][0] | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(whole | {"shards": [record, *whole["shards"][1:]]})
        (folder / "manifest.json").write_text(text)
        box.run(tally, label, *commands[i % 3])
    box.fresh()
    index = shard.with_suffix(".idx")
    for i, (label, data) in enumerate(byte_variants(index.read_bytes(), rng, 16)):
        if i % 2 and len(data) > 32:
            data = data[:-32] + hashlib.sha256(data[:-32]).digest()
        box.variant(index, data)
        box.run(tally, label, *commands[i % 3])
    tally.check()


def npy(array: np.ndarray, change: Callable[[bytes], bytes] = lambda data: data) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return change(out.getvalue())


def tar_of(members: dict[str, bytes], **fields: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_tar(box: Box) -> None:
    tally, rng = Tally("tar"), random.Random("tar")
    path = box.path / "codes" / "shard-00000.tar"
    for i, (label, data) in enumerate(byte_variants(path.read_bytes(), rng, 30)):
        box.variant(path, data)
        box.run(tally, label, *DATA[i % 3])
    other_kinds(box, tally, path, DATA[0])
    codes = np.zeros((2, 16), np.uint16)
    good = {"k.codes.npy": npy(codes), "k.cls": b"1"}
    shape = b"(2, 16)"
    cases: dict[str, bytes] = {
        "object": tar_of(good | {"k.codes.npy": npy(np.array([{}], object))}),
        "huge shape": tar_of(good | {"k.codes.npy": npy(codes, lambda d: d.replace(shape, b"(99999999999999, 16)"))}),
        "code in the header": tar_of(good | {"k.codes.npy": npy(codes, lambda d: d.replace(shape, b"().__class__"))}),
        "deep": tar_of({"k.codes.npy": npy(codes), "k.json": b"[" * 200_000}),
        "huge class": tar_of(good | {"k.cls": b"9" * 20}), "class 1e9": tar_of(good | {"k.cls": b"999999999"}),
        "float label": tar_of({"k.codes.npy": npy(codes), "k.json": b'{"label": 1e300}'}),
        "negative codes": tar_of(good | {"k.codes.npy": npy(-np.ones((2, 16), np.int64))}),
        "outside": tar_of({"../../../k.codes.npy": npy(codes), "../../../k.cls": b"0"}),
        "link": tar_of({"k.codes.npy": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    }  # fmt: skip
    for label, data in cases.items():
        box.fresh()
        (box.path / "s").mkdir()
        (box.path / "s" / "shard-0.tar").write_bytes(data)
        box.run(tally, label, "data", "index", "s", "--codebook-size", "64")
    tally.check()


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def write_npz(
    path: Path, members: dict[str, bytes], zeros: dict[str, int] | None = None, method: int = zipfile.ZIP_DEFLATED
) -> None:
    """Members with ``zeros`` bytes of zeros after them."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
                for _ in range((zeros or {}).get(name, 0) >> 20):
                    member.write(bytes(1 << 20))


def test_npz(box: Box) -> None:
    tally, rng = Tally("npz"), random.Random("npz")
    images = np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3), np.uint8)
    made, plain = box.path / "made.npz", header(images.shape) + images.tobytes()
    floats = header((2048, 2048), "<f8")

    def arrays(*args: Any, **fields: Any) -> Callable[[], None]:
        return lambda: np.savez(made, *args, **fields)

    def members(
        found: dict[str, bytes], zeros: dict[str, int] | None = None, method: int = zipfile.ZIP_DEFLATED
    ) -> Callable[[], None]:
        return lambda: write_npz(made, found, zeros, method)

    cases: dict[str, Callable[[], None]] = {
        "whole": arrays(images, np.arange(6)), "compressed": lambda: np.savez_compressed(made, images),
        "objects": arrays(np.array([{}], object)), "object labels": arrays(images, np.array([{}], object)),
        "NCHW": arrays(images.transpose(0, 3, 1, 2)), "floats": arrays(images / 255), "grey": arrays(images[..., 0]),
        "RGBA": arrays(np.concatenate([images, images[..., :1]], -1)), "Fortran": arrays(np.asfortranarray(images)),
        "empty": arrays(images[:0]), "one": arrays(images[:1]), "another name": arrays(samples=images), "named": arrays(images=images),
        "only statistics": arrays(mu=np.zeros(2048), sigma=np.eye(4)), "text labels": arrays(images, np.array(["x"] * 6)),
        "few labels": arrays(images, np.arange(2)), "labels of two dimensions": arrays(images, np.zeros((6, 2), int)),
        "large images": members({"arr_0.npy": header((5, 16384, 16384, 3))}, {"arr_0.npy": 5 * 3 << 28}),
        "many labels": members({"arr_0.npy": plain, "arr_1.npy": header((1 << 27,), "<i8")}, {"arr_1.npy": 1 << 30}),
        "lying shape": members({"arr_0.npy": header((10**9, 64, 64, 3)) + bytes(100)}),
        "negative shape": members({"arr_0.npy": header((-6, -16, 16, 3)) + images.tobytes()}),
        "huge shape": members({"arr_0.npy": header((2**62, 2**62, 1, 3))}),
        "nested header": members({"arr_0.npy": b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000}),
        "another version": members({"arr_0.npy": b"\x93NUMPY\x07\x00" + plain[8:]}), "no array": members({"arr_0.npy": b"x"}),
        "bzip2": members({"arr_0.npy": plain}, method=zipfile.ZIP_BZIP2), "lzma": members({"arr_0.npy": plain}, method=zipfile.ZIP_LZMA),
        "many members": members({f"{i}.npy": b"" for i in range(11_000)}), "control characters": members({"\x1b[31m[/].npy": plain}),
        "outside": members({"../../../out.npy": plain}), "structured": arrays(np.zeros(3, [("a", "i4")])),
        "long text": members({"arr_0.npy": header((1,), "<U1000000")}), "statistics": members({"mu.npy": floats, "sigma.npy": floats}),
    }  # fmt: skip
    for label, make in cases.items():
        box.fresh()
        make()
        box.run(tally, label, *EVALUATE)
        box.fresh()
        make()
        made.replace(box.path / "real.npz")
        np.savez(made, images)
        box.run(tally, f"{label}, as the reference", *EVALUATE)
    np.savez(box.whole / "made.npz", images)
    for label, data in byte_variants((box.whole / "made.npz").read_bytes(), rng, 24):
        box.variant(made, data)
        box.run(tally, label, *EVALUATE)
    other_kinds(box, tally, made, EVALUATE)
    tally.check()


def test_json_beside_results(box: Box) -> None:
    """The record of samples, the cached features of a real set, and earlier results of a probe."""
    tally, rng = Tally("records and results"), random.Random("records")
    record = {"identity": {"seed": 1, "count": 6}, "about": {"weights": "w", "cfg_scale": 1.5}}
    path = box.path / "made.npz.json"
    for label, data in [
        *json_variants(record, rng, 16),
        ("deep", DEEP.encode()),
        ("list", b"[1]"),
        ("count", b'{"count": "x"}'),
    ]:
        box.variant(path, data)
        box.run(tally, label, *EVALUATE)
    other_kinds(box, tally, path, EVALUATE)
    result = {"positions": [4, 8], "accuracy": [0.5, 0.75], "block": 2}
    for label, data in [*json_variants(result, rng, 16), ("deep", DEEP.encode()), ("no positions", b"{}")]:
        box.variant(box.path / "p.json", data)
        box.run(tally, label, "probe", "p.json", "--figure", "f.png")
    box.fresh()
    box.run(tally, "whole", *EVALUATE)
    cached = next((box.path / "cache").iterdir())
    name, whole = cached.name, cached.read_bytes()
    for label, data in byte_variants(whole, rng, 16):
        box.fresh()
        (box.path / "cache").mkdir()
        (box.path / "cache" / name).write_bytes(data)
        box.run(tally, label, *EVALUATE)
    tally.check()
