"""A run whose S3 goes away: it ends behind its last whole step, whatever ended the waiting, and loses no number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megastar.run_dir import checkpoint_dir
from megastar.run_dir.events import open_situations, read_events
from megastar.run_dir.status import status_of
from tests.integration.conftest import ROOT, environment, megastar
from tests.integration.helpers.s3 import client_of
from tests.integration.test_train import rows
from tests.unit.data.shards.test_shards import T, V, write_set

pytestmark = [pytest.mark.dist, pytest.mark.long]

STEPS = 60  # of 8 samples: five epochs
SHARDS = (12,) * 8


def write_config(path: Path, run: Path, shards: str, cache: Path, gib: float) -> Path:
    """Two blocks with dropout; one shard at a time, and a cache of two and a half."""
    path.write_text(f"""
run: {run}
model: {{name: tiny, n_layer: 2, n_head: 2, dim: 32, multiple_of: 16, vocab_size: {V}, num_classes: 4, image_tokens: {T}}}
data: {{shards: {shards}, window: 1, cache: {cache}, cache_gib: {gib}}}
self_guided: {{contrastive_block: 1, projector_dim: 16, teacher_decay: 0.9}}
optim: {{lr: 0.003, scale_lr: false, warmup_steps: 2}}
train: {{global_batch: 8, micro_batch: 2, steps: {STEPS}, dtype: fp32, log_every: 1, save_every: 1000}}
""")
    return path


class Run:
    """`megastar train --nproc 2` in the background, in a session of its own."""

    def __init__(self, config: Path, run: Path, *words: str):
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megastar", "train", str(config), "--nproc", "2", *words], cwd=ROOT,
            env=environment(), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def steps(self) -> int:
        return max(rows(self.run), default=0) if (self.run / "metrics.jsonl").is_file() else 0

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while self.steps() < step:
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()[0][-4000:]
            time.sleep(0.02)

    def wait_for_stall(self) -> int:
        """Until no step was done for two seconds; how many are."""
        seen, since = self.steps(), time.monotonic()
        while time.monotonic() - since < 2:
            time.sleep(0.1)
            if (now := self.steps()) != seen:
                seen, since = now, time.monotonic()
        assert self.process.poll() is None
        return seen

    def end(self) -> str:
        try:
            return self.process.communicate(timeout=60)[0]
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def waiting_for_data(run: Path) -> list[dict]:
    return [e for e in open_situations(read_events(run)) if e["situation"] == "data"]  # a rank may be "slow" as well


def saved(run: Path) -> int:
    found = checkpoint_dir.latest(run / "checkpoints")
    assert found is not None
    checkpoint_dir.verify(found)
    return int(found.name.removeprefix("step-"))


def test_an_outage_ends_the_run_behind_its_last_step_and_costs_no_number(weed, use_s3, tmp_path):
    use_s3(weed.endpoint)
    folder = write_set(tmp_path / "codes", SHARDS)
    client, bucket = client_of(weed.endpoint), "codes"
    for path in folder.iterdir():
        client.upload_file(str(path), bucket, f"outage/{path.name}")
    gib = 2.5 * (folder / "shard-00000.tar").stat().st_size / 2**30
    url, run = f"s3://{bucket}/outage", tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", run, url, tmp_path / "cache", gib)
    try:
        # Longer than data.patience.
        first = Run(config, run, "data.patience=3")
        first.wait_for_step(3)
        weed.kill()
        out = first.end()
        done = first.steps()
        assert first.process.returncode == 2, out[-4000:]
        assert f"{url}/shard-0000" in out and f" from {weed.endpoint} for" in out
        assert "(data.patience = 3), last error: " in out and "Traceback" not in out
        assert out.count("megastar: error:") == 1 and f"no batch for step {done + 1}: saved" in out
        assert 3 <= done < STEPS - 20 and saved(run) == done

        # A signal while both ranks wait.
        weed.start()
        second = Run(config, run)
        second.wait_for_step(done + 3)
        weed.kill()
        at = second.wait_for_stall()
        until = time.monotonic() + 60
        while not (lasting := waiting_for_data(run)) and time.monotonic() < until:
            time.sleep(0.2)
        (waits,) = lasting
        assert f"for its batch of step {at + 1}" in waits["text"] and f"{url}/shard-0000" in waits["text"]
        assert any(waits["text"] in line for line in status_of(run).health)
        os.kill(second.process.pid, signal.SIGTERM)
        asked = time.monotonic()
        out = second.end()
        assert time.monotonic() - asked < 20
        assert second.process.returncode == 128 + signal.SIGTERM and "while waiting for data: saved" in out, out[-4000:]
        assert done < at < STEPS and saved(run) == at == second.steps()
    finally:
        if weed.process is None:
            weed.start()
    # The same shards from another place, to the end; other ones are refused.
    other = write_set(tmp_path / "other", (11, *SHARDS[1:]))
    refused = megastar("train", config, f"data.shards={other}", check=False)
    assert refused.returncode == 2 and f"data.shards = {other} holds different shards than" in refused.stderr
    megastar("train", config, f"data.shards={folder}", ranks=2)
    straight = write_config(tmp_path / "straight.yaml", tmp_path / "straight", str(folder), tmp_path / "cache", gib)
    megastar("train", straight, ranks=2)
    assert rows(run) == rows(tmp_path / "straight") and len(rows(run)) == STEPS
