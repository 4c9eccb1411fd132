"""``megastar probe`` as a script: python tools/linear_probe.py RUN ... --val-shards FOLDER [--help]."""

import sys

from megastar.cli import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
