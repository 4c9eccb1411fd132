"""`megastar doctor`: each check, and how the results of many nodes are merged."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megastar import cli
from megastar.commands.doctor import table_of
from megastar.diagnosis import checks, links, node, packages
from megastar.diagnosis.checks import DoctorOptions, Report, combine
from megastar.diagnosis.finding import FAILURE, OK, WARNING, Answer, Finding, hung, merge, shortened, with_timeout
from megastar.diagnosis.rendezvous import master_address, missing_ranks
from megastar.errors import UserError
from megastar.parallel import gpus
from megastar.utils.hostname import shorten_dns_timeout

ROOT = Path(__file__).resolve().parents[3]


# Packages ----------------------------------------------------------------------------------------------------------
def test_versions_are_those_of_setup_and_constraints():
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "install_requires")
    assert dict(text.split(",")[0].split(">=") for text in ast.literal_eval(call.value)) == packages.REQUIRED
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert {p: pins[p] for p in packages.TESTED} == packages.TESTED


@pytest.mark.parametrize(
    ("package", "version", "level", "sentence"),
    [
        ("torch", None, FAILURE, "missing"),
        ("torch", "2.6.1+cu124", FAILURE, "2.6.1+cu124, older than 2.11"),
        ("torch", "2.11.0a0+git", OK, "2.11.0a0+git; the tests run with 2.13.0"),
        ("torch", "2.13.0+cu130", OK, "2.13.0+cu130"),
        ("deepspeed", "0.19.7", FAILURE, "0.19.7, older than 0.19.8"),
        ("deepspeed", "0.20.0", WARNING, "0.20.0; the tests run with 0.19.8"),
        ("numpy", "1.26.4", OK, "1.26.4"),
    ],
)
def test_a_package(package, version, level, sentence):
    (found,) = [f for f in packages.required(lambda p: version if p == package else "99") if f.name == package]
    assert (found.level, found.finding) == (level, sentence) and bool(found.remedy) == (level != OK)


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.13.0+cu130", (2, 13, 0)), ("2.11.0a0", (2, 11, 0)), ("1.0rc1", (1, 0)), ("x", ())]
)
def test_version_numbers(text, numbers):
    assert packages.numbers(text) == numbers


def test_apex_of_pypi_is_not_nvidias(tmp_path, monkeypatch):
    assert packages.apex(lambda p: None)[0].level == OK
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = packages.apex(lambda p: "0.9.10")
    assert found.level == WARNING and "0.9.10 is not NVIDIA's (no FusedAdam)" in found.finding


def test_the_compiler():
    assert packages.compiler("sh")[0].level == OK
    assert packages.compiler("no-such-compiler")[0].level == WARNING


def test_versions_must_be_equal():
    mine = packages.fingerprint()
    assert re.fullmatch(r"\d[\w.]* \([0-9a-f]{12}\)", mine["megastar"]) and mine["webdataset"]
    assert packages.versions_alike({"a": mine}) == []
    assert packages.versions_alike({"a": mine, "b": mine})[0].level == OK
    (found,) = packages.versions_alike({"a": mine, "b": mine | {"torch": "2.7.0"}, "c": mine})
    assert found[:3] == ("versions alike", FAILURE, f"torch: {mine['torch']} on a, c; 2.7.0 on b")


# A node ------------------------------------------------------------------------------------------------------------
def test_memory_limits_and_shared_memory(tmp_path):
    text = "MemTotal:       1000000 kB\nMemAvailable:  {} kB\nHugePages_Total:       0\n"
    assert node.memory(text.format(50000))[0].level == WARNING
    assert node.memory("MemTotal: 99000000 kB\nMemAvailable: 90000000 kB\n")[0][1:3] == (
        OK, "94 GiB, at least 90 % available",
    )  # fmt: skip
    none = tmp_path / "none"
    assert [f[:3] for f in node.limits(256, -1, none)] == [("open files", WARNING, "at most 256")]
    assert [f[:3] for f in node.limits(-1, 0, none)] == [("open files", OK, "unlimited")]
    (tmp_path / "ib" / "mlx5_0").mkdir(parents=True)
    assert [f.level for f in node.limits(4096, 65536, tmp_path / "ib")] == [OK, WARNING]
    assert [f.level for f in node.limits(4096, -1, tmp_path / "ib")] == [OK, OK]
    assert node.shared_memory(none)[0].level == WARNING
    assert node.memory() and node.cores() and node.limits() and node.shared_memory()


def test_name_lookup(monkeypatch):
    """In the form used by torch's store: an IPv4 address within IPv6."""
    lookups, now = [], [0.0]
    monkeypatch.setattr(node, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert node.name_lookup(lambda *args: lookups.append(args))[0].level == OK
    assert lookups == [(("::ffff:127.0.0.1", 0, 0, 0), socket.NI_NUMERICSERV)]

    def silent(*args):
        now[0] += 0.6
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    (found,) = node.name_lookup(silent)
    assert found.level == WARNING and found.finding == "looking up the name of 127.0.0.1 took 0.6 s" and found.remedy
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    (found,) = node.name_lookup()
    assert found.level == WARNING and found.finding.startswith("no such host does not resolve (")


@pytest.mark.parametrize(("theirs", "wanted"), [(None, "timeout:1 attempts:3"), ("ndots:2", "ndots:2")])
def test_dns_timeout_is_short(monkeypatch, theirs, wanted):
    monkeypatch.setenv("RES_OPTIONS", theirs or "")  # put back after the test
    if not theirs:
        del os.environ["RES_OPTIONS"]
    shorten_dns_timeout()
    assert os.environ["RES_OPTIONS"] == wanted


def test_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "ROOM", 0)
    monkeypatch.setattr(node, "SLOW_DISK", 0)
    (found,) = node.disk("run", tmp_path / "not" / "yet", 1 << 20)
    assert found.level == OK and re.search(r"writes \d+ MB/s, reads \d+ MB/s, \d+ GiB free", found.finding)
    assert list(tmp_path.iterdir()) == []  # nothing is left, nothing was made
    monkeypatch.setattr(node, "ROOM", 1 << 60)
    monkeypatch.setattr(node, "SLOW_DISK", 1e15)
    assert [f.finding.rpartition(": ")[2] for f in node.disk("run", tmp_path, 1 << 20)] == ["slow", "little space"]
    (tmp_path / "file").touch()
    (found,) = node.disk("run", tmp_path / "file", 1 << 20)
    assert found[:3] == ("run folder", FAILURE, f"{tmp_path / 'file'} is a file, not a folder")


def test_a_disk_without_write_permission():
    (found,) = node.disk("cache", Path("/proc/megastar"), 1 << 20)
    assert (found.name, found.level) == ("cache folder", FAILURE) and "cannot write to /proc (" in found.finding


def test_a_full_disk(tmp_path, monkeypatch):
    def full(path, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(node, "_speed", full)
    (found,) = node.disk("run", tmp_path)
    assert found[1:] == (FAILURE, f"cannot write to {tmp_path} (No space left on device)", "free some space")


def test_a_run_folder_that_is_not_shared(tmp_path):
    mark = Path(checks.make_mark(str(tmp_path / "run")))
    assert mark.parent == tmp_path and checks.is_shared(mark, 0)[0].level == OK
    mark.unlink()
    (found,) = checks.is_shared(mark, 0.2)
    assert found.level == FAILURE and f"{tmp_path} is not the same folder as on the node of rank 0" in found.finding
    threading.Timer(0.3, mark.touch).start()  # a network file system shows it later
    assert checks.is_shared(mark, 10)[0].level == OK


# Many nodes --------------------------------------------------------------------------------------------------------
def test_a_check_that_hangs_or_raises_is_a_failure():
    begun = time.monotonic()
    over = threading.Event()
    (found,) = with_timeout("disk", lambda: over.wait(60) and [], 0.2, "check it")
    assert time.monotonic() - begun < 10 and hung.pop() == "disk"
    over.set()
    assert found == ("disk", FAILURE, "no response within 0.2 s", "check it")

    def broken():
        raise ValueError("a\nb")

    def wrong():
        raise UserError("s3://x denies access: use credentials that may read it")

    assert with_timeout("a", broken, 10) == [("a", FAILURE, "ValueError: a b", "")]
    assert with_timeout("b", wrong, 10) == [("b", FAILURE, "s3://x denies access", "use credentials that may read it")]


def test_equal_results_are_shown_once():
    alike, slow = Finding("python", OK, "3.11"), Finding("disk", WARNING, "slow", "a faster one")
    answers = merge({"a": [alike, Finding("disk", OK, "fast")], "b": [alike, slow], "c": [alike, slow]})
    assert [(a.finding, a.nodes, a.everywhere) for a in answers] == [
        (alike, ["a", "b", "c"], True),
        (slow, ["b", "c"], False),
        (Finding("disk", OK, "fast"), ["a"], False),
    ]
    table = table_of(Report(["a", "b", "c"], 3, answers))
    assert [c.header for c in table.columns] == ["check", "", "nodes", "finding", "remedy"]
    assert [str(cell) for cell in table.columns[2].cells] == ["", "b, c", "a"]
    table = table_of(Report(["a", "b", "c"], 3, answers[:1]))
    assert [c.header for c in table.columns] == ["check", "", "finding"]


def test_a_few_of_many_ok_results_are_shown_and_every_problem():
    nodes = {f"n{i}": [Finding("disk", OK if i > 5 else WARNING, f"{i} MB/s")] for i in range(20)}
    shown = shortened(merge(nodes))
    assert [a.finding.level for a in shown] == [WARNING] * 6 + [OK] * 5
    assert shown[-1].finding.finding == "and 10 more, all OK (--json prints them)"


def test_missing_ranks_are_named():
    nodes = {0: "n1", 1: "n1", 2: "n2", 3: "n2"}
    assert missing_ranks(6, nodes, ["n1", "n2", "n3"]) == "ranks 4, 5 (n3)"
    assert missing_ranks(5, nodes, []) == "rank 4"


def test_master_address():
    assert master_address({"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "SLURM_JOB_ID": "7"}) == ("n1", 29500)
    assert master_address({"MASTER_ADDR": "n1", "SLURM_JOB_ID": "7"}) == ("n1", 20007)
    with pytest.raises(UserError, match="MASTER_ADDR is not set: start megastar doctor with torchrun or srun"):
        master_address({})


def test_clocks():
    good = {"a": [100.0, 101.0, 102.0], "b": [100.01, 101.0, 102.002]}
    assert [f.level for f in links.clock_findings(good)] == [OK]
    found = links.clock_findings(good | {"c": [98.0, 99.0, 100.0], "d": [400.0, 401.0, 402.0]})
    assert [f[:3] for f in found] == [
        ("clocks", FAILURE, "d: up to 300.0 s off the clock of a"),
        ("clocks", WARNING, "c: up to 2.0 s off the clock of a"),
    ]


def test_expected_bandwidth():
    assert gpus.gpu_model("NVIDIA H100 80GB HBM3") == "h100" and gpus.gpu_model("NVIDIA H100 PCIe") == "h100-pcie"
    assert gpus.gpu_model("NVIDIA GeForce RTX 4090") == "rtx4090" and gpus.gpu_model("Quadro") is None
    assert links.expected_bandwidth("h100", 8, 1, None) == pytest.approx(450e9 * 0.7)
    assert links.expected_bandwidth("h100", 16, 2, None) == pytest.approx(400e9 * 0.7)
    assert links.expected_bandwidth(None, 4, 2, 12.5e9) == pytest.approx(12.5e9 * 0.7)
    assert links.expected_bandwidth(None, 4, 1, 12.5e9) is None and links.expected_bandwidth(None, 4, 2, None) is None


def test_network_cards(tmp_path):
    for name, state, speed in (
        ("lo", "up", "99999"),
        ("eth0", "up", "10000"),
        ("eth1", "down", "100000"),
        ("br", "up", "-1"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(state + "\n")
        (tmp_path / name / "speed").write_text(speed + "\n")
    assert links.nic_bandwidth(tmp_path) == 10000e6 / 8
    assert links.nic_bandwidth(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("inside", "among", "levels"),
    [(330e9, 300e9, [OK, OK]), (120e9, 300e9, [WARNING, OK]), (330e9, 5e9, [OK, FAILURE])],
)
def test_bandwidth_findings(inside, among, levels):
    nodes = ["a"] * 2 + ["b"] * 2
    result = {"clock": [0.0], "among": among, "backend": "nccl", "gpu": "NVIDIA H100 80GB HBM3"}
    results = {i: result | {"inside": inside if n == "b" else 340e9} for i, n in enumerate(nodes)}
    found = [f for f in links.findings(results, nodes, None) if f.name != "clocks"]
    assert [f.name for f in found] == [links.INSIDE, links.AMONG] and [f.level for f in found] == levels
    assert "the slowest on b" in found[0].finding and "4 ranks on 2 nodes" in found[1].finding


def test_ranks_that_could_not_communicate_are_named():
    part = {"findings": [], "versions": {}, "gpus": [], "torch": {}, "problem": "", "network": None}
    nodes = {0: "a", 1: "b", 2: "c"}
    results = {0: {"problem": "DistError: timed out"}, 1: {"problem": "DistError: timed out"}}
    answers = combine(nodes, dict.fromkeys(nodes, part), [0, 1, 2], results, [])
    (found,) = [a.finding for a in answers if a.finding.level == FAILURE]
    assert found.finding == "all-reduce failed: rank 0 (a), 1 (b): DistError: timed out; rank 2 (c): no response"
    assert "NCCL_SOCKET_IFNAME" in found.remedy


# The command -------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_hung_check(monkeypatch):
    """The command would end this process if a check took longer than its time-out: fail instead."""

    def leave(status: int) -> None:
        raise AssertionError(f"a check has not ended: os._exit({status})")

    monkeypatch.setattr("megastar.commands.doctor.os._exit", leave)


@pytest.mark.usefixtures("no_hung_check")
def test_one_machine(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "run"), "--cache", str(tmp_path), "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    names = [c["name"] for c in report["checks"]]
    assert {"python", "torch", "apex", "flash-attn", "open files", "run folder", "cache folder", "links"} <= set(names)
    assert report["ranks"] == 1 and len(report["nodes"]) == 1
    assert report["ok"] == (not [c for c in report["checks"] if c["level"] == FAILURE])


@pytest.mark.usefixtures("no_hung_check")
def test_a_missing_package_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(packages.required, "__defaults__", (lambda p: None if p == "webdataset" else "99",))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"webdataset +│ failure +│ missing +│ pip install", out) and "1 failure" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--s3", "bucket/codes"], "bucket/codes: must have the form s3://bucket/prefix"),
        (["--patience", "0"], "'0' is not a number from 1 to 3600"),
        (["--run", "x"], "unrecognized arguments: --run"),
    ],
)
def test_wrong_usage(words, sentence, capsys):
    assert cli.main(["doctor", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_result_as_json():
    answer = Answer(Finding("a", OK, "b"), ["n"], True)
    assert answer.as_dict() == {
        "name": "a", "level": OK, "finding": "b", "remedy": "", "nodes": ["n"], "everywhere": True,
    }  # fmt: skip


def test_the_checks_of_a_node_survive_json():
    part = json.loads(json.dumps(checks.check_node(DoctorOptions(patience=30), True, "")))
    found = checks.node_findings(part, [])
    assert {"megastar", "GPUs", "torch", "memory"} <= {f.name for f in found}
    assert all(isinstance(f, Finding) and f.level in (OK, WARNING, FAILURE) for f in found)
