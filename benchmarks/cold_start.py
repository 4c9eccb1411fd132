"""Run time of the commands that only read files: wall-clock seconds of the process, compared with `import torch`.

    python benchmarks/cold_start.py                                  on a run of tests/data
    OTHER_CHECKOUT=../before python benchmarks/cold_start.py RUN     also with the same commands of another checkout

The processes take turns; the first turn, which reads the files from the disk, is not counted. The last lines report
which commands import torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, report


def processor() -> str:
    """The model name reported by Linux, and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def start(words: list[str], checkout: Path) -> subprocess.CompletedProcess:
    """Run `python WORDS` with megastar from ``checkout``. Raises ``CalledProcessError`` if it fails."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    # -m searches the working directory first, so it must not contain megastar.
    where = tempfile.gettempdir()
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=where, capture_output=True, text=True, check=True
    )


def imports_torch(words: list[str], checkout: Path) -> bool:
    """Whether the command imports torch, according to the last column of `python -X importtime`."""
    done = start(["-X", "importtime", *words], checkout)
    return any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", type=Path, default=ROOT / "tests/data/run_v0_1_0/zero3", help="run folder")
    p.add_argument("--repeats", type=int, default=5)
    a = p.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        measure(str(a.run.resolve()), a.repeats, f"{folder}/report.html")


def measure(run: str, repeats: int, page: str) -> None:
    commands = {
        "megastar status": ["status", run],
        "megastar convert --inspect": ["convert", "--inspect", run],
        "megastar report": ["report", run, "--no-samples", "--no-attention", "--out", page],
        "megastar plan": ["plan", f"{run}/config.yaml"],
    }
    work = {"import torch": (["-c", "import torch"], ROOT), "import megastar": (["-c", "import megastar"], ROOT)}
    for checkout in filter(None, (str(ROOT), os.environ.get("OTHER_CHECKOUT"))):
        where = "" if checkout == str(ROOT) else ", OTHER_CHECKOUT"
        work |= {f"{n}{where}": (["-m", "megastar", *words], Path(checkout).resolve()) for n, words in commands.items()}
    rows: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, (words, checkout) in work.items():
            begin = time.perf_counter()
            start(words, checkout)
            if turn:
                rows[name].append(time.perf_counter() - begin)
    report(f"{processor()}; python {platform.python_version()}; medians of {repeats}", rows, "import torch")
    for name, (words, checkout) in work.items():
        if name.startswith("megastar"):
            print(f"  {name:<44} {'imports torch' if imports_torch(words, checkout) else 'no torch'}")


if __name__ == "__main__":
    main()
