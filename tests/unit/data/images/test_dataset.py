"""Pictures: layouts, classes, crops, and everything that can be wrong with a file."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megastar.data.images.classes import Choice
from megastar.data.images.dataset import ImageSet, center_crop, random_crop, ten_crop
from megastar.data.images.decoding import decode
from megastar.data.images.image_files import ImageError
from megastar.errors import UserError

EMBEDDED = Path(__file__).parents[4] / "assets" / "emoji64" / "emoji64.tar"


def png(value: int = 0, size=(20, 16), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    colour = value if mode in ("L", "I;16") else (value,) * len(mode)
    Image.new(mode, size, colour).save(buffer, "png")
    return buffer.getvalue()


def gigantic(width: int, height: int) -> bytes:
    """A PNG whose header declares an image without data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def make_folder(root, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make_tar(path, files: dict[str, bytes], mode: str = "w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


LAYOUT = {
    "train/dog/2.png": png(20),
    "train/cat/1.PNG": png(10),
    "train/cat/0.a.png": png(11),
    "train/cat/0.b.png": png(12),
    "val/dog/9.png": png(30),
    "test/7.png": png(40),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_class_folders(tmp_path, kind):
    source = make_folder(tmp_path / "f", LAYOUT) if kind == "folder" else make_tar(tmp_path / "p.tar", LAYOUT)
    train = ImageSet(source, "train")
    assert train.class_names == ["cat", "dog"]
    assert [(p.key, p.label) for p in train] == [
        ("train/cat/0.a", 0),
        ("train/cat/0.b", 0),
        ("train/cat/1", 0),
        ("train/dog/2", 1),
    ]
    assert [np.asarray(train.read(i))[0, 0, 0] for i in range(4)] == [11, 12, 10, 20]
    val = ImageSet(source, "val")
    assert val.class_names == ["cat", "dog"] and val[0].label == 1  # numbered as in train
    with pytest.raises(UserError, match=r"no image is in a class folder below test, .* or give --class-level 0"):
        ImageSet(source, "test")
    test = ImageSet(source, "test", choice=Choice(level=0))  # one class, named by the folder
    assert [test.class_names[p.label] for p in test] == ["test"]


def test_webdataset_tars(tmp_path):
    make_tar(tmp_path / "b.tar", {"x.1.png": png(1), "x.cls": b"7\n", "y.jpg": png(2), "y.cls": b"0"})
    make_tar(tmp_path / "a.tar", {"z.cls": b"2", "z.webp": png(3)})
    images = ImageSet(tmp_path)
    assert [(p.key, p.label, p.file.name) for p in images] == [
        ("x.1", 7, "b.tar"),
        ("y", 0, "b.tar"),
        ("z", 2, "a.tar"),
    ]
    assert images.class_names == [str(i) for i in range(8)]
    assert [np.asarray(images.read(i))[0, 0, 0] for i in range(3)] == [1, 2, 3]


def test_the_embedded_pictures():
    sets = {s: ImageSet(EMBEDDED, s) for s in ("train", "val", "test")}
    assert sum(map(len, sets.values())) == 8939
    assert all(s.class_names == sets["train"].class_names and len(s.class_names) == 9 for s in sets.values())
    concepts = {n: {p.key.split("/")[-1].split("__")[0] for p in s} for n, s in sets.items()}
    assert not concepts["train"] & (concepts["val"] | concepts["test"]) and not concepts["val"] & concepts["test"]
    assert {p.key.split("__")[1] for p in sets["test"]} == {
        "noto", "noto-v1", "twemoji", "emojione", "fluent-flat", "fluent3d",
    }  # fmt: skip
    assert sets["test"].read(0).size == (64, 64)


# Wrong sources -------------------------------------------------------------------------------------------------
def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(UserError, match="image source .*none does not exist: give a folder of images"):
        ImageSet(tmp_path / "none")
    with pytest.raises(UserError, match="no images in .*: expected .png, .jpg"):
        ImageSet(tmp_path)
    make_folder(tmp_path, {"notes.md": b"", "train/cat/0.png": png()})
    with pytest.raises(UserError, match="neither a folder nor a .tar file"):
        ImageSet(tmp_path / "notes.md")
    with pytest.raises(UserError, match=r"no images in .* \(subset 'trian'\)"):
        ImageSet(tmp_path, "trian")


def test_mixed_layouts(tmp_path):
    make_folder(tmp_path / "a", {"cat/0.png": png(), "1.png": png()})
    with pytest.raises(UserError, match="image '1' is not in a class folder"):
        ImageSet(tmp_path / "a")
    make_folder(tmp_path / "b", {"train/cat/0.png": png(), "train/1.png": png()})
    with pytest.raises(UserError, match="image 'train/1' is not in a class folder"):
        ImageSet(tmp_path / "b", "train")
    make_folder(tmp_path / "c", {"0.png": png(), "0.cls": b"1", "1.png": png()})
    with pytest.raises(UserError, match="1 of 2 images have no .cls, the first is '1': label all or none"):
        ImageSet(tmp_path / "c")


@pytest.mark.parametrize("label", [b"cat", b"-1", b"1000000", b""])
def test_class_outside_the_range(tmp_path, label):
    make_tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": label})
    with pytest.raises(UserError, match="a.tar:0.cls holds .* write an integer class from 0 to 999999"):
        ImageSet(tmp_path)


def test_broken_tars(tmp_path):
    whole = make_tar(tmp_path / "a.tar", {f"cat/{i}.png": png(i) for i in range(4)}).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        offsets = [m.offset for m in tar]
    for broken in (
        whole[: offsets[3]],  # cut at a member boundary: tarfile sees nothing
        whole[: offsets[3] + 100],  # inside a header
        whole[: offsets[3] + 600],  # inside an image
        whole[: offsets[2]] + b"\xff" * 512 + whole[offsets[2] + 512 :],  # a header overwritten
    ):
        (tmp_path / "a.tar").write_bytes(broken)
        with pytest.raises(
            UserError, match=r"a.tar is (broken or truncated at byte \d+, after \d images|not a readable tar)"
        ):
            ImageSet(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="a.tar is not a readable tar"):
        ImageSet(tmp_path / "a.tar")
    make_tar(tmp_path / "b.tar.gz", {"cat/0.png": png()}, "w:gz")
    with pytest.raises(UserError, match="is compressed and cannot be read by position: gunzip it first"):
        ImageSet(tmp_path / "b.tar.gz")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks: bytes) -> bytes:
    plain = png()
    return plain[:33] + chunks + plain[33:]  # behind the header


def tiled_tiff(width: int, height: int) -> bytes:
    """An image of 64 x 64 in one deflated tile of this size."""
    data = zlib.compress(bytes(1000))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 134, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


OTHER_FORMATS = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) run\nshowpage\n",
    struct.pack("<IHHhhhhH", 0x9AC6CDD7, 0, 0, 0, 0, 640, 480, 96) + bytes(20) + b"\x01\0\t\0\0\3",  # WMF
    struct.pack("<IHHHHHHI", 128, 0xAF11, 1, 8, 8, 8, 3, 1) + bytes(200),  # FLI
    b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    b"#define x_width 8\n#define x_height 8\nstatic char x_bits[] = {0};",  # XBM
]
_LARGE = zlib.compress(bytes(64 << 20), 9)
TEXT_BOMBS = [
    png_with(chunk(b"iCCP", b"x\0\0" + _LARGE)),
    png_with(chunk(b"zTXt", b"x\0\0" + _LARGE)),
    png_with(chunk(b"iTXt", b"x\0\1\0\0\0" + _LARGE)),
    png_with(b"".join(chunk(b"zTXt", b"%d\0\0" % k + zlib.compress(bytes(1 << 20))) for k in range(70))),
]


# Bad images ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x: unreadable"),
        (b"not a picture", "x: unreadable"),
        (png()[:45], "x: unreadable"),
        (gigantic(8000, 6000), "x: 8000 x 6000 exceeds 40 megapixels"),
        (gigantic(40000, 40000), "x: exceeds 40 megapixels"),  # Pillow itself refuses
        (gigantic(6000, 10), "x: 6000 x 10 has an aspect ratio over 100"),
        *((data, "x: unreadable .unknown image format, not PNG, JPEG,") for data in OTHER_FORMATS),
        *((data, "x: unreadable .*(Decompressed data too large|Too much memory used)") for data in TEXT_BOMBS),
        (tiled_tiff(20000, 40000), "x: tiles of 20000 x 40000 exceed 40 megapixels"),
    ],
)
def test_unusable_images(data, message, monkeypatch):
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size) or load(self))
    monkeypatch.setattr("subprocess.Popen", None)  # Ghostscript
    with pytest.raises(ImageError, match=message):
        decode(data, "x")
    assert (8000, 6000) not in decoded and (6000, 10) not in decoded


def test_a_picture_that_vanished(tmp_path):
    images = ImageSet(make_folder(tmp_path, {"cat/0.png": png()}))
    (tmp_path / "cat/0.png").unlink()
    with pytest.raises(ImageError, match="cat/0: .*No such file"):
        images.read(0)
    (tmp_path / "cat").rmdir()  # as when a disk goes away: all images would be skipped
    with pytest.raises(UserError, match="cat no longer exists: run the same command again once it does"):
        images.read(0)


def test_a_gigantic_file(tmp_path):
    folder = make_folder(tmp_path / "tree", {"cat/0.png": png()})
    os.truncate(folder / "cat/0.png", 1 << 34)  # a hole
    with pytest.raises(ImageError, match="cat/0: its 17179869184 bytes exceed 512 MiB"):
        ImageSet(folder).read(0)
    with (tmp_path / "a.tar").open("wb") as f:
        member = tarfile.TarInfo("cat/0.png")
        member.size = 1 << 34
        f.write(member.tobuf(tarfile.GNU_FORMAT))
        f.truncate(512 + member.size + 1024)
    with pytest.raises(ImageError, match="cat/0: its 17179869184 bytes exceed 512 MiB"):
        ImageSet(tmp_path / "a.tar").read(0)


def test_a_tar_that_vanished(tmp_path):
    make_tar(tmp_path / "a.tar", {"cat/0.png": png()})
    images = ImageSet(tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match="a.tar no longer exists"):
        images.read(0)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def some(mode: str, size=(31, 17)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(pixels)  # RGBA
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


EXIF = Image.Exif()
EXIF[0x0112] = 6  # turn it by a quarter


@pytest.mark.parametrize(
    "data",
    [
        encoded(some("RGB"), "jpeg"),
        encoded(
            some("RGB"), "jpeg", exif=EXIF
        ),  # not turned: Image.open does not look at EXIF, nor did ImageNet's users
        encoded(some("CMYK"), "jpeg"),
        encoded(some("L"), "jpeg"),
        encoded(some("P"), "png"),
        encoded(some("P"), "gif"),  # by content, whatever the name says
        encoded(some("1"), "png"),
        encoded(some("RGB"), "tiff"),
        encoded(some("RGB"), "bmp"),
        encoded(some("RGB"), "webp", lossless=True),
    ],
    ids=["jpeg", "exif", "cmyk", "grey", "palette", "gif", "bits", "tiff", "bmp", "webp"],
)
def test_pictures_become_rgb_as_torchvisions_loader_makes_them(data):
    """torchvision's pil_loader is Image.open(f).convert("RGB")."""
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(data, "n02105855_2933.JPEG")), expected)
    assert expected.shape == (17, 31, 3)


def test_sixteen_bits_become_the_upper_eight():
    """Where Pillow's convert would clip everything above 255 to white."""
    grey = np.random.default_rng(0).integers(0, 65536, (17, 31), dtype=np.uint16)
    image = decode(encoded(Image.fromarray(grey), "png"), "x")
    np.testing.assert_array_equal(
        np.asarray(image), np.asarray(Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB"))
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    """Where convert("RGB") would show the colours below, which nobody has drawn."""
    image = some("RGBA").convert(mode)
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    data = encoded(image, "png")
    np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(white.convert("RGB")))
    assert np.asarray(decode(png(0, mode="RGBA"), "x")).min() == 255


def test_a_palette_with_a_transparent_colour():
    image = some("RGB").quantize(8)
    image.info["transparency"] = image.getpixel((3, 3))
    assert decode(encoded(image, "png", transparency=image.getpixel((3, 3))), "x").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "bmp"])
def test_truncated_files_are_refused(kind):
    data = encoded(some("RGB", (64, 64)), kind)
    with pytest.raises(ImageError, match="x: unreadable"):
        decode(data[: len(data) * 2 // 3], "x")


# Crops ---------------------------------------------------------------------------------------------------------
def tenfold(image: Image.Image, size: int, scale: float) -> list[Image.Image]:
    """What LlamaGen's extraction does, in PIL: its center_crop_arr, then torchvision's TenCrop as its source has it."""
    large = int(size * scale)
    while min(image.size) >= 2 * large:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.BOX)
    factor = large / min(image.size)
    image = image.resize(tuple(round(x * factor) for x in image.size), resample=Image.BICUBIC)
    y, x = (image.size[1] - large) // 2, (image.size[0] - large) // 2
    image = image.crop((x, y, x + large, y + large))

    def crop(img: Image.Image, top: int, left: int) -> Image.Image:
        return img.crop((left, top, left + size, top + size))

    def five(img: Image.Image) -> list[Image.Image]:
        w, h = img.size
        middle = int(round((h - size) / 2.0)), int(round((w - size) / 2.0))
        return [crop(img, 0, 0), crop(img, 0, w - size), crop(img, h - size, 0), crop(img, h - size, w - size),
                crop(img, *middle)]  # fmt: skip

    return five(image) + five(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


@pytest.mark.parametrize("scale", [1.0, 1.05, 1.1])
@pytest.mark.parametrize("shape", [(500, 375), (256, 300), (120, 90), (1200, 1601)])
def test_ten_crop_is_llamagens(shape, scale):
    image = some("RGB", shape)
    expected = np.stack([np.asarray(x) for x in tenfold(image, 256, scale)])
    np.testing.assert_array_equal(ten_crop(image, 256, scale), expected)


def test_ten_crop_against_slices():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8))
    crops = ten_crop(image, 64, 1.1)  # int(64 * 1.1) = 70: no resizing
    x = np.asarray(image)
    expected = [x[:64, :64], x[:64, 6:], x[6:, :64], x[6:, 6:], x[3:67, 3:67]]
    mirrored = x[:, ::-1]
    expected += [mirrored[:64, :64], mirrored[:64, 6:], mirrored[6:, :64], mirrored[6:, 6:], mirrored[3:67, 3:67]]
    np.testing.assert_array_equal(crops, np.stack(expected))


@pytest.mark.parametrize("size", [(64, 64), (200, 64), (64, 199), (300, 301), (7, 5), (640, 9)])
def test_center_crop_gives_the_middle_square(size):
    assert center_crop(Image.new("RGB", size), 48).size == (48, 48)
    image = Image.new("RGB", (3 * 48, 48), (255, 0, 0))
    image.paste((0, 0, 255), (48, 0, 96, 48))
    np.testing.assert_array_equal(np.asarray(center_crop(image, 48)), np.full((48, 48, 3), (0, 0, 255)))


def test_random_crop_is_a_function_of_its_generator():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    a, b, c = (random_crop(image, 32, np.random.default_rng(s)) for s in (1, 1, 2))
    assert a.shape == (32, 32, 3) and (a == b).all() and (a != c).any()
