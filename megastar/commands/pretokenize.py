"""``megastar pretokenize``: encode images into token shards."""

from __future__ import annotations

import logging
import os

from megastar.commands import data
from megastar.commands._shared.common import (
    Parser,
    bounded,
    is_launched,
    logging_options,
    main_console,
    natural,
    own_device,
    place_of,
    positive,
    processes,
    seed,
    threads,
)
from megastar.commands._shared.outputs import check_outputs
from megastar.errors import UserError

EXAMPLES = """
megastar pretokenize assets/emoji64/emoji64.tar --subset train --tokenizer assets/tokenizer/emoji64-vq.safetensors \\
    --out runs/demo/codes/train
megastar pretokenize ILSVRC2012_img_train.tar --tokenizer data/tokenizer/vq16.safetensors --out data/imagenet256/train \\
    --crops ten:1.1+ten:1.05 --shard-size 10000 --dtype bf16 --nproc 8
megastar pretokenize val.txt --tokenizer data/tokenizer/vq16.safetensors --out data/imagenet256/val --crops center-flip
sbatch --array=0-15 slurm/pretokenize.sh s3://bucket/images --tokenizer ... --out ...
megastar pretokenize photos --class-level 2 --tokenizer vq.safetensors --out codes/train
megastar pretokenize photos/val --classes codes/train --tokenizer vq.safetensors --out codes/val
megastar pretokenize shards --label-field json.label --tokenizer vq.safetensors --out codes/train
megastar pretokenize photos --tokenizer vq.safetensors --out codes/repa --features efflite0
megastar pretokenize photos --tokenizer vq.safetensors --out codes/repa --features dinov2 \\
    --feature-weights dinov2_vitb14_pretrain.pth
megastar pretokenize --verify --out data/imagenet256/train
SOURCE: a folder with one subfolder per class (ImageFolder); a list (.txt, .tsv) with path<TAB>class on each line; or a
tar, a folder of tars or s3://bucket/prefix of tars. A tar holds one folder per class, KEY.jpg and KEY.cls (WebDataset),
the images of one class, or one tar per class (ILSVRC2012_img_train.tar). Hidden files and folders are ignored. The
last line names the classes, where they are from, and the smallest and the largest one.
Any number of processes may run the same command at the same time: --nproc, torchrun, srun, a job array, or several
machines. Each takes the next unfinished shard; the output is byte-identical. Repeating a command resumes it.
"""


def parser() -> Parser:
    p = Parser("pretokenize", "Encode all crops of each image into token shards with a manifest.", EXAMPLES)
    p.add_argument("source", nargs="?", help="folder of images, tars or a list; see below")
    p.add_argument("--tokenizer", help="tokenizer .safetensors, folder of convert --to hf, or hf://owner/name")
    p.add_argument("--out", required=True, help="output folder for the shards and manifest.json")
    p.add_argument("--subset", help="use only images in this top-level folder, for example train; classes are below it")
    levels = (
        "folder that is the class: 1 (default, as ImageFolder): the top one; 2: the next; -1: the innermost; 0: none"
    )
    p.add_argument("--class-level", type=bounded(int, -1, 100), metavar="N", help=levels)
    fields = "companion that holds the class: cls, label, index, ... (KEY.cls), or a field of KEY.json (json.FIELD)"
    p.add_argument("--label-field", default="", metavar="NAME", help=fields)
    names = "names of the classes in their order: a file with one per line, or another set of shards"
    p.add_argument("--classes", metavar="FILE", help=names)
    crops = "ten:SCALE (10 crops as in LlamaGen), center-flip, center, or several joined by +"
    p.add_argument("--crops", default="ten:1.1", help=crops)
    p.add_argument("--shard-size", type=positive, default=1000, help="images per shard")
    p.add_argument("--layout", default="plain", help="shard layout: plain or packed")
    p.add_argument("--workers", type=threads, default=0, help="decoding threads; 0: one per core")
    p.add_argument("--nproc", type=processes, default=1, help="local processes, one per GPU")
    p.add_argument("--device", default="auto", help="auto (one GPU per process), cpu, cuda or cuda:1")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the encoder")
    p.add_argument("--batch", type=natural, default=0, help="crops per encoder call; 0: by device and size")
    p.add_argument("--seed", type=seed, default=0, help="seed of the order of the images")
    kinds = "also store an encoder's patch features, for repa: efflite0, dinov2 or dinov3 (with --feature-weights), or module:function"
    p.add_argument("--features", default="", metavar="ENCODER", help=kinds)
    p.add_argument("--feature-weights", metavar="FILE", help="weights of the encoder of --features")
    pool = "average the patches of an encoder whose grid is a multiple of the tokens' (else it is refused)"
    p.add_argument("--feature-pool", action="store_true", help=pool)
    p.add_argument("--verify", action="store_true", help="only verify --out; exit status 2 if a shard is damaged")
    return p


def main(words: list[str]) -> int:
    a = parser().parse(words)
    if a.verify:
        return 2 if data.main(["verify", a.out, *logging_options()]) else 0
    if a.source is None or a.tokenizer is None:
        raise UserError("pretokenize needs SOURCE and --tokenizer; see megastar pretokenize --help")
    check_outputs({}, a.source, folders={"--out": a.out})
    from megastar.data.images.classes import Choice
    from megastar.data.shards.class_names import read_class_names

    names = read_class_names(a.classes, sets=True) if a.classes is not None else []
    choice = Choice(a.class_level, a.label_field, tuple(names), a.classes or "")
    if a.nproc > 1 and not is_launched(os.environ):
        from megastar.commands._shared.launch import launch

        return launch(a.nproc, ["pretokenize", *words])
    from megastar.checkpoint.hub.download import local_tokenizer
    from megastar.data.pretokenize import runner

    if place_of(os.environ)[0]:  # rank 0 reports the result
        runner.logger.setLevel(logging.ERROR)
    options = {k: getattr(a, k) for k in ("crops", "shard_size", "layout", "workers", "dtype", "batch", "seed")}
    options |= {name: getattr(a, name) for name in ("features", "feature_weights", "feature_pool")}
    options["choice"] = choice
    options |= {"device": own_device(a.device), "console": main_console()}
    runner.pretokenize(a.source, a.subset, local_tokenizer(a.tokenizer), a.out, **options)
    return 0
