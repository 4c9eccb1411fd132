"""`megastar doctor` with processes that act as nodes, and with a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from megastar.diagnosis import node
from megastar.diagnosis.finding import FAILURE, OK, WARNING, with_timeout
from tests.integration.conftest import ROOT, environment, megastar
from tests.integration.helpers.s3 import client_of
from tests.slurm.cluster import free_ports

pytestmark = pytest.mark.long


class Ranks:
    """Processes of one launch, each with its own node name; killed at the end of the block."""

    def __init__(self, world: int):
        self.port, self.world, self.processes = free_ports(1), world, []

    def start(self, rank: int, *command: str, **environ: str) -> subprocess.Popen:
        place = {"RANK": rank, "WORLD_SIZE": self.world, "LOCAL_RANK": 0, "SLURMD_NODENAME": f"node{rank}"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        env = environment() | {k: str(v) for k, v in place.items()} | environ
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )  # fmt: skip
        self.processes.append(process)
        return process

    def doctor(self, rank: int, *words: object, **environ: str) -> subprocess.Popen:
        return self.start(rank, sys.executable, "-m", "megastar", "doctor", *map(str, words), **environ)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def report(process: subprocess.Popen) -> tuple[dict, dict[str, list[dict]]]:
    """Rank 0's JSON, and its checks by name."""
    out, err = process.communicate(timeout=120)
    assert out, err[-3000:]
    result = json.loads(out)
    checks: dict[str, list[dict]] = {}
    for check in result["checks"]:
        checks.setdefault(check["name"], []).append(check)
    return result, checks


@pytest.mark.dist
def test_two_nodes_that_differ(tmp_path):
    """The second has a broken driver and an old webdataset."""
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 18\n")
    broken.chmod(0o755)
    other = tmp_path / "site" / "webdataset-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.1\n")
    with Ranks(2) as ranks:
        first = ranks.doctor(0, tmp_path / "run", "--json", "--patience", 30)
        path = {"PATH": f"{broken.parent}:{os.environ['PATH']}", "PYTHONPATH": f"{other.parent}:{ROOT}"}
        second = ranks.doctor(1, tmp_path / "run", "--json", "--patience", 30, **path)
        result, checks = report(first)
        out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, ""), err[-3000:]
    assert first.returncode == 1 and result["nodes"] == ["node0", "node1"] and not result["ok"]
    assert [c["level"] for c in checks["nodes"]] == [OK]
    (driver,) = checks["driver"]
    assert (driver["level"], driver["nodes"]) == (FAILURE, ["node1"])
    assert driver["finding"] == "nvidia-smi failed with status 18 (Failed to initialize NVML)"
    assert [(c["level"], c["nodes"]) for c in checks["webdataset"]] == [(FAILURE, ["node1"]), (OK, ["node0"])]
    (versions,) = checks["versions alike"]
    assert versions["level"] == FAILURE and versions["finding"].endswith("0.1 on node1")
    assert [c["level"] for c in checks["clocks"]] == [OK] and checks["python"][0]["everywhere"]
    (among,) = checks["all-reduce of all"]
    assert "gloo, 2 ranks on 2 nodes" in among["finding"] and "GB/s" in among["finding"]
    assert [c["level"] for c in checks["run folder shared"]] == [OK]
    assert not list(tmp_path.rglob(".megastar-doctor*"))


@pytest.mark.dist
def test_a_node_that_never_joins_and_one_that_hangs_are_named(tmp_path):
    hangs = "import os, time\nfrom megastar.diagnosis.rendezvous import Rendezvous\n"
    hangs += "r = Rendezvous(1, 3, 60)\nr.send('hello', r.node)\ntime.sleep(600)\n"
    with Ranks(3) as ranks:
        ranks.start(1, sys.executable, "-c", hangs)
        first = ranks.doctor(0, "--json", "--patience", 10)
        result, checks = report(first)
    assert first.returncode == 1 and result["nodes"] == ["node0", "node1"]
    assert [c["finding"] for c in checks["nodes"]] == [
        "rank 2 did not start, or cannot reach node0, within 10 s",
        "rank 1 on node1: no response within 10 s",
    ]
    assert checks["python"][0]["nodes"] == ["node0"] and "links" not in checks


@pytest.mark.dist
def test_a_rank_that_cannot_reach_rank_0():
    with Ranks(2) as ranks:
        alone = ranks.doctor(1, "--patience", 2)
        out, err = alone.communicate(timeout=60)
    assert alone.returncode == 2 and not out
    assert f"node1: no connection to rank 0 at 127.0.0.1:{ranks.port} within 2 s" in err


@pytest.mark.dist
def test_under_torchrun(tmp_path):
    done = megastar("doctor", tmp_path, "--json", "--patience", 60, ranks=2)
    result = json.loads(done.stdout)
    names = [c["name"] for c in result["checks"]]
    assert result["ok"] and result["ranks"] == 2 and len(result["nodes"]) == 1
    assert "all-reduce in a node" in names and "all-reduce of all" not in names and names.count("torch") == 1


# S3 ----------------------------------------------------------------------------------------------------------------
def test_s3_read(s3, use_s3, monkeypatch):
    client = client_of(s3)
    client.put_object(Bucket="codes", Key="doctor/small", Body=b"x" * 10)
    client.put_object(Bucket="codes", Key="doctor/large", Body=np.random.default_rng(0).bytes(3 << 20))
    use_s3(s3)
    (found,) = node.s3_read("s3://codes/doctor")
    assert found.level == OK and "2 objects, listed in" in found.finding and "a range of 3.15 MB at" in found.finding
    monkeypatch.setattr(node, "SLOW_S3", 1e15)
    (found,) = node.s3_read("s3://codes/doctor", sample=1 << 20)
    assert found.level == WARNING and "a range of 1.05 MB at" in found.finding and found.remedy
    (found,) = node.s3_read("s3://codes/nothing-here")
    assert (found.level, found.finding) == (
        WARNING,
        "s3://codes/nothing-here can be listed, but contains no object to read",
    )


def test_s3_rights(s3, use_s3):
    use_s3(s3)
    assert node.s3_write("s3://runs/doctor")[0].level == OK
    assert "Contents" not in client_of(s3).list_objects_v2(Bucket="runs", Prefix="doctor")
    (found,) = with_timeout("S3", lambda: node.s3_read("s3://no-such-bucket/x"), 60)
    assert found.level == FAILURE and "bucket no-such-bucket of s3://no-such-bucket/x/ does not exist" in found.finding
    assert found.remedy.startswith("correct the URL")
    use_s3(s3, keys=False)
    for check, url in ((node.s3_read, "s3://codes/doctor"), (node.s3_write, "s3://runs/doctor")):
        (found,) = with_timeout("S3", lambda check=check, url=url: check(url), 60)
        assert found.level == FAILURE and "denies access to" in found.finding
        assert found.remedy == "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def test_no_s3_server(use_s3):
    use_s3(f"http://127.0.0.1:{free_ports(1)}")
    (found,) = with_timeout("S3", lambda: node.s3_read("s3://codes/x"), 60)
    assert (found.level, found.remedy) == (FAILURE, "check that it is up") and "Could not connect" in found.finding
