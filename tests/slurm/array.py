"""An array of pretokenize jobs of which a task is killed while it makes a shard."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from megastar.data.pretokenize.runner import pretokenize
from megastar.data.shards.manifest import load_manifest
from megastar.data.shards.verify import verify
from tests.integration.conftest import ROOT, World
from tests.slurm.cluster import SIZE, Cluster, Task, wait_for

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "GONE")


def logs(folder: Path) -> str:
    return "".join(p.read_text(errors="replace") for p in sorted(folder.glob("*.log")))


def holder(claim: Path, tasks: list[Task]) -> Task | None:
    """Whose claim this is: the host name and the number of the process on that node."""
    try:
        said = json.loads(claim.read_text())
    except (OSError, ValueError):  # just made, or just released
        return None
    for task in tasks:
        try:
            numbers = Path(f"/proc/{task.pid}/status").read_text().split("NSpid:")[1].splitlines()[0].split()
        except OSError:  # it has ended
            continue
        if said["machine"].split()[0] == task.node and said["pid"] == int(numbers[-1]):
            return task
    return None


def kill_one_at_work(cluster: Cluster, job: str, count: int, out: Path, told) -> Task:
    """SIGKILL a task that holds the claim of a shard, while the others stand still."""
    wait_for("tasks", 300, lambda: len(cluster.tasks(job)) == count, told)
    tasks = cluster.tasks(job)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if claims := list(out.glob("**/*.claim")):
            for task in tasks:
                with suppress(ProcessLookupError):  # it has ended: then there is no claim of it
                    os.kill(task.pid, signal.SIGSTOP)
            try:
                if victim := next(filter(None, (holder(c, tasks) for c in claims)), None):
                    os.kill(victim.pid, signal.SIGKILL)
                    return victim
            finally:
                for task in tasks:
                    with suppress(ProcessLookupError):  # the victim
                        os.kill(task.pid, signal.SIGCONT)
    raise TimeoutError(told())


def lose_a_task(cluster: Cluster, world: World, tmp_path: Path) -> None:
    """The set is complete and to the byte that of one process: the others make the shard, or the requeued job does."""
    source = (
        world.pictures,
        "--subset",
        "train",
        "--tokenizer",
        world.tokenizer,
        "--shard-size",
        "1",
        "--workers",
        "1",
    )
    out, log = tmp_path / "codes", f"--output={tmp_path}/%x-%A_%a.log"
    job = cluster.sbatch(
        "--array=0-1", "--nodes=1", *SIZE, log, "slurm/pretokenize.sh", *source, "--out", out, cwd=ROOT
    )
    jobs = [f"{job}_0", f"{job}_1"]

    def told() -> str:
        return "".join(cluster.run("scontrol", "show", "job", j, check=False) for j in jobs) + logs(tmp_path)[-4000:]

    kill_one_at_work(cluster, job, 4, out, told)
    wait_for("the array", 600, lambda: all(cluster.state(j) in OVER for j in jobs), told)
    assert [cluster.state(j) for j in jobs] == ["COMPLETED"] * 2, told()
    assert [cluster.job(j)["Restarts"] for j in jobs].count("1") == 1, told()
    assert "ended by a crash (status 137); requeued" in logs(tmp_path)
    quiet = Console(quiet=True)
    assert verify(str(out), progress=quiet) == []
    pretokenize(world.pictures, "train", world.tokenizer, tmp_path / "one", shard_size=1, workers=1, console=quiet)
    one, many = load_manifest(str(tmp_path / "one")), load_manifest(str(out))
    assert [s.sha256 for s in one.shards] == [s.sha256 for s in many.shards] and len(one.shards) == 27
