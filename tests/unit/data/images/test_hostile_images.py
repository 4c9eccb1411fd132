"""Damaged images and image bombs through pretokenize's reader: skipped by name or read, never a traceback or a hang."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar.config.schema import TokenizerConfig
from tests import fuzz

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp", "PPM": "ppm"}
SMALL = TokenizerConfig(
    image_size=16, channels=8, channel_multipliers=[1, 2], res_blocks=1, z_channels=8, codebook_size=64,
    codebook_embed_dim=4, norm_groups=4,
)  # fmt: skip


def encoded(kind: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def hostile(count: int) -> dict[str, bytes]:
    """Name -> content: ``count`` damaged images of each format, and bombs."""
    rng = random.Random("images")
    found = {}
    for kind, suffix in FORMATS.items():
        for i, (_, data) in enumerate(fuzz.byte_variants(encoded(kind, len(found)), rng, count)):
            found[f"{kind}{i}.{suffix}"] = data
    found["wide.png"] = png(2**31 - 1, 2**31 - 1, b"")
    found["bomb.png"] = png(30_000, 30_000, zlib.compress(b"\0" * 50_000_000, 9))
    found["tall.png"] = png(1, 1_000_000, zlib.compress(b"\0" * 4_000_000, 9))
    found["size.ppm"] = b"P6 99999999 99999999 255 "
    found["text.jpg"] = b"not an image"
    found["none.png"] = b""
    return found


@pytest.mark.parametrize("as_tar", [False, True])
def test_damaged_images_are_skipped_by_name(tmp_path, as_tar):
    import torch

    from megastar.tokenizer.io import save_tokenizer
    from megastar.tokenizer.vq import VQModel

    here = tmp_path / "here"
    folder = here / "images" / "a"
    folder.mkdir(parents=True)
    for name, data in hostile(15).items():
        (folder / name).write_bytes(data)
    for i in range(8):
        (folder / f"good{i}.png").write_bytes(encoded("PNG", i))
    torch.manual_seed(0)
    save_tokenizer(VQModel(SMALL), here / "tokenizer.safetensors", {})
    source = "images"
    if as_tar:
        source = "images.tar"
        with tarfile.open(here / source, "w") as tar:
            tar.add(here / "images" / "a", "a")
    tally = fuzz.Tally("images")
    words = ["pretokenize", source, "--tokenizer", "tokenizer.safetensors", "--out", "codes", "--workers", "2"]
    outcome = fuzz.run(words, Path(here), timeout=120.0)
    tally.add(source, outcome)
    tally.check()
    assert outcome.status == 0, outcome.output
    skipped = (here / "codes" / "skipped.jsonl").read_text()
    for name in ("wide", "bomb", "size", "text", "none"):
        assert f'"a/{name}"' in skipped
    assert '"a/good' not in skipped
