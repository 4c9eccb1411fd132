"""``megastar export``."""

from __future__ import annotations

from pathlib import Path

from megastar.commands.common import Parser

EXAMPLES = """
megastar export runs/demo/run --out demo.safetensors                    the averaged weights (the teacher)
megastar export runs/demo/run --out student.safetensors --weights student --dtype bf16
megastar export runs/demo/run/checkpoints/step-00000400 --out step400.safetensors
"""


def parser() -> Parser:
    p = Parser(
        "export", "Write a run's weights as one safetensors file, with configuration and origin inside.", EXAMPLES
    )
    p.add_argument("source", type=Path, help="run folder (its newest checkpoint), or one checkpoint")
    p.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    p.add_argument("--weights", choices=("ema", "student"), default="ema", help="which weights (default ema)")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="their precision (default fp32)")
    return p


def main(words: list[str]) -> int:
    args = parser().parse_args(words)
    from megastar.engine.export import export

    about = export(args.source, args.out, args.weights, args.dtype)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {args.weights} weights of step {about['step']}, {args.dtype}, {size:.1f} MB")
    return 0
