"""`megastar train-tokenizer` on ranks that differ, as forked ranks cannot: see test_tokenizer.py.

A word ``1:WORD`` is WORD on rank 1 alone. $IMAGES_1 is $IMAGES there. $STOP_AT is a number of steps, after which rank 1
has a stop signal.
"""

from __future__ import annotations

import os
import signal
import sys

from megastar.config.load import load_tokenizer_config
from megastar.engine.phase import PHASE
from megastar.engine.tokenizer.trainer import train_tokenizer
from megastar.errors import UserError
from megastar.utils.signals import StopFlag


class StopsAt(StopFlag):
    @property
    def signal(self) -> int:
        return signal.SIGUSR1 if PHASE.done == int(os.environ["STOP_AT"]) and os.environ["RANK"] == "1" else 0

    @signal.setter
    def signal(self, number: int) -> None:
        pass


def main() -> int:
    rank = os.environ["RANK"]
    os.environ["IMAGES"] = os.environ.get(f"IMAGES_{rank}") or os.environ.get("IMAGES", "")
    config, *words = [w.removeprefix(f"{rank}:") for w in sys.argv[1:] if w.startswith(f"{rank}:") or w[1:2] != ":"]
    try:
        train_tokenizer(load_tokenizer_config(config, words), stop=StopsAt() if "STOP_AT" in os.environ else None)
    except UserError as error:
        print(f"rank {rank}, reported {error.reported}: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
