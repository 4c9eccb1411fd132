"""The manifests of deploy/kubernetes with pods that are processes: evicted, killed, refused, replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megastar.data.pretokenize.runner import pretokenize
from megastar.run_dir.events import read_events
from tests import forker
from tests.checkpoints import full_weights
from tests.integration.conftest import World, environment, megastar
from tests.integration.test_train import rows
from tests.kubernetes.manifests import read
from tests.kubernetes.pods import IndexedJob, edited
from tests.slurm.cluster import free_ports

pytestmark = [pytest.mark.dist, pytest.mark.long]
STEPS = 40
TRAIN = {"steps": STEPS, "save_every": 1000, "val_every": 0}


def training(config: Path, world: World) -> dict:
    arguments = {
        "--hosts=": ["--hosts=127.0.0.[1-2]", f"--port={free_ports(2)}"],
        "--nproc=": ["--nproc=1"],
        "configs/": [str(config)],
        "data.shards=": [f"data.shards={world.codes('train')}"],
        "data.val_shards=": [f"data.val_shards={world.codes('val')}"],
        "data.tokenizer=": [f"data.tokenizer={world.tokenizer}"],
        "data.cache=": ["data.cache=cache"],
    }
    env = {"OMP_NUM_THREADS": "1", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    return edited(read("train.yaml"), arguments, env, pods=2)


def step(run: Path) -> int:
    return max(rows(run), default=0) if (run / "metrics.jsonl").is_file() else 0


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory) -> Path:
    """The folder of the run that nothing happens to, of two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    megastar("train", world.write_config(folder / "run.yaml", folder / "run", **TRAIN), ranks=2)
    return folder / "run"


def test_evicted_training_pods_save_are_replaced_and_repeat_every_number(world, straight, tmp_path):
    """Two evictions: of pod 0, whose preStop signals it, and of pod 1 with SIGTERM alone. The pod that is not evicted ends
    with it, and the run of both is that of two ranks that nothing happens to, to the last bit. A new pod that reaches the old one
    before it has ended is replaced as well (status 85), so that a pod may end more than twice."""
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "elsewhere", **TRAIN)
    run = tmp_path / "runs/star_xl_50ep"  # as in the manifest
    with IndexedJob(training(config, world), tmp_path, environment(), tmp_path / "log") as job:
        for pod, hook in ((0, True), (1, False)):
            before = step(run)
            job.run(lambda before=before: step(run) >= before + 2)
            job.pods[pod].delete(disrupted=True, hook=hook)
            ended = len(job.ends)
            job.run(lambda ended=ended: {index for index, *_ in job.ends[ended:]} == {0, 1})
            assert step(run) < STEPS, "the run ended before the eviction: the test proves nothing"
        job.run()
        assert {(status, action) for _, status, action in job.ends[:-2]} == {(85, "Ignore")}, job.text()
        assert job.succeeded == {0, 1} and not job.failed and job.counted == 0, job.text()
    events = [e["event"] for e in read_events(run)]
    assert events.count("started") == 1 and events.count("resumed") == events.count("signal") == 2
    assert "lost" not in events and events[-1] == "finished"
    assert rows(run) == rows(straight)
    last = f"checkpoints/step-{STEPS:08d}"
    for kind in ("student", "ema"):
        a, b = (full_weights(folder / last, kind) for folder in (run, straight))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_bad_configuration_fails_the_job_without_a_restart(world, tmp_path):
    config = world.write_config(tmp_path / "run.yaml", tmp_path / "run", stepz=3)
    with IndexedJob(training(config, world), tmp_path, environment(), tmp_path / "log") as job:
        assert [pod.process.wait(300) for pod in job.pods.values()] == [2, 2], job.text()
        job.run()
    assert job.ends == [(0, 2, "FailJob"), (1, 2, "FailJob")] and job.failed == "PodFailurePolicy"
    assert "stepz" in job.text() and "Traceback" not in job.text()


def test_pretokenize_pods_one_of_which_is_killed_write_the_shards_of_one_process(world, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "data/imagenet256/train"  # the second as in the manifest
    pretokenize(world.pictures, "train", world.tokenizer, alone, shard_size=2, workers=1, console=Console(quiet=True))
    arguments = {
        "data/ILSVRC2012_img_train.tar": [str(world.pictures), "--subset=train"],
        "--tokenizer=": [f"--tokenizer={world.tokenizer}"],
        "--crops=": [],
        "--shard-size=": ["--shard-size=2"],
        "--dtype=": [],
        "--workers=": ["--workers=1"],
    }
    manifest = edited(read("pretokenize.yaml"), arguments, {"OMP_NUM_THREADS": "1"}, pods=2)
    with IndexedJob(manifest, tmp_path, environment(), tmp_path / "log") as job:
        job.run(lambda: list(out.glob(".progress/*.claim")) or not job.pods)
        job.pods[0].kill()  # out of memory
        job.run(lambda: job.ends)
        assert job.ends[0] == (0, 137, "Count")
        job.run()
    assert job.succeeded == {0, 1} and job.counted == 1, job.text()
    assert contents(out) == contents(alone) and len(contents(out)) > 14


def test_sampling_pods_one_of_which_is_evicted_write_the_images_of_one_process(world, straight, tmp_path):
    options = ["--count=80", "--batch=2"]
    npz = tmp_path / "samples/star_xl_50ep.npz"  # as in the manifest
    (tmp_path / "samples").mkdir()
    alone = tmp_path / "alone.npz"
    words = ["sample", str(straight), f"--tokenizer={world.tokenizer}", *options, "--cfg-scale=1", f"--npz={alone}"]
    words.append(f"--out={tmp_path}/alone.png")
    assert forker.run(["-m", "megastar", *words], environment()).returncode == 0
    arguments = {
        "runs/": [str(straight)],
        "--tokenizer=": [f"--tokenizer={world.tokenizer}"],
        "--count=": options,
    }
    manifest = edited(read("sample.yaml"), arguments, {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}, pods=2)
    with IndexedJob(manifest, tmp_path, environment(), tmp_path / "log") as job:
        job.run(lambda: os.path.isdir(f"{npz}.parts"))
        job.pods[0].process.send_signal(signal.SIGSTOP)  # else it may make the images of both, and end first
        job.pods[1].delete(disrupted=True)
        job.run(lambda: job.ends)
        job.pods[0].process.send_signal(signal.SIGCONT)
        job.run()
    assert job.ends[0] == (1, 143, "Ignore") and job.succeeded == {0, 1} and not job.counted, job.text()
    assert npz.read_bytes() == alone.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
