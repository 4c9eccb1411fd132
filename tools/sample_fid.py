"""50,000 images for FID: python tools/sample_fid.py WEIGHTS --tokenizer T --npz OUT.npz [options of megastar sample]."""

import sys

from megastar.cli import program

if __name__ == "__main__":
    program(["sample", "--count", "50000", *sys.argv[1:]])
