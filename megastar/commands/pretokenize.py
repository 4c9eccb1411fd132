"""``megastar pretokenize``."""

from __future__ import annotations

from megastar.commands.common import Parser, natural, positive

EXAMPLES = """
megastar pretokenize assets/emoji64/emoji64.tar --subset train --tokenizer assets/tokenizer/emoji64-vq.safetensors \\
    --out runs/demo/codes/train
megastar pretokenize imagenet/train --tokenizer data/tokenizer/vq16.safetensors --out data/imagenet256/train --shard-size 10000
Pictures: one folder a class, or WebDataset tars. The same command again goes on with the first unfinished shard.
"""


def parser() -> Parser:
    p = Parser(
        "pretokenize", "Turn pictures into token shards: all crops of each picture as codes, with a manifest.", EXAMPLES
    )
    p.add_argument("source", help="folder of pictures, a .tar, or a folder of tars")
    p.add_argument("--tokenizer", required=True, help="tokenizer .safetensors")
    p.add_argument("--out", required=True, help="folder for the shards and manifest.json")
    p.add_argument("--subset", default=None, help="only pictures below this top folder, for example train")
    p.add_argument("--crops", default="ten:1.1", help="ten:SCALE, center-flip or center (default ten:1.1, LlamaGen's)")
    p.add_argument("--shard-size", type=positive, default=1000, help="pictures a shard (default 1000)")
    p.add_argument("--workers", type=natural, default=0, help="threads that decode; 0: the cores (default 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the encoder (default fp32)")
    p.add_argument("--batch", type=natural, default=0, help="crops an encoder call; 0: by device and size (default 0)")
    p.add_argument("--seed", type=natural, default=0, help="seed of the order of the pictures (default 0)")
    return p


def main(words: list[str]) -> int:
    a = parser().parse_args(words)
    from megastar.data.pretokenize import pretokenize

    pretokenize(
        a.source,
        a.subset,
        a.tokenizer,
        a.out,
        crops=a.crops,
        shard_size=a.shard_size,
        workers=a.workers,
        device=a.device,
        dtype=a.dtype,
        batch=a.batch,
        seed=a.seed,
    )
    return 0
