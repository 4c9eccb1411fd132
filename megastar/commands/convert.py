"""``megastar convert``: inspect a checkpoint, or convert it to another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megastar.checkpoint.atomic_output import check_free
from megastar.checkpoint.hub.card import check_license, read_scores
from megastar.checkpoint.hub.download import is_hub_source, local_source, local_tokenizer
from megastar.checkpoint.hub.layout import HOLDS, is_hub_folder
from megastar.commands._shared.common import Parser, bounded, processes
from megastar.commands._shared.outputs import check_outputs
from megastar.config.files import find_file
from megastar.errors import UserError
from megastar.tokenizer.io import read_tokenizer_metadata

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """
megastar convert --inspect runs/demo/run                              contents and health of a checkpoint
megastar convert --inspect runs/demo/run --verify                     also compare hashes
megastar convert runs/demo/run --to safetensors --out demo.safetensors              EMA weights (the teacher)
megastar convert runs/demo/run --to safetensors --out s.safetensors --weights student --dtype bf16
megastar convert runs/b --to llamagen --out b.pt                      for LlamaGen's sample_c2i.py --gpt-ckpt
megastar convert runs/demo/run --to hf --out demo-hf --license apache-2.0           folder in the Hub's layout; docs/hub.md
megastar convert hf://owner/name --to safetensors --out w.safetensors               and back, as of any folder of --to hf
megastar convert runs/b --to universal --out b-universal              for DeepSpeed's checkpoint: {load_universal: true}
megastar convert runs/b --to checkpoint --out runs/b-wide --data 16 --tensor 2      files for 32 ranks
megastar convert c2i_B_256.pt --to safetensors --out c2i_B_256.safetensors           LlamaGen's released weights
megastar convert 0300000.pt --weights ema --to safetensors --out ema.safetensors    one of the sets of a training checkpoint
megastar convert vq_ds16_c2i.pt --to safetensors --out vq16.safetensors             LlamaGen's tokenizer
megastar convert mine.safetensors --to llamagen --out mine.pt                       a weights file of megastar, for LlamaGen
A run resumes from any checkpoint on any number of ranks without conversion; --to checkpoint makes loading faster.
"""
ONLY = {  # option -> formats that it applies to
    "weights": ("safetensors", "llamagen", "hf"),
    "dtype": ("safetensors", "llamagen", "hf"),
    "license": ("hf",),
    "scores": ("hf",),
    "data": ("checkpoint",),
    "tensor": ("checkpoint",),
}


FOLDERS = ("universal", "checkpoint", "hf")  # formats


def parser() -> Parser:
    p = Parser("convert", "Inspect a checkpoint or a weights file, or convert it to another format.", EXAMPLES)
    p.add_argument(
        "source",
        help="run folder (its newest checkpoint), checkpoints folder, checkpoint, .safetensors file of megastar, folder of "
        "--to hf, hf://owner/name[@revision], or .pt file of LlamaGen (network or tokenizer)",
    )
    p.add_argument("--inspect", action="store_true", help="print the contents; exit status 1 if a file is damaged")
    p.add_argument("--verify", action="store_true", help="with --inspect: compare hashes as well as sizes")
    p.add_argument(
        "--to",
        choices=("safetensors", "llamagen", "hf", "universal", "checkpoint"),
        help="weights file of megastar or of LlamaGen (.pt), folder in the Hugging Face Hub's layout, DeepSpeed's universal folder, or a checkpoint for other ranks",
    )
    p.add_argument("--out", type=Path, help="file or folder to write; created only after verification")
    p.add_argument(
        "--weights",
        help="of a run: ema (default) or student; of a .pt file with several sets: the name of one, as model",
    )
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="for safetensors, llamagen and hf (default fp32)")
    p.add_argument("--data", type=bounded(int, 1, 10**5), help="for --to checkpoint: number of data ranks")
    p.add_argument("--tensor", type=processes, help="for --to checkpoint: number of tensor ranks (default 1)")
    p.add_argument(
        "--config", type=Path, help="for a .pt file: YAML file with its architecture, if LlamaGen's table lacks it"
    )
    p.add_argument(
        "--image-tokens", type=bounded(int, 4, 65536), help="for a .pt network: tokens per image, if the file lacks it"
    )
    p.add_argument(
        "--num-classes",
        type=bounded(int, 1, 10**6),
        help="for a .pt network: classes, where the rows of its class table can be read in two ways",
    )
    p.add_argument("--image-size", type=bounded(int, 1, 4096), help="for a .pt tokenizer: image size (default 256)")
    p.add_argument(
        "--tokenizer",
        help="tokenizer of the codes: for a weights file, to record its hash; for --to hf (default: the recorded one)",
    )
    p.add_argument("--license", help="for --to hf: licence of the weights, an identifier of the Hub as apache-2.0")
    p.add_argument(
        "--scores",
        type=Path,
        action="append",
        help="for --to hf: result of megastar evaluate --out for the model card "
        "(default: RUN/scores*.json of these weights); may be repeated",
    )
    p.add_argument("--force", action="store_true", help="replace --out if it exists")
    return p


def check(a: argparse.Namespace, name: str) -> None:
    """Raise ``UserError`` for options that contradict each other, and an output that cannot be written.
    ``name``: the source as given; of hf:// it is called before the weights are fetched, and after."""
    if a.inspect and (a.to or a.out):
        raise UserError("--inspect writes nothing: give either --inspect, or --to and --out")
    if not a.inspect and (not a.to or not a.out):
        missing = "--out" if a.to else "--to"
        raise UserError(f"{missing} is missing: give --to FORMAT and --out, or --inspect; see megastar convert --help")
    if a.verify and not a.inspect:
        raise UserError("--verify requires --inspect: a conversion always compares hashes")
    is_hub = is_hub_source(name) or is_hub_folder(a.source)
    is_file, pickled = a.source.is_file(), a.source.is_file() and a.source.suffix != ".safetensors"
    for option, formats in ONLY.items():
        if getattr(a, option) is not None and a.to not in formats:
            if option == "weights" and pickled and a.inspect:
                continue
            what = f"--to {a.to}" if a.to else "--inspect"
            raise UserError(f"--{option} applies to --to {' or '.join(formats)}: leave it out with {what}")
    for option, holds, what in (
        ("config", pickled, "a .pt file of LlamaGen"),
        ("image-tokens", pickled, "a .pt file of LlamaGen"),
        ("image-size", pickled, "a .pt file of LlamaGen"),
        ("num-classes", pickled, "a .pt file of LlamaGen"),
        ("tokenizer", is_file or a.to == "hf", "a weights file or --to hf"),
    ):
        if getattr(a, option.replace("-", "_")) is not None and not holds:
            raise UserError(f"--{option} applies only to {what}: leave it out for {name}")
    if (is_file or is_hub) and a.to in ("universal", "checkpoint"):
        raise UserError(f"--to {a.to} needs a run's checkpoint: {name} has weights only")
    if a.weights and (is_hub or is_file and not pickled):
        raise UserError(f"--weights applies to a run or a .pt file: {name} has only one set of weights, leave it out")
    if a.weights and a.source.is_dir() and not is_hub and a.weights not in ("ema", "student"):
        raise UserError(f"--weights {a.weights}: a run has the weights ema and student: give one of them")
    if a.out:
        inputs, out = (a.source, a.tokenizer, a.config), {"--out": a.out}
        check_outputs({} if a.to in FOLDERS else out, *inputs, folders=out if a.to in FOLDERS else {})
    if a.license:
        check_license(a.license)
    if a.to == "checkpoint" and a.data is None:
        raise UserError("--to checkpoint needs --data, the number of data ranks (and --tensor, default 1)")
    if a.to in ("safetensors", "llamagen", "hf") and (is_hub or a.source.exists()):
        check_free(a.out, 0, a.force, HOLDS if a.to == "hf" else ())


def pickle_options(a: argparse.Namespace) -> dict[str, Any]:
    """What a .pt file may lack."""
    options = {"config": a.config, "image_tokens": a.image_tokens, "image_size": a.image_size or 256}
    return options | {"weights": a.weights, "num_classes": a.num_classes}


def write_hub_folder(a: argparse.Namespace, name: str, scores: dict[str, dict[str, Any]], console: Console) -> str:
    """--to hf; ``name``: the source as given; ``scores``: results by file. Returns one sentence about the folder."""
    from megastar.checkpoint.hub.convert_to import to_hub_folder

    return to_hub_folder(
        a.source, a.out, name, dtype=a.dtype or "fp32", tokenizer=a.tokenizer, force=a.force,
        license=check_license(a.license), scores=scores, console=console, **pickle_options(a),
    )  # fmt: skip


def main(words: list[str]) -> int:
    a = parser().parse(words)
    name = a.source
    a.source = Path(name)
    check(a, name)
    scores = {str(path.resolve()): read_scores(path) for path in a.scores or ()}
    if a.tokenizer:
        given = a.tokenizer
        a.tokenizer = Path(local_tokenizer(given if is_hub_source(given) else find_file(given) or given))
        read_tokenizer_metadata(a.tokenizer)
    if is_hub_source(name):
        a.source = local_source(name)
        check(a, name)
    from megastar.checkpoint.inspect import inspect, inspect_weights, read_any_header
    from megastar.utils.logs import shared_console

    console = shared_console()
    dtype = a.dtype or "fp32"
    if a.to == "hf":
        result = write_hub_folder(a, name, scores, console)
    elif a.source.is_file() or is_hub_folder(a.source) or a.source.suffix in (".safetensors", ".pt", ".pth"):
        options = pickle_options(a)
        if a.inspect and (a.source.suffix == ".safetensors" or is_hub_folder(a.source)):  # without torch
            header = read_any_header(a.source)
            return 0 if inspect_weights(a.source, header, a.verify, console) else 1
        from megastar.checkpoint.convert_weights import convert_file, open_weights

        source = open_weights(a.source, **options)
        if a.inspect:
            header = source.cfg, source.provenance, source.shapes
            return 0 if inspect_weights(a.source, header, a.verify, console) else 1
        result = convert_file(source, a.to, a.out, dtype=dtype, tokenizer=a.tokenizer, force=a.force, console=console)
    elif a.inspect:
        return 0 if inspect(a.source, a.verify, console) else 1
    else:
        from megastar.checkpoint.convert import convert

        result = convert(
            a.source, a.to, a.out, weights=a.weights or "ema", dtype=dtype, data=a.data or 1, tensor=a.tensor or 1,
            force=a.force, console=console,
        )  # fmt: skip
    console.print(result, markup=False, highlight=False, soft_wrap=True)
    return 0
