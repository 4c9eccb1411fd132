"""Disks that really are full or read-only, for any user: tmpfs in a mount namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


def with_disks(disks: dict[Path, str], *command: object, timeout: int = 900) -> subprocess.CompletedProcess:
    """Run Python with ``command`` where each folder of ``disks`` is a disk of its own of that size ("16m")."""
    mounts = "".join(f"mount -t tmpfs -o size={size} none '{folder}' && " for folder, size in disks.items())
    for folder in disks:
        folder.mkdir(parents=True, exist_ok=True)
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounts + 'exec "$@"', "sh", sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def fill(disk: Path) -> Path:
    """Leave not one byte on ``disk``; the file to remove that makes room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as f, suppress(OSError):
        while True:
            f.write(b"x" * (1 << 16))
    return filler


def remount(disk: Path, how: str) -> None:
    """``how``: ro or rw. Nothing on it may be open for writing."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)
