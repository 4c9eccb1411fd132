"""The manifests of deploy/kubernetes: reading, and validation against the published schemas without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
JOBSET = json.loads((Path(__file__).parent / "jobset.json").read_text())


def read(name: str) -> dict[str, Any]:
    """The only object of deploy/kubernetes/``name``."""
    (found,) = yaml.safe_load_all((FOLDER / name).read_text())
    return found


def validate(manifest: dict[str, Any], version: str) -> None:
    """Raises ``jsonschema.ValidationError`` for a manifest that Kubernetes ``version`` refuses, also for unknown fields.

    The package kubernetes-validate contains the schemas of Kubernetes. That of a JobSet is jobset.json; its Jobs are checked
    as Jobs.
    """
    if manifest["apiVersion"].startswith("jobset.x-k8s.io/"):
        jsonschema.validate(manifest, JOBSET, jsonschema.Draft202012Validator)
        for replicated in manifest["spec"]["replicatedJobs"]:
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
            validate(job | replicated["template"], version)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The spec of the manifest's Job."""
    if manifest["kind"] == "JobSet":
        (replicated,) = manifest["spec"]["replicatedJobs"]
        return replicated["template"]["spec"]
    return manifest["spec"]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return job_of(manifest)["template"]["spec"]


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(manifest)["containers"]
    return container
