"""Run by torchrun from test_exactly_once.py: `megastar train` that writes down which samples each rank was handed.

exactly_once_worker.py IDS DIE_AT CONFIG section.field=value ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from megastar.config.load import load_config
from megastar.data.loader import TokenLoader
from megastar.engine.trainer import train


def main(ids: Path, die_at: int, config: str, overrides: list[str]) -> None:
    original = TokenLoader.batches

    def batches(self: TokenLoader, *arguments, **named) -> Iterator[dict]:
        with (ids / f"rank-{os.environ['RANK']}.jsonl").open("w") as f:
            for batch in original(self, *arguments, **named):
                row = {"step": batch["step"], "ids": batch["ids"].tolist(), "epochs": batch["epochs"].tolist()}
                f.write(json.dumps(row) + "\n")
                f.flush()
                if batch["step"] == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    TokenLoader.batches = batches
    train(load_config(config, overrides))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
