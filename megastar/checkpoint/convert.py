"""What `megastar convert` does: a checkpoint -> weights files, DeepSpeed's universal format, another number of files.

No DeepSpeed and no process group; memory for a few tensors, whatever the network's size. Each output is written beside
its place, read back and compared, and only then gets its name (staging.py).
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from torch import Tensor

from megastar.checkpoint.atomic_output import byte_bar, settle, staged
from megastar.checkpoint.convert_weights import write_about
from megastar.checkpoint.deepspeed_universal import to_universal
from megastar.checkpoint.llamagen_writer import to_llamagen
from megastar.checkpoint.reshard import to_checkpoint
from megastar.checkpoint.safetensors_stream import TensorWriter
from megastar.checkpoint.shard_format import StateReader
from megastar.checkpoint.source import PREFIX, Source, bytes_of, kind_of, open_source
from megastar.errors import UserError
from megastar.model.io import check_fits, metadata_of, read_model_metadata
from megastar.run_dir.checkpoint_dir import read_manifest
from megastar.utils.device import DTYPES
from megastar.utils.files import sha256

TARGETS = ("safetensors", "llamagen", "universal", "checkpoint")


def full_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Name -> fp32 tensor of the student (``student``) or of its average (``ema``), transformer only, all at once."""
    reader = StateReader(folder, read_manifest(folder))
    names = [n for n in reader.shapes if n.startswith(PREFIX)]
    return {n.removeprefix(PREFIX): reader.whole(n, kind_of(weights)) for n in names}


def convert(
    source: Path,
    to: str,
    out: Path,
    *,
    weights: str = "ema",
    dtype: str = "fp32",
    data: int = 1,
    tensor: int = 1,
    force: bool = False,
    console: Console | None = None,
) -> str:
    """Convert the checkpoint in ``source`` to one of ``TARGETS``; returns one sentence on what is now in ``out``.

    ``weights`` (ema or student) and ``dtype`` are for weights files; ``data`` x ``tensor`` ranks for a checkpoint.
    ``force`` replaces an ``out`` that exists. Raises ``UserError`` and leaves ``out`` as it was.
    """
    start = time.perf_counter()
    opened, out = open_source(source, console), Path(out)
    if to == "safetensors":
        said, how = f"{weights} weights, {dtype}", to_safetensors(opened, out, weights, dtype, force)
    elif to == "llamagen":
        said, how = f"{weights} weights in LlamaGen's layout, {dtype}", to_llamagen(opened, out, weights, dtype, force)
    elif to == "universal":
        said, how = "DeepSpeed's universal checkpoint", to_universal(opened, out, force)
    else:
        assert to == "checkpoint", to
        said, how = (
            f"checkpoint for {data} data x {tensor} tensor ranks",
            to_checkpoint(opened, out, data, tensor, force),
        )
    size, seconds = size_of(out), time.perf_counter() - start
    rate = f"{size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s"
    return f"{out}: {said}, of step {opened.about['step']} ({rate}); {how}"


def to_safetensors(source: Source, out: Path, weights: str, dtype: str, force: bool) -> str:
    """The transformer as one safetensors file with configuration and provenance; returns how it was checked."""
    shapes, kind, model = source.weights, DTYPES[dtype], source.cfg.model
    check_fits(source.folder, shapes, model)
    size = bytes_of(shapes, dtype)
    about = metadata_of(model, source.provenance(weights))
    with staged(out, size + 256 * len(shapes), force) as path:
        source.verify()
        with (
            byte_bar(source.console, "writing", size) as advance,
            TensorWriter(path, {n: (kind, s) for n, s in shapes.items()}, about) as writer,
        ):
            for name in shapes:
                tensor = source.weight(name, weights, kind)
                writer.write(name, tensor)
                advance(tensor.numel() * kind.itemsize)
        settle(path)
        if sha256(path) != writer.sha256:
            raise UserError(f"{path} was written but reads back otherwise: check the disk")
        read_model_metadata(path)
    write_about(out, model, source.provenance(weights) | {"tokenizer": source.cfg.data.tokenizer}, writer.sha256)
    return f"SHA-256 {writer.sha256[:16]} read back as written"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
