"""The manifests of deploy/kubernetes: valid by the published schemas, and by rules that no schema contains."""

from __future__ import annotations

import copy
import re

import jsonschema
import kubernetes_validate.utils
import pytest

from megastar.cli import COMMANDS
from megastar.config.load import load_config
from megastar.engine.exit_codes import PREEMPTED
from megastar.utils.hostname import expand_hosts
from tests.kubernetes.manifests import FOLDER, JOBSET, container_of, job_of, pod_of, read, validate

LATEST = kubernetes_validate.utils.major_minor(kubernetes_validate.utils.latest_version())
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))
JOBS = ("pretokenize.yaml", "sample.yaml", "train.yaml")
PAGE = (FOLDER.parents[1] / "docs" / "kubernetes.md").read_text()


@pytest.mark.parametrize("version", ["1.31", LATEST])
@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_is_valid(name, version):
    assert sorted([*JOBS, "pvc.yaml"]) == NAMES
    validate(read(name), version)


def places(value: object, path: tuple = ()):  # -> (path of a mapping, its key)
    """Every field of a manifest."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from places(item, (*path, i))


FREE = {"labels", "annotations", "limits", "requests"}  # mappings with any keys


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_field_is_an_error_wherever_it_is(name):
    manifest = read(name)
    fields = [(path, key) for path, key in places(manifest) if not FREE & {*path}]
    assert len(fields) > 5
    for path, key in fields:
        wrong = copy.deepcopy(manifest)
        at = wrong
        for step in path:
            at = at[step]
        at[f"{key}x"] = at.pop(key)
        with pytest.raises((jsonschema.ValidationError, KeyError, FileNotFoundError)):
            validate(wrong, LATEST)
            pytest.fail(f"{path} {key}x is accepted")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s["failurePolicy"].update(maxRestarts="10"), "is not of type 'integer'"),
        (lambda s: s["failurePolicy"]["rules"][0].update(action="FailJob"), "is not one of"),
        (lambda s: s["failurePolicy"]["rules"][0].pop("name"), "'name' is a required property"),
        (lambda s: s["replicatedJobs"][0]["template"]["spec"].update(completions="two"), "is not of type"),
    ],
)
def test_a_wrong_value_in_a_jobset_is_an_error(change, problem):
    manifest = read("train.yaml")
    change(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError, match=problem):
        validate(manifest, LATEST)


def test_the_reduced_schema_names_its_source_and_licence():
    assert "kubernetes-sigs/jobset" in JOBSET["$comment"] and "Apache License 2.0" in JOBSET["$comment"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_restarts_what_was_stopped_and_fails_after_a_user_error(name):
    manifest = read(name)
    job, pod, container = job_of(manifest), pod_of(manifest), container_of(manifest)
    assert pod["restartPolicy"] == "Never" and job["podReplacementPolicy"] == "Failed"  # as podFailurePolicy requires
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    failed, stopped, disrupted = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in (failed, stopped, disrupted)] == ["FailJob", "Ignore", "Ignore"]
    assert failed["onExitCodes"]["values"] == [2] and {**failed["onExitCodes"], "values": 0} == {
        **stopped["onExitCodes"],
        "values": 0,
    }
    codes = stopped["onExitCodes"]
    assert codes["containerName"] == container["name"] and codes["values"] == sorted(set(codes["values"]))
    assert codes["values"] == ([PREEMPTED, 128 + 10, 128 + 15] if name == "train.yaml" else [128 + 15])
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_is_not_privileged_and_has_what_it_mounts(name):
    manifest = read(name)
    pod, container = pod_of(manifest), container_of(manifest)
    assert pod["securityContext"]["runAsUser"] == 1000 and pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch" and not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [read("pvc.yaml")["metadata"]["name"]]
    assert (
        "command" not in container and container["args"][0] in COMMANDS
    )  # the image's entry point is tini and megastar
    text = (FOLDER / name).read_text()
    assert not re.search(r"(?i)secret_?access|password|AKIA|kind: Secret", text)
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "user-queue"}


def test_the_places_that_give_the_number_of_pods_agree():
    train = read("train.yaml")
    words = dict(word.split("=", 1) for word in container_of(train)["args"] if word.startswith("--"))
    pods = job_of(train)["completions"]
    name, (replicated,) = train["metadata"]["name"], train["spec"]["replicatedJobs"]
    assert words["--nodes"] == f"{pods}:{pods}" and words["--index"] == "$(JOB_COMPLETION_INDEX)"
    expected = [f"{name}-{replicated['name']}-0-{i}.{name}" for i in range(pods)]
    assert expand_hosts(words["--hosts"]) == tuple(expected)
    assert int(words["--nproc"]) == container_of(train)["resources"]["limits"]["nvidia.com/gpu"]
    text = (FOLDER / "train.yaml").read_text()
    assert (
        len(re.findall(r"# pods\b", text)) == 4
        and len(re.findall(r"# pods\b", (FOLDER / "sample.yaml").read_text())) == 3
    )
    sample = read("sample.yaml")
    (world,) = [v["value"] for v in container_of(sample)["env"] if v["name"] == "WORLD_SIZE"]
    assert int(world) == job_of(sample)["completions"]


def test_the_save_fits_into_the_grace_period():
    train = read("train.yaml")
    command = container_of(train)["lifecycle"]["preStop"]["exec"]["command"]
    waits = int(re.fullmatch(r"kill -USR1 1; sleep (\d+)", command[-1])[1])
    grace = pod_of(train)["terminationGracePeriodSeconds"]
    assert 120 < waits <= grace - 30  # USR1_GRACE; SHORT_GRACE after SIGTERM
    for value in (waits, grace):
        assert f" {value}" in PAGE


def test_the_configuration_of_the_training_is_valid():
    words = container_of(read("train.yaml"))["args"]
    (config,) = [word for word in words if word.startswith("configs/")]
    cfg = load_config(config, [word for word in words if "=" in word and not word.startswith("--")])
    assert cfg.data.cache == "/cache" and cfg.run in container_of(read("sample.yaml"))["args"]
