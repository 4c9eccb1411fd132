"""``megastar sample``: weights -> codes -> pictures, as a grid and, if wanted, as an .npz to score."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.commands.common import Parser, natural, nearest, positive
from megastar.config.files import find_file
from megastar.config.load import config_from_dict
from megastar.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

SHIPPED_WEIGHTS = "assets/weights/demo-nano.safetensors"
SHIPPED_TOKENIZER = "assets/tokenizer/emoji64-vq.safetensors"
EXAMPLES = """
megastar sample                                                 the shipped weights, all classes -> samples.png
megastar sample runs/demo/run --out run.png                     the newest checkpoint's averaged weights
megastar sample --classes food-drink,travel-places --per-class 24 --cfg-scale 2 --seed 1
megastar sample w.safetensors --tokenizer t.safetensors --count 50000 --cfg-scale 1 --npz samples.npz
megastar sample --count 5000 --like runs/demo/codes/train --npz samples.npz
"""


def parser() -> Parser:
    p = Parser("sample", "Draw pictures from a run or a weights file.", EXAMPLES)
    p.add_argument(
        "source", nargs="?", default=None, help="run folder, checkpoint or .safetensors (default: the shipped weights)"
    )
    p.add_argument("--tokenizer", default=None, help="tokenizer .safetensors (default: the run's, or the shipped one)")
    p.add_argument("--out", type=Path, default=Path("samples.png"), help="the grid to write (default samples.png)")
    p.add_argument("--npz", type=Path, default=None, help="also write all pictures, uint8 (N, H, W, 3), as arr_0")
    p.add_argument("--classes", default=None, help="names or numbers, with commas (default: all, of many the first 16)")
    p.add_argument("--per-class", type=positive, default=12, help="pictures of each class (default 12)")
    p.add_argument("--count", type=positive, default=None, help="pictures in all, spread over the classes, for scores")
    p.add_argument("--like", default=None, help="token shards whose class frequencies --count follows")
    p.add_argument("--cfg-scale", type=float, default=3.0, help="classifier-free guidance; 1: none (default 3)")
    p.add_argument("--cfg-interval", type=int, default=-1, help="guide up to this token; -1: all (default -1)")
    p.add_argument("--temperature", type=float, default=0.9, help="1: as trained; less is tidier (default 0.9)")
    p.add_argument("--top-k", type=natural, default=0, help="keep the k likeliest codes; 0: all (default 0)")
    p.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest codes up to this mass (default 1)")
    p.add_argument(
        "--seed", type=natural, default=0, help="picture i depends on the seed, i and its class only (default 0)"
    )
    p.add_argument("--batch", type=positive, default=64, help="pictures at once (default 64)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="fp32", help="precision (default fp32)")
    return p


@dataclass
class Weights:
    """What ``sample`` and ``probe`` are given, resolved to files."""

    file: Path
    tokenizer: str | None  # the run's, None for a weights file
    shards: str | None


def find_weights(source: str | Path | None, weights: str = "ema") -> Weights:
    """A run folder or checkpoint is converted first, to RUN/weights, once a step. Raises ``UserError``."""
    path = Path(source or SHIPPED_WEIGHTS)
    if not path.is_dir():
        return Weights(find_file(path) or path, None, None)
    from megastar.data.files import sha256
    from megastar.engine.convert import convert
    from megastar.engine.folders import MANIFEST, find_checkpoint, read_manifest

    checkpoint = find_checkpoint(path)
    digest = sha256(checkpoint / MANIFEST)[:8]  # a run that was started afresh has the same names
    file = checkpoint.parent.parent / "weights" / f"{weights}-{checkpoint.name}-{digest}.safetensors"
    cfg = config_from_dict(read_manifest(checkpoint)["config"])
    if not file.is_file():
        convert(checkpoint, "safetensors", file, weights=weights, force=True)  # another process may be as far
    return Weights(file, cfg.data.tokenizer or None, cfg.data.shards or None)


def choose_labels(
    names: list[str], classes: str | None, per_class: int, count: int | None, like: list[int] | None, seed: int
) -> list[int]:
    """The class of each picture. ``like`` holds labels of real pictures, whose frequencies ``count`` then follows.

    Raises ``UserError`` for an unknown class.
    """
    import numpy as np

    chosen = [parse_class(c.strip(), names) for c in classes.split(",")] if classes else list(range(len(names)))
    if count is None:
        shown = chosen if classes else chosen[:16]
        return [c for c in shown for _ in range(per_class)]
    if like is None:
        return [chosen[i % len(chosen)] for i in range(count)]
    pool = np.array([c for c in like if c in set(chosen)])
    if not len(pool):
        raise UserError(f"--like holds no picture of the classes {classes}")
    order = np.random.default_rng([seed, 1]).permutation(len(pool))
    return pool[order[np.arange(count) % len(pool)]].tolist()


def parse_class(text: str, names: list[str]) -> int:
    if text in names:
        return names.index(text)
    if text.isdigit():
        if int(text) < len(names):
            return int(text)
        raise UserError(f"class {text} is outside 0..{len(names) - 1}, the classes of these weights")
    raise UserError(f"class {text!r} is unknown: {nearest(text, names)}")


def class_names(model_classes: int, about: dict[str, Any]) -> list[str]:
    """Names from the weights' provenance, numbers without them."""
    names = about.get("classes") or []
    return list(names) if len(names) == model_classes else [str(i) for i in range(model_classes)]


def draw_pictures(
    weights: str | Path,
    tokenizer: str | Path,
    labels: list[int],
    *,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    console: Console | None = None,
    **options: Any,
) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 of the classes ``labels``; ``options`` are those of ``sample_tokens``."""
    from megastar.device import pick_device, pick_dtype
    from megastar.model.io import load_model
    from megastar.sampling.sampler import check_tokenizer, decode_pictures, sample_seeds, sample_tokens
    from megastar.tokenizer.io import load_tokenizer

    where = pick_device(device)
    model, _ = load_model(weights, where, pick_dtype(dtype, where))
    vq = load_tokenizer(tokenizer, where)
    check_tokenizer(model.cfg, vq)
    codes = sample_tokens(model, labels, seeds=sample_seeds(seed, len(labels)), progress=console, **options)
    return decode_pictures(vq, codes)


def labels_of(shards: str | Path) -> list[int]:
    """The class of every picture of a folder of token shards."""
    import numpy as np

    from megastar.data.shard_set import ShardSet

    with_codes = ShardSet(shards)
    _, labels = with_codes.gather(np.arange(len(with_codes)), np.zeros((len(with_codes), 1), np.int64))
    return labels.tolist()


def save_npz(path: Path, pictures: np.ndarray, labels: list[int]) -> None:
    """ADM's layout (arr_0, arr_1), written whole or not at all."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as f:
        np.savez(f, arr_0=pictures, arr_1=np.asarray(labels, np.int64))
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    if a.like and a.count is None:
        raise UserError("--like tells how --count pictures spread over the classes: give --count too")
    from rich.console import Console

    from megastar.model.io import read_model_metadata
    from megastar.sampling.grid import Block, picture_grid, save_grid

    found = find_weights(a.source)
    cfg, about = read_model_metadata(found.file)
    tokenizer = a.tokenizer or found.tokenizer or SHIPPED_TOKENIZER
    tokenizer = str(find_file(tokenizer) or tokenizer)
    names = class_names(cfg.num_classes, about)
    labels = choose_labels(names, a.classes, a.per_class, a.count, labels_of(a.like) if a.like else None, a.seed)
    options = {
        "cfg_scale": a.cfg_scale,
        "temperature": a.temperature,
        "top_k": a.top_k,
        "top_p": a.top_p,
        "cfg_interval": a.cfg_interval,
        "batch": a.batch,
    }
    console = Console()
    pictures = draw_pictures(
        found.file, tokenizer, labels, seed=a.seed, device=a.device, dtype=a.dtype, console=console, **options
    )
    origin = {"weights": str(found.file), "tokenizer": tokenizer, "seed": a.seed, **options, "trained": about}
    columns = min(a.per_class, max(labels.count(c) for c in set(labels)))
    shown = set(sorted(set(labels))[:16])  # a thousand classes make no picture that anyone looks at
    some = [i for i, c in enumerate(labels) if c in shown]
    block = Block("", pictures[some], [labels[i] for i in some])
    save_grid(picture_grid([block], names, columns=columns), a.out, origin)
    if a.npz:
        save_npz(a.npz, pictures, labels)
    written = f"{a.out}" + (f" and {a.npz}" if a.npz else "")
    console.print(f"{len(pictures)} pictures of {len(set(labels))} classes: {written}", markup=False, highlight=False)
    return 0
