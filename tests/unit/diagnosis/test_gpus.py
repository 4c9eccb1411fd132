"""What `megastar doctor` reads from nvidia-smi; the tables have its format."""

from __future__ import annotations

import pytest

from megastar.diagnosis import gpus
from megastar.diagnosis.finding import FAILURE, OK, WARNING

# nvidia-smi --query-gpu=... --format=csv,nounits
HEAD = (
    "index, uuid, name, driver_version, memory.total [MiB], memory.used [MiB], ecc.mode.current, "
    "ecc.errors.corrected.volatile.total, ecc.errors.uncorrected.volatile.total, "
    "ecc.errors.uncorrected.aggregate.total, retired_pages.pending, temperature.gpu, clocks_throttle_reasons.hw_slowdown\n"
)
H100 = "{0}, GPU-{0}a, NVIDIA H100 80GB HBM3, 570.86.15, 81559, {1}, Enabled, {2}, {3}, {4}, [N/A], {5}, {6}\n"
GOOD = HEAD + "".join(H100.format(i, 4, 0, 0, 0, 31, "Not Active") for i in range(8))
TORCH = {"cuda": "13.0", "count": 8, "why": ""}


def one(text, name, torch=TORCH):
    """The findings of one name for the GPUs in ``text``."""
    return [tuple(f) for f in gpus.findings(gpus.parse_csv(text), torch) if f.name == name]


def bad(used=4, corrected=0, uncorrected=0, ever=0, degrees=31, slow="Not Active"):
    return HEAD + H100.format(3, used, corrected, uncorrected, ever, degrees, slow)


def test_good_gpus():
    found = gpus.findings(gpus.parse_csv(GOOD), TORCH)
    assert [(f.name, f.level, f.finding) for f in found] == [
        ("driver", OK, "570.86.15; torch uses CUDA 13.0"),
        ("GPUs", OK, "8 x NVIDIA H100 80GB HBM3 (80 GiB)"),
        ("GPU memory", OK, "at least 100% free"),
        ("ECC", OK, "enabled, no errors"),
        ("GPU clocks", OK, "not throttled"),
    ]


@pytest.mark.parametrize(
    ("text", "name", "level", "sentence"),
    [
        (bad(uncorrected=2, ever=2), "ECC", FAILURE, "GPU 3: 2 uncorrected memory errors since the driver was loaded"),
        (bad(ever=1), "ECC", WARNING, "GPU 3: 1 uncorrected memory errors over its lifetime"),
        (bad(corrected=5000), "ECC", WARNING, "GPU 3: 5000 corrected memory errors"),
        (bad().replace("[N/A]", "Yes"), "ECC", WARNING, "GPU 3: memory pages pending retirement"),
        (bad().replace("Enabled", "Disabled"), "ECC", WARNING, "disabled: memory errors are not detected"),
        (bad(used=40000), "GPU memory", WARNING, "GPU 3 39.1 of 80 GiB used"),
        (bad(degrees=93), "GPU clocks", WARNING, "GPU 3 is at 93 degrees C"),
        (bad(slow="Active"), "GPU clocks", WARNING, "GPU 3 is throttled (hardware slowdown)"),
        (
            GOOD + "8, GPU-8a, NVIDIA A100-SXM4-80GB, 570.86.15, 81920, 4, Enabled, 0, 0, 0, No, 30, Not Active\n",
            "GPUs", WARNING, "8 x NVIDIA H100 80GB HBM3 (80 GiB), 1 x NVIDIA A100-SXM4-80GB (80 GiB): the slowest one limits the throughput",
        ),
    ],
)  # fmt: skip
def test_bad_gpus(text, name, level, sentence):
    ((_, found, finding, remedy),) = one(text, name)
    assert (found, finding) == (level, sentence) and remedy


def test_a_gpu_with_unsupported_fields():
    row = "0, GPU-1, NVIDIA GeForce RTX 4090, 550.54, 24564, 300, [N/A], [N/A], [N/A], [N/A], [N/A], 40, [Not Supported]\n"
    assert gpus.parse_csv(HEAD + row)[0] == {
        "index": "0", "uuid": "GPU-1", "name": "NVIDIA GeForce RTX 4090", "driver_version": "550.54",
        "memory.total": "24564", "memory.used": "300", "temperature.gpu": "40",
    }  # fmt: skip
    assert one(HEAD + row, "ECC") == [("ECC", OK, "not supported by these GPUs", "")]
    assert gpus.parse_csv("") == [] and gpus.parse_csv(HEAD) == []


def test_torch_that_cannot_use_the_gpus():
    (found,) = one(GOOD, "driver", {"cuda": "", "count": 0, "why": ""})
    assert found[1:3] == (FAILURE, "570.86.15; torch is a CPU build and cannot use the GPUs")
    (found,) = one(GOOD, "driver", {"cuda": "13.0", "count": 0, "why": "driver too old"})
    assert found[1:3] == (FAILURE, "570.86.15; torch (CUDA 13.0) sees no GPU (driver too old)")


def test_allocated_gpus_are_missing(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    monkeypatch.delenv("SLURM_STEP_GPUS", raising=False)
    assert gpus.findings([], {})[0].level == OK
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    assert gpus.findings([], {})[0][:3] == ("GPUs", FAILURE, "SLURM allocated GPUs, nvidia-smi lists none")


def test_gpus_that_only_torch_finds_are_named(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_GPUS", raising=False)
    monkeypatch.delenv("SLURM_STEP_GPUS", raising=False)
    rows = [{"name": "NVIDIA H200", "memory.total": str(139 * 1024)}] * 2
    (found,) = gpus.findings([], {"cuda": "13.0", "count": 2, "rows": rows, "why": ""})
    assert found.level == WARNING and found.finding.startswith(
        "2 x NVIDIA H200 (139 GiB), according to torch: nvidia-smi"
    )


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that is a shell script."""

    def write(script):
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/bin:/usr/bin")

    return write


def test_a_field_that_this_nvidia_smi_lacks_is_left_out(smi):
    smi(
        'case "$1" in *retired*) echo \'Field "retired_pages.pending" is not a valid field to query.\'; exit 2;; esac\n'
        'echo "index, memory.total [MiB]"; echo "0, 81559"; echo "$1" >&2'
    )
    assert gpus.parse_csv(gpus.query()) == [{"index": "0", "memory.total": "81559"}]


@pytest.mark.parametrize(
    ("script", "seconds", "sentence"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9",
            60,
            "nvidia-smi failed with status 9 (NVIDIA-SMI has",
        ),
        ("exec sleep 60", 0.5, r"nvidia-smi failed \(TimeoutExpired\)"),
    ],
)
def test_a_driver_that_is_broken(smi, script, seconds, sentence):
    smi(script)
    with pytest.raises(gpus.NvidiaSmiError, match=sentence.replace("9 (", r"9 \(")) as error:
        gpus.query(seconds)
    (found,) = gpus.findings([], {}, str(error.value))
    assert (found.name, found.level) == ("driver", FAILURE) and found.remedy


def test_ranks_that_see_their_own_gpu_alone():
    rows = [
        gpus.parse_csv(HEAD + H100.format(0, 4, 0, 0, 0, 31, "Active").replace("GPU-0a", f"GPU-{i}")) for i in range(3)
    ]
    assert [r["uuid"] for r in gpus.merge_rows([*rows, rows[0]])] == ["GPU-0", "GPU-1", "GPU-2"]
