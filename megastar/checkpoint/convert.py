"""`megastar convert`: a checkpoint -> weights files, DeepSpeed's universal format, another number of files.

Needs no DeepSpeed and no process group, and memory for a few tensors only. Each output is written to a temporary path,
read back and compared, then renamed (atomic_output.py).
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from megastar.checkpoint.convert_weights import write_weights
from megastar.checkpoint.deepspeed_universal import to_universal
from megastar.checkpoint.reshard import to_checkpoint
from megastar.checkpoint.source import open_source
from megastar.model.io import check_fits

TARGETS = ("safetensors", "llamagen", "universal", "checkpoint")


def convert(
    path: Path,
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
    """Convert the checkpoint in ``path`` to one of ``TARGETS``; returns one sentence about the output.

    ``weights`` (ema or student) and ``dtype`` apply to weights files, ``data`` x ``tensor`` ranks to a checkpoint.
    ``force`` replaces an existing ``out``. Raises ``UserError`` and leaves ``out`` unchanged.
    """
    start = time.perf_counter()
    source, out = open_source(path, console), Path(out)
    if to in ("safetensors", "llamagen"):
        cfg, provenance = source.cfg.model, source.provenance(weights)
        check_fits(source.folder, source.weights, cfg)
        checked = write_weights(
            out, to, cfg, provenance, source.weights, lambda name: source.weight(name, weights),
            dtype=dtype, force=force, console=console, verify=source.verify, tokenizer=source.cfg.data.tokenizer,
        )  # fmt: skip
        layout = " in LlamaGen's layout" if to == "llamagen" else ""
        what = f"{weights} weights{layout}, {dtype}"
    elif to == "universal":
        what, checked = "DeepSpeed's universal checkpoint", to_universal(source, out, force)
    else:
        assert to == "checkpoint", to
        what = f"checkpoint for {data} data x {tensor} tensor ranks"
        checked = to_checkpoint(source, out, data, tensor, force)
    mb, seconds = size_of(out) / 1e6, time.perf_counter() - start
    rate = f"{mb:.1f} MB in {seconds:.1f} s, {mb / seconds:.0f} MB/s"
    return f"{out}: {what}, step {source.manifest['step']} ({rate}); {checked}"


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
