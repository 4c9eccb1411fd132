"""``megastar convert`` as a script: python tools/convert_checkpoint.py SOURCE --to FORMAT --out PLACE [--help]."""

import sys

from megastar.cli import program

if __name__ == "__main__":
    program(["convert", *sys.argv[1:]])
