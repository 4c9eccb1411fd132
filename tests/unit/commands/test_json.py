"""--json: the documented keys, and nothing else on standard output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from megastar.commands._shared.json_output import SCORE_KEYS, DoctorReport, PlanReport, SetReport, as_line
from megastar.run_dir.status import Status

ROOT = Path(__file__).resolve().parents[3]
OLD = ROOT / "tests" / "data" / "run_v0_1_0"
KEYS = {  # command -> its keys
    "status": [f.name for f in fields(Status)],
    "plan": [f.name for f in fields(PlanReport)],
    "doctor": [f.name for f in fields(DoctorReport)],
    "data inspect": [f.name for f in fields(SetReport)],
    "evaluate": [*SCORE_KEYS],
}


def run(*words: object, status: int = 0, code: str = "") -> tuple[str, str]:
    """Standard output and error; ``code`` runs in the process first."""
    program = f"{code}\nfrom megastar.cli import program\nprogram({[str(w) for w in words]!r})"
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout, done.stderr


def documented() -> dict[str, list[str]]:
    """command -> the keys in the table of docs/command_line.md, without those in brackets."""
    rows = re.findall(r"(?m)^\| `(.*?)` \| .*? \| (.*) \|$", (ROOT / "docs" / "command_line.md").read_text())
    return {
        re.match(r"(data inspect|\w+)", command)[1]: re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", keys))
        for command, keys in rows
    }


def test_the_documented_keys_are_those_of_the_code():
    assert documented() == KEYS


def test_plan():
    out, _ = run("plan", "b", "--gpus", "8", "--json")
    assert [*json.loads(out)] == KEYS["plan"] and json.loads(out)["machine"]["gpu"]["memory"] == 80
    out, err = run("plan", "3b", "--gpus", "1", "--memory", "10", "--json", status=1)
    assert json.loads(out)["recommended"] is None
    assert run("plan", "3b", "--gpu", "a100", "--json", status=2)[0] == ""


def test_status(tmp_path):
    (tmp_path / "config.yaml").write_bytes((OLD / "zero1" / "config.yaml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": "inf", "step_s": 1.0}\n')
    out, _ = run("status", tmp_path, OLD / "zero1", "--json")
    first, second = map(json.loads, out.splitlines())
    assert [*first] == [*second] == KEYS["status"] and first["loss"] == "inf" and second["step"] == 4
    out, err = run("status", OLD / "zero1", tmp_path / "none", "--json", status=2)
    assert [*json.loads(out)] == KEYS["status"] and "is not a folder" in err


def test_data_inspect():
    out, _ = run("data", "inspect", OLD / "shards" / "train", "--json", "--samples", "2")
    found = json.loads(out)
    assert [*found] == KEYS["data inspect"] and len(found["first"]) == 2 and found["shards"] == 3
    assert run("data", "inspect", "nowhere", "--json", status=2)[0] == ""


def test_doctor(tmp_path):
    """A library that prints in the meantime prints to standard error."""
    code = (
        "from megastar.diagnosis import checks\nhonest = checks.check_node\n"
        "def noisy(*a):\n    import os\n    print('by print'); os.write(1, b'by a library\\n'); os.system('echo by a child')\n"
        "    return honest(*a)\nchecks.check_node = noisy"
    )
    environ_status = subprocess.run([sys.executable, "-m", "megastar", "doctor", "-q"], cwd=ROOT, capture_output=True)
    out, err = run("doctor", "--json", status=environ_status.returncode, code=code)
    found = json.loads(out)
    assert [*found] == KEYS["doctor"] and [*found["checks"][0]] == ["name", "level", "finding", "remedy", "nodes", "everywhere"]  # fmt: skip
    assert all(text in err for text in ("by print", "by a library", "by a child"))


def test_evaluate(tmp_path):
    (tmp_path / "my_features.py").write_text(
        "import torch\ndef mean(x):\n    print('by print')\n    return x.float().mean((2, 3))[:, :2] + torch.rand(len(x), 2)\n"
    )
    rng = np.random.default_rng(0)
    for name in ("made", "real"):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, 255, (48, 8, 8, 3), dtype=np.uint8))
    words = ("evaluate", tmp_path / "made.npz", "--real", tmp_path / "real.npz", "--allow-few", "--device", "cpu")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    more = ("--features", "my_features:mean", "--out", tmp_path / "scores.json", "--json")
    out, err = run(*words, *more, code=code)
    found = json.loads(out)
    assert set(KEYS["evaluate"]) <= found.keys() and "by print" in err
    assert found == json.loads((tmp_path / "scores.json").read_text()) and "my_features:mean" in err  # the table


@pytest.mark.parametrize(("value", "text"), [(float("nan"), '"nan"'), (float("-inf"), '"-inf"'), (1.5, "1.5")])
def test_json_has_no_nan(value, text):
    assert as_line({"a": [value, {"b": (value,)}]}) == f'{{"a": [{text}, {{"b": [{text}]}}]}}'
