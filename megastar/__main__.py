"""``python -m megastar``, and what the deepspeed launcher starts with ``--module megastar``."""

import sys

from megastar.cli import main

if __name__ == "__main__":
    sys.exit(main())
