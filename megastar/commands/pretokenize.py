"""``megastar pretokenize``."""

from __future__ import annotations

import os
import shlex

from rich.console import Console

from megastar.commands._common import Parser, is_launched, is_main_process, natural, positive
from megastar.errors import UserError

EXAMPLES = """
megastar pretokenize assets/emoji64/emoji64.tar --subset train --tokenizer assets/tokenizer/emoji64-vq.safetensors \\
    --out runs/demo/codes/train
megastar pretokenize ILSVRC2012_img_train.tar --tokenizer data/tokenizer/vq16.safetensors --out data/imagenet256/train \\
    --crops ten:1.1+ten:1.05 --shard-size 10000 --dtype bf16 --nproc 8
megastar pretokenize val.txt --tokenizer data/tokenizer/vq16.safetensors --out data/imagenet256/val --crops center-flip
sbatch --array=0-15 slurm/pretokenize.sh s3://bucket/pictures --tokenizer ... --out ...
megastar pretokenize --verify --out data/imagenet256/train
SOURCE: a folder a class (ImageFolder); tars, one or a folder or s3://bucket/prefix of them, with a folder a class, or
KEY.jpg and KEY.cls (WebDataset), or a tar a class, or a tar of such tars (ILSVRC2012_img_train.tar, read as it is); or a
list (.txt, .tsv) with path<TAB>class on each line.
Any number of processes may run the same command at once: --nproc, torchrun, srun, a job array, or by hand on several
machines. Each takes the next unfinished shard; the outcome is the same to the byte. The same command again goes on.
"""


def parser() -> Parser:
    p = Parser(
        "pretokenize", "Turn pictures into token shards: all crops of each picture as codes, with a manifest.", EXAMPLES
    )
    p.add_argument("source", nargs="?", help="folder of pictures, tars or a list; see below")
    p.add_argument("--tokenizer", help="tokenizer .safetensors")
    p.add_argument("--out", required=True, help="folder for the shards and manifest.json")
    p.add_argument("--subset", default=None, help="only pictures below this top folder, for example train")
    p.add_argument(
        "--crops",
        default="ten:1.1",
        help="ten:SCALE, center-flip or center, or several joined by +: ten:1.1+ten:1.05 (default ten:1.1, LlamaGen's)",
    )
    p.add_argument("--shard-size", type=positive, default=1000, help="pictures a shard (default 1000)")
    p.add_argument("--layout", default="plain", help="how a shard holds its samples: plain or packed (default plain)")
    p.add_argument("--workers", type=natural, default=0, help="threads that decode; 0: the cores (default 0)")
    p.add_argument("--nproc", type=positive, default=1, help="processes to start here, one a GPU (default 1)")
    p.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto: a GPU each, in a launcher)"
    )
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the encoder (default fp32)")
    p.add_argument("--batch", type=natural, default=0, help="crops an encoder call; 0: by device and size (default 0)")
    p.add_argument("--seed", type=natural, default=0, help="seed of the order of the pictures (default 0)")
    p.add_argument("--verify", action="store_true", help="re-read the finished set of --out, and do nothing else")
    return p


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    console = Console(quiet=not is_main_process(os.environ))
    if a.verify:
        return verify(a.out, console)
    if a.source is None or a.tokenizer is None:
        raise UserError("pretokenize needs SOURCE and --tokenizer; see megastar pretokenize --help")
    if a.nproc > 1 and not is_launched(os.environ):
        from megastar.commands._launch import launch

        return launch(a.nproc, ["pretokenize", *without(words, "--nproc")])
    from megastar.data.pretokenize.runner import pretokenize

    pretokenize(
        a.source,
        a.subset,
        a.tokenizer,
        a.out,
        crops=a.crops,
        shard_size=a.shard_size,
        layout=a.layout,
        workers=a.workers,
        device=own_device(a.device),
        dtype=a.dtype,
        batch=a.batch,
        seed=a.seed,
        console=console,
    )
    return 0


def without(words: list[str], option: str) -> list[str]:
    """The words less an option and its value: torch's launcher would take it for its own."""
    at = [i for i, word in enumerate(words) if word == option]
    return [w for i, w in enumerate(words) if i not in at and i - 1 not in at and not w.startswith(f"{option}=")]


def own_device(name: str) -> str:
    """In a launcher, "auto" and "cuda" are the GPU of this process's number on its machine."""
    import torch

    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if name in ("auto", "cuda") and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return name


def verify(out: str, console: Console) -> int:
    """Name the broken shards of a finished set, and what mends it; the exit status."""
    from megastar.data.shards import verify as check
    from megastar.data.shards.manifest import load_manifest

    m = load_manifest(out)
    if not (problems := check.verify(out, progress=console)):
        console.print(
            f"{out}: {m.samples} pictures in {len(m.shards)} shards are as the manifest says",
            markup=False,
            soft_wrap=True,
        )
        return 0
    for problem in problems:
        console.print(str(problem), markup=False, soft_wrap=True)
    broken = list(dict.fromkeys(problem.shard for problem in problems))
    names = " ".join(map(shlex.quote, broken))
    raise UserError(
        f"{out}: {len(broken)} of {len(m.shards)} shards are broken: remove them (cd {shlex.quote(str(out))} && rm -f {names}) and run the command that made them again, it makes what is missing"
    )
