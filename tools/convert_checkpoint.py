"""``megastar convert`` as a script: python tools/convert_checkpoint.py SOURCE --to FORMAT --out PLACE [--help]."""

import sys

from megastar.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
