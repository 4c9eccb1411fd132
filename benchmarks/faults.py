"""The cost of a fault on SLURM: seconds from the fault to the first new step, and the number of repeated steps.

    python benchmarks/faults.py [--repeats 1] [--save-every 5] [--only FAULT ...]
                                                                     (root; Debian's slurm packages, see .ci/run)

The benchmark runs on a SLURM cluster on this machine (tests/slurm/cluster.py: three slurmd, 2 nodes x 2 tasks over gloo),
with the batch script of slurm/ and a network of two tiny blocks. For each fault it prints:

    total      fault -> the end of the first new step, measured in this process
    SLURM      part of `total`: fault -> SLURM starts the batch script again, minus `end`. It consists of
               `cred_expire` (5 s here, 120 s by default) and, after the death of a node, `SlurmdTimeout` and slurmctld's
               30 s polling interval; it does not depend on megastar
    end        fault -> the batch script requests the requeue: detection, save, end of the processes
    start      SLURM's start -> the end of the first new step
    imports    part of `start`: importing torch, DeepSpeed and megastar, in four processes at once on this machine,
               measured immediately afterwards, with the ranks stopped
    CPU        mean processor seconds per rank, from its exec to the end of that step; nearly independent of other load
    imp. CPU   the same for the imports alone
    lost       steps finished before the fault that were repeated

Then a second run on the same cluster has NaN losses at some batches (tests/integration/helpers/inject.py): a single one is
skipped, three in a row cause a rollback to the last good checkpoint. The benchmark measures the time from the skip, and
from the last of the three, to the end of the next step, and prints the time of a normal step. No rank is restarted.

Goals: no step lost on signals, at most save_every on a crash; end + start - imports under 30 s.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from common import ROOT

from megastar.run_dir import checkpoint_dir
from megastar.run_dir.jsonl import read_jsonl
from tests.integration.conftest import World, environment
from tests.slurm.cluster import SIZE, Cluster, wait_for
from tests.slurm.settings import write_site

STEPS, PATIENCE = 100_000, 600


def make_world(folder: Path) -> World:
    import torch
    from rich.console import Console

    from megastar.data.pretokenize.runner import pretokenize
    from megastar.tokenizer.io import save_tokenizer
    from megastar.tokenizer.vq import VQModel
    from tests.integration.conftest import TOKENIZER, draw

    w = World(folder)
    for shape, name in enumerate(("circle", "square", "stroke")):
        (w.pictures / "train" / name).mkdir(parents=True)
        for i in range(9):
            draw(shape, i).save(w.pictures / "train" / name / f"{i}.png")
    torch.manual_seed(0)
    save_tokenizer(VQModel(TOKENIZER), w.tokenizer, {"seed": 0})
    quiet = Console(quiet=True)
    pretokenize(w.pictures, "train", w.tokenizer, w.codes("train"), shard_size=10, workers=1, console=quiet)
    return w


def cpu_of(pids: list[int]) -> float:
    """Mean processor seconds per process so far."""
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK") / len(pids)


def import_seconds() -> tuple[float, float]:
    """Import what a rank imports in four processes at once: wall-clock seconds, and mean processor seconds per process."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import torch.utils.tensorboard, megastar.engine.trainer as l; l.build.__globals__['import_muon']()"
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd=ROOT) for _ in range(4)]
    assert all(r.wait() == 0 for r in ranks)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, used / len(ranks)


def write_config(world: World, path: Path, run: Path, steps: int, save_every: int) -> Path:
    """A run without validation."""
    world.write_config(path, run, steps=steps, save_every=save_every, val_every=0)
    path.write_text(re.sub(r"val_shards: \S+ ", "", path.read_text()))
    return path


class Bench:
    def __init__(self, cluster: Cluster, world: World, folder: Path, save_every: int):
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        config = write_config(world, folder / "run.yaml", self.run, STEPS, save_every)
        self.job = cluster.sbatch(
            "--nodes=2", *SIZE, f"--output={folder}/job.log", "slurm/train_b.sh", config, cwd=ROOT,
            MEGASTAR_BAD_HOST_CRASHES="0",
        )  # fmt: skip

    def log(self) -> str:
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def state(self) -> str:
        return self.cluster.run("scontrol", "show", "job", self.job, check=False) + self.log()[-3000:]

    def starts(self) -> int:
        return self.log().count(f"megastar: job {self.job} (")

    def lines(self) -> list[int]:
        """The steps logged since the job's newest start."""
        newest = self.log().rpartition(f"megastar: job {self.job} (")[2]
        return [int(n) for n in re.findall(rf"step (\d+)/{STEPS} ", newest)]

    def measure(self, fault: str, extra: int) -> dict[str, float]:
        """Cause one fault, after the current start has logged ``extra`` steps, and measure the recovery."""
        wait_for("steps", PATIENCE, lambda: len(self.lines()) >= extra, self.state)
        ranks = self.cluster.tasks(self.job)
        assert len(ranks) == 4, self.state()
        starts, node, begin = self.starts(), 0, time.time()
        ended = (self.run / "requeues.log").read_text().count("\n") if (self.run / "requeues.log").exists() else 0
        if fault == "USR1":
            for rank in ranks:
                os.kill(rank.pid, signal.SIGUSR1)
        elif fault == "scontrol requeue":
            self.cluster.run("scontrol", "requeue", self.job)
        elif fault == "a rank is killed":
            os.kill(ranks[3].pid, signal.SIGKILL)
        else:
            node = int(self.cluster.hosts(self.job, "NodeList")[1][1:])
            self.cluster.kill_node(node)
        before = max(r["step"] for r in read_jsonl(self.run / "metrics.jsonl"))
        gone = begin + wait_for("the end", PATIENCE, lambda: not self.cluster.tasks(self.job), self.state)
        before = max(before, *(r["step"] for r in read_jsonl(self.run / "metrics.jsonl")))
        wait_for("a new start", PATIENCE, lambda: self.starts() > starts, self.state)
        again = time.time()
        saved = checkpoint_dir.step_in(checkpoint_dir.latest(self.run / "checkpoints"))
        if (path := self.run / "requeues.log").exists() and path.read_text().count("\n") > ended:
            when = datetime.strptime(path.read_text().splitlines()[-1][:19], "%Y-%m-%d %H:%M:%S").timestamp()
            gone = max(gone, when)
        wait_for("a new step", PATIENCE, self.lines, self.state)
        if node:
            self.cluster.start_node(node)
        now = time.time()
        ranks = self.cluster.tasks(self.job)
        used = cpu_of([r.pid for r in ranks])
        for rank in ranks:  # so that they do not train during the measurement
            os.kill(rank.pid, signal.SIGSTOP)
        imports, used_for_imports = import_seconds()
        for rank in ranks:
            os.kill(rank.pid, signal.SIGCONT)
        found = {"total": now - begin, "SLURM": again - gone, "end": gone - begin, "start": now - again}
        cpu = {"CPU": used, "imp. CPU": used_for_imports}
        return found | {"imports": imports, **cpu, "lost": before - saved}


def not_a_number(cluster: Cluster, world: World, folder: Path) -> None:
    """A skipped step, and a rollback: seconds to the next finished step."""
    run, (alone, first), window = folder / "nan", (6, 18), 8
    every = {alone: -1, **dict.fromkeys(range(first, first + 3), -1)}
    config = write_config(world, folder / "nan.yaml", run, first + 8, 5)
    wrapper = folder / "inject.sh"
    inject = f"{sys.executable} {ROOT}/tests/integration/helpers/inject.py '{json.dumps({'nan': every})}'"
    wrapper.write_text(f'#!/bin/sh\nshift  # "megastar"\nexec {inject} "$@"\n')
    wrapper.chmod(0o755)
    (folder / "injected").mkdir()
    env = str(write_site(folder / "injected", f"MEGASTAR_PREFIX=({wrapper})"))
    settings = (f"faults.spike_window={window}", "faults.max_skips=2")
    log = folder / "nan.log"
    cluster.sbatch(
        "--nodes=2", *SIZE, f"--output={log}", "slurm/train_b.sh", config, *settings, cwd=ROOT, MEGASTAR_ENV=env
    )
    seen: list[tuple[float, int, int, int]] = []  # time, newest step, skipped steps, rollbacks

    def done() -> bool:
        files = ("skipped.jsonl", "rollbacks.jsonl")
        step = max((r["step"] for r in read_jsonl(run / "metrics.jsonl")), default=0)
        now = (step, *(len(read_jsonl(run / f)) for f in files))
        if not seen or now != seen[-1][1:]:
            seen.append((time.monotonic(), *now))
        return step >= first + 8 or (log.is_file() and "srun: error:" in log.read_text(errors="replace"))

    wait_for("the run with bad batches", PATIENCE, done, lambda: log.read_text()[-3000:])
    assert [s[2:] for s in seen][-1] == (4, 1), log.read_text()[-3000:]

    def when(true: Callable[[int, int, int], bool]) -> float:
        return next(at for at, *now in seen if true(*now))

    plain = [b[0] - a[0] for a, b in pairwise(seen) if b[1] == a[1] + 1 and a[2:] == b[2:]]
    skip = when(lambda step, _, __: step >= alone + 2) - when(lambda _, skips, __: skips >= 1)
    back = next(r for r in read_jsonl(run / "rollbacks.jsonl"))
    to = int(back["to"].rpartition("-")[2])
    seconds = when(lambda step, _, backs: backs == 1 and to < step < first) - when(lambda _, skips, __: skips == 4)
    print(
        f"NaN, skipped: {skip:.2f} s to the next step, 0 steps lost; a normal step takes {statistics.median(plain):.2f} s"
    )
    print(f"three NaN, rollback: {seconds:.2f} s to the first new step, {first - to} steps lost")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--save-every", type=int, default=5)
    faults = ("USR1", "scontrol requeue", "a rank is killed", "a node is killed", "NaN")
    p.add_argument("--only", nargs="+", choices=faults, default=faults, metavar="FAULT", help=", ".join(faults))
    args = p.parse_args()
    names = ("total", "SLURM", "end", "start", "imports", "CPU", "imp. CPU", "lost")
    print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = make_world(folder / "world")
        (folder / "cluster").mkdir()
        with Cluster(folder / "cluster", nodes=3) as cluster:
            cluster.env |= {"MEGASTAR_ENV": str(write_site(folder))}
            if starts := [f for f in args.only if f != "NaN"]:
                bench = Bench(cluster, world, folder, args.save_every)
                print(f"{'seconds':<18}" + "".join(f"{n:>9}" for n in names), "  end + start - imports", flush=True)
                for fault in starts * args.repeats:
                    row = bench.measure(fault, args.save_every + 3)
                    ours_only = row["end"] + row["start"] - row["imports"]
                    print(f"{fault:<18}" + "".join(f"{row[n]:9.1f}" for n in names), f"{ours_only:14.1f}", flush=True)
                cluster.run("scancel", bench.job)
                wait_for("the end", 60, lambda: not cluster.tasks(bench.job) and cluster.idle() == 3)
            if "NaN" in args.only:
                not_a_number(cluster, world, folder)
    print(f"load average after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
