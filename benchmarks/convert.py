"""Memory and speed of `megastar convert` on a checkpoint of the B size (111 M parameters and the projector).

python -m benchmarks.convert [--folder FOLDER]     (needs 4 GB there, half of it for a checkpoint of 2 data x 2 tensor ranks)

Each conversion runs in its own process. ``peak_gib`` is its highest resident memory minus that of the interpreter with
torch imported. ``mb_per_s`` is the number of bytes written divided by the time of the whole conversion, including both
checks: hashing the source before and reading back the output afterwards. ``--tiny`` checks the script with a network of two
narrow blocks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megastar.checkpoint.atomic_output import remove
from megastar.config.load import load_config
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
LIMIT_GIB = 1.3
CASES = {
    "safetensors": {},
    "llamagen": {"dtype": "bf16"},
    "universal": {},
    "checkpoint": {"data": 4, "tensor": 1},
}
CHILD = """
import json, sys, time
from pathlib import Path

def kb(field):
    return int(next(s for s in open("/proc/self/status") if s.startswith(field)).split()[1])

import torch
base, start = kb("VmRSS"), time.perf_counter()
from megastar.checkpoint.convert import convert, size_of
source, to, out, options = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
convert(source, to, out, **options)
seconds = time.perf_counter() - start
peak, mb = kb("VmHWM") - base, size_of(out) / 1e6
print(json.dumps({"to": to, **options, "peak_gib": round(peak / 2**20, 3), "base_gib": round(base / 2**20, 3),
                  "seconds": round(seconds, 1), "mb": round(mb, 1), "mb_per_s": round(mb / seconds)}))
"""


def measure(folder: Path, tiny: bool = False) -> Iterator[dict[str, Any]]:
    """Convert to each format and yield its row; the output is removed."""
    small = ["model.n_layer=2", "self_guided.contrastive_block=1", "model.dim=32", "model.n_head=2"] if tiny else []
    cfg = load_config(ROOT / "configs/run/star_b_50ep.yaml", small)
    source = write_checkpoint(folder / "run", cfg, 2, 2)
    for to, options in CASES.items():
        out = folder / to
        command = [sys.executable, "-c", CHILD, str(source), to, str(out), json.dumps(options)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        yield json.loads(done.stdout)
        remove(out)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, help="where the scratch folder is made (default: the system's)")
    p.add_argument("--tiny", action="store_true", help="a network of two narrow blocks")
    a = p.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as place:
        for row in measure(Path(place), a.tiny):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
