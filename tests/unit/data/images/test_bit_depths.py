"""Every bit depth: scaled to eight bits as numpy does it, or skipped with a reason; never clipped to white."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megastar.data.images.decoding import decode
from megastar.data.images.image_files import ImageError
from tests.unit.data.images.test_dataset import chunk, png_with

RAMP = np.tile(np.linspace(0, 65535, 64).round().astype(np.uint16), (64, 1))  # (64, 64)
UPPER = (RAMP >> 8).astype(int)


def saved(array: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(data: bytes, bits: int, order: str, *, white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """One uncompressed strip of 64 x 64 grey samples."""
    mark = b"II" if order == "<" else b"MM"
    tags = {256: 64, 257: 64, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 0, 277: 1, 278: 64, 279: len(data)}
    tags[339] = sample_format
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    short = {258, 259, 262, 277, 339}
    entries = b""
    for tag, value in sorted(tags.items()):
        packed = struct.pack(order + "HH", value, 0) if tag in short else struct.pack(order + "I", value)
        entries += struct.pack(order + "HHI", tag, 3 if tag in short else 4, 1) + packed
    return mark + struct.pack(order + "HIH", 42, 8, len(tags)) + entries + bytes(4) + data


def twelve_bits(values: np.ndarray) -> bytes:
    """Pairs of 12-bit samples in three bytes, high bits first."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    words = (pairs[:, 0] << 12) | pairs[:, 1]
    return np.stack([words >> 16, words >> 8, words], 1).astype(np.uint8).tobytes()


def pgm(maxval: int, text: bool = False) -> bytes:
    values = np.round(RAMP.astype(float) / 65535 * maxval).astype(int)
    if text:
        return b"P2\n64 64\n%d\n" % maxval + " ".join(map(str, values.ravel())).encode()
    return b"P5\n64 64\n%d\n" % maxval + values.astype(">u2" if maxval > 255 else np.uint8).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        saved(RAMP, "png"),
        saved(RAMP, "tiff"),
        saved(RAMP.astype(">u2"), "tiff"),
        tiff(RAMP.astype("<u2").tobytes(), 16, "<"),
        tiff(RAMP.astype(">u2").tobytes(), 16, ">"),
        tiff((65535 - RAMP).astype("<u2").tobytes(), 16, "<", white_is_zero=True),
        pgm(65535),
        pgm(65535, text=True),
    ],
    ids=["PNG", "TIFF", "TIFF MM", "TIFF by hand", "TIFF MM by hand", "TIFF white is zero", "PGM", "PGM as text"],
)
def test_sixteen_bits(data):
    found = np.asarray(decode(data, "x")).astype(int)
    assert found.shape == (64, 64, 3) and (found == UPPER[..., None]).all()


@pytest.mark.parametrize("maxval", [1, 3, 15, 100, 254, 256, 1000, 1023, 4095, 16383, 65534])
@pytest.mark.parametrize("text", [False, True])
def test_the_maximum_of_a_pgm(maxval, text):
    """White is maxval, whatever it is."""
    values = np.round(RAMP.astype(float) / 65535 * maxval)
    found = np.asarray(decode(pgm(maxval, text), "x"))[..., 0].astype(int)
    assert np.abs(found - values / maxval * 255).max() <= 1 and found.max() == 255 and found.min() == 0


def test_sixteen_bits_of_a_ppm():
    colours = np.stack([RAMP, RAMP[:, ::-1], RAMP.T], -1)
    data = b"P6\n64 64\n65535\n" + colours.astype(">u2").tobytes()
    assert np.abs(np.asarray(decode(data, "x")).astype(int) - colours / 65535 * 255).max() <= 1


def test_twelve_bits_of_a_tiff():
    found = np.asarray(decode(tiff(twelve_bits(RAMP >> 4), 12, "<"), "x"))[..., 0].astype(int)
    assert (found == UPPER).all()


def test_a_transparent_grey_of_sixteen_bits():
    """tRNS names one grey of 16 bits: 0x1234 is transparent, 0x1200 with the same upper byte is not."""
    grey = np.full((4, 4), 0x1200, np.uint16)
    grey[0, 0] = 0x1234
    plain = saved(grey, "png")
    data = plain[:33] + chunk(b"tRNS", struct.pack(">H", 0x1234)) + plain[33:]
    found = np.asarray(decode(data, "x"))[..., 0]
    assert found[0, 0] == 255 and (found.ravel()[1:] == 0x12).all()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved(RAMP.astype(np.int32), "tiff"), "32-bit integer"),
        (tiff(RAMP.astype("<u4").tobytes(), 32, "<"), "32-bit integer"),
        (tiff((RAMP.astype(int) - 32768).astype("<i2").tobytes(), 16, "<", sample_format=2), "32-bit integer"),
        (tiff((RAMP.astype(int) - 32768).astype(">i2").tobytes(), 16, ">", sample_format=2), "32-bit integer"),
        (tiff((RAMP >> 8).astype(np.uint8).tobytes(), 8, "<", sample_format=2), "signed integer"),
        (saved((RAMP / 65535).astype(np.float32), "tiff"), "floating-point"),
        (saved((RAMP >> 8).astype(np.float32), "tiff"), "floating-point"),
        (tiff((RAMP / 65535).astype(">f4").tobytes(), 32, ">", sample_format=3), "floating-point"),
        (b"Pf\n64 64\n-1.0\n" + (RAMP / 65535).astype("<f4").tobytes(), "floating-point"),
    ],
    ids=["int32", "uint32", "int16", "int16 MM", "int8", "float 0..1", "float 0..255", "float MM", "PFM"],
)
def test_samples_without_a_defined_white_are_skipped(data, kind):
    with pytest.raises(
        ImageError, match=f"x: has {kind} samples, whose black and white are not defined: convert it to 8"
    ):
        decode(data, "x")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_of_a_png(bits):
    values = (RAMP >> (16 - bits)).astype(np.uint8)
    rows = b"".join(b"\0" + np.packbits(np.unpackbits(r[:, None], axis=1)[:, 8 - bits :]).tobytes() for r in values)
    header = struct.pack(">IIBBBBB", 64, 64, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    found = np.asarray(decode(data, "x"))[..., 0]
    assert (found == np.round(values * (255 / (2**bits - 1)))).all()


def test_a_plain_png_is_unchanged():
    assert np.asarray(decode(png_with(b""), "x")).max() == 0
