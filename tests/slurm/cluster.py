"""A SLURM cluster of this machine: munged, slurmctld and several slurmd on loopback, ended with the process that
started them. Debian: slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge. Needs root, for the namespaces.

Each slurmd lives in host-name, mount and process namespaces of its own: a node has its own name, and a kill of the
namespace's first process is a machine that loses its power.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("slurmctld", "slurmd", "munged", "munge", "sbatch", "srun", "scontrol", "scancel", "sinfo", "unshare")
SIZE = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")  # of a job that fills the GPUs of its nodes

CONF = """
ClusterName=megastar-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/prolog.sh
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=20
KillWait=60
EnforcePartLimits=ALL
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=1
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def die_with_parent() -> None:
    """For ``preexec_fn``: nothing outlives a test run that is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def wait_for(
    what: str, seconds: float, true: Callable[[], object], told: Callable[[], str] = str, every: float = 0.05
) -> float:
    """Poll until ``true()``; the seconds it took. Raises ``TimeoutError`` with ``told()``."""
    start = time.monotonic()
    while not true():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"{what}: not within {seconds:g} s\n{told()}")
        time.sleep(every)
    return time.monotonic() - start


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row, below those that the kernel hands out; drawn, so that tests that run at the
    same time find others."""
    for first in random.SystemRandom().sample(range(10000, 19000), 1000):
        held = []
        try:
            for port in range(first, first + count):
                held.append(socket.create_server(("127.0.0.1", port)))
            return first
        except OSError:
            continue
        finally:
            for s in held:
                s.close()
    raise RuntimeError("no free ports")


class Task(NamedTuple):
    """A process that srun started; ``pid`` is this machine's number, not the one of its node."""

    pid: int
    job: str
    rank: int
    node: str


class Cluster:
    """``with Cluster(folder, 3) as c``: c.run("sinfo"), c.sbatch(...), c.kill_node(2)."""

    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 4):
        self.folder, self.nodes, self.cpus = folder, nodes, cpus
        outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SBATCH_", "SLURM")  # of a job that the tests run in
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        missing = [p for p in PROGRAMS if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
        assert not missing, f"{missing} are missing: .ci/run installs the Debian packages"
        assert os.geteuid() == 0, "the SLURM of the tests needs root, for the namespaces of its nodes"
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self) -> None:
        port, host = free_ports(self.nodes + 1), socket.gethostname().split(".")[0]
        text = CONF.format(
            folder=self.folder, nodes=self.nodes, cpus=self.cpus, host=host, port=port, first=port + 1,
            last=port + self.nodes,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{self.nodes}] Name=gpu File=/dev/tty[0-1]\n")
        # The GPUs are not real: a machine's own must not be used in their place.
        (self.folder / "prolog.sh").write_text("#!/bin/sh\necho export CUDA_VISIBLE_DEVICES=\n")
        (self.folder / "prolog.sh").chmod(0o755)
        names = "".join(f"127.0.1.{i} n{i}\n" for i in range(1, self.nodes + 1))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        socket_file = self.folder / "munge.sock"
        own = [f"--{x}={self.folder}/munged.{x.split('-')[0]}" for x in ("pid-file", "log-file", "seed-file")]
        self._start(
            "munged", ["munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}", *own]
        )
        wait_for("munged", 120, socket_file.exists, lambda: self.log("munged"))
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        wait_for(
            "slurmctld", 120, lambda: "UP" in self.run("scontrol", "ping", check=False), lambda: self.log("slurmctld")
        )
        for i in range(1, self.nodes + 1):
            self.start_node(i)
        wait_for("nodes", 120, lambda: self.idle() == self.nodes, lambda: self.log("slurmctld") + self.log("n1"))

    def __exit__(self, *_: object) -> None:
        for name in sorted(self.daemons, key=lambda n: n[0] != "n"):  # the nodes first, with all that runs there
            self.stop(name)

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent,
                env=self.env | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            )  # fmt: skip

    def stop(self, name: str) -> None:
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def start_node(self, i: int) -> None:
        """A machine n{i} that is switched on. Its first process is a shell, which also reaps."""
        inside = f"hostname n{i} && mount --bind {self.folder}/hosts /etc/hosts && slurmd -D -f {self.folder}/slurm.conf -N n{i}; :"
        spaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(f"n{i}", [*spaces, "sh", "-c", inside])

    def kill_node(self, i: int) -> None:
        """slurmd, its steps and their tasks vanish at one moment."""
        self.stop(f"n{i}")

    def idle(self) -> int:
        return len(set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()))

    def log(self, name: str, size: int = 3000) -> str:
        path = self.folder / f"{name}.out"
        return f"--- {name}\n{path.read_text(errors='replace')[-size:]}\n" if path.is_file() else ""

    # Jobs --------------------------------------------------------------------------------------------------------
    def run(self, *words: object, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """A client's output."""
        done = self.client(*words, cwd=cwd, **env)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def client(self, *words: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Clients may hang where a daemon is gone: bounded."""
        command = [str(w) for w in words]
        try:
            return subprocess.run(command, env=self.env | env, cwd=cwd, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired as error:
            return subprocess.CompletedProcess(command, 124, "", str(error))

    def sbatch(self, *words: object, cwd: Path | None = None, **env: str) -> str:
        """The id of a new job."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **env).strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``; of an array, its first task's. A controller that is busy is asked again."""
        deadline = time.monotonic() + 120
        while True:
            done = self.client("scontrol", "-o", "show", "job", job)
            if done.returncode == 0 and done.stdout.strip():
                return dict(re.findall(r"(\S+?)=(\S*)", done.stdout.splitlines()[0]))
            if "Invalid job id" in done.stderr:
                return {"JobState": "GONE"}
            if time.monotonic() > deadline:
                return {"JobState": "UNKNOWN"}
            time.sleep(0.5)

    def hosts(self, job: str, name: str) -> list[str]:
        """The field ``name`` of a job, NodeList or ExcNodeList, host by host; n[1,3] and n1,n3 are the same."""
        return self.run("scontrol", "show", "hostnames", self.job(job)[name]).split()

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def tasks(self, job: str, word: str = "megastar") -> list[Task]:
        """The Python processes that srun started for ``job``, an array's for all its jobs, by rank."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes()
                env = dict(x.split("=", 1) for x in (entry / "environ").read_text().split("\0") if "=" in x)
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except (OSError, ValueError):
                continue
            mine = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and "SLURM_STEP_ID" in env
            if mine and job in (env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_JOB_ID")) and word.encode() in words:
                pid = int(entry.name)
                if _is_python(pid) and not _is_python(int(stat[1])):  # not a child of a task
                    found.append(Task(pid, env["SLURM_JOB_ID"], int(env["SLURM_PROCID"]), env["SLURMD_NODENAME"]))
        return sorted(found, key=lambda t: (t.job, t.rank))


def _is_python(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("python")
    except OSError:
        return False
