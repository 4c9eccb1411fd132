"""``megastar pretokenize`` as a script: python tools/pretokenize.py SOURCE --tokenizer FILE --out FOLDER [--help]."""

import sys

from megastar.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretokenize", *sys.argv[1:]]))
