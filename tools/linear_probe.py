"""``megastar probe`` as a script: python tools/linear_probe.py RUN ... --val-shards FOLDER [--help]."""

import sys

from megastar.cli import program

if __name__ == "__main__":
    program(["probe", *sys.argv[1:]])
