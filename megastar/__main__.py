"""``python -m megastar``, and what the deepspeed launcher starts with ``--module megastar``."""

from megastar.cli import program

if __name__ == "__main__":
    program()
