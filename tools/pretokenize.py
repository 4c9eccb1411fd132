"""``megastar pretokenize`` as a script: python tools/pretokenize.py SOURCE --tokenizer FILE --out FOLDER [--help]."""

import sys

from megastar.cli import program

if __name__ == "__main__":
    program(["pretokenize", *sys.argv[1:]])
