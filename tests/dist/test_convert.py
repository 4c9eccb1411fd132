"""What `megastar convert` writes, read by what it is for: DeepSpeed's universal loader, and a run that resumes."""

from __future__ import annotations

import json

import pytest

from megastar.checkpoint.convert import convert
from tests.checkpoints import write_checkpoint
from tests.dist.reference import config
from tests.dist.test_engine import launch


@pytest.mark.dist
def test_deepspeed_loads_the_universal_folder(tmp_path):
    write_checkpoint(tmp_path / "run", config(data={"shards": "codes"}), 2, 2)
    convert(tmp_path / "run", "universal", tmp_path / "universal")
    done = launch(2, "tests/dist/workers/universal_worker.py", str(tmp_path / "universal"))
    for stage, tensor in ((3, 1), (1, 1), (2, 1), (3, 2), (1, 2)):
        assert done.stdout.count(f"equal: stage {stage}, {tensor} tensor ranks") == 2, done.stdout


@pytest.mark.dist
def test_a_run_resumes_a_resliced_checkpoint_as_its_source(tmp_path):
    """Losses are equal to the last digit, dropout's generators included, at stages that cut elsewhere too."""
    write_checkpoint(tmp_path / "source", config(data={"shards": "codes"}), 4, 1)
    convert(tmp_path / "source", "checkpoint", tmp_path / "cut", data=1, tensor=2)
    cases = []
    for stage, tensor in (("3", 2), ("1", 2), ("3", 1)):
        for resume in ("source", "cut"):
            changes = {"model": {"token_dropout_p": 0.1}, "parallel": {"deepspeed": f"configs/ds/zero{stage}.json"}}
            name = f"{stage}-{tensor}-{resume}"
            cases.append({"name": name, "changes": changes, "tensor": tensor, "resume": resume})
    launch(2, "tests/dist/workers/engine_worker.py", str(tmp_path), json.dumps(cases))
    for case in cases[::2]:
        one, other = (json.loads((tmp_path / f"{case['name'][:4]}{r}.json").read_text()) for r in ("source", "cut"))
        assert one["done"] == 3 and one["history"] == other["history"], case["name"]
