"""The manifests of deploy/kubernetes: reading, and validation against the published schemas without a network."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
JOBSET = json.loads((Path(__file__).parent / "jobset.json").read_text())


def read(name: str) -> dict[str, Any]:
    """The only object of deploy/kubernetes/``name``."""
    (found,) = yaml.safe_load_all((FOLDER / name).read_text())
    return found


@cache
def validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    """For ``kind``, such as job-batch-v1, of Kubernetes ``version``, such as 1.31. kubernetes_validate.validate parses these
    files at each call."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    schema, definitions = (json.loads((folder / f"{name}.json").read_text()) for name in (kind, "_definitions"))
    registry = Resource.from_contents(definitions) @ (Resource.from_contents(schema) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def validate(manifest: dict[str, Any], version: str) -> None:
    """Raises ``jsonschema.ValidationError`` for a manifest that Kubernetes ``version`` refuses, also for unknown fields.

    The package kubernetes-validate contains the schemas of Kubernetes. That of a JobSet is jobset.json; its Jobs are checked
    as Jobs.
    """
    api, kind = manifest["apiVersion"], manifest["kind"]
    if api.startswith("jobset.x-k8s.io/"):
        jsonschema.validate(manifest, JOBSET, jsonschema.Draft202012Validator)
        for replicated in manifest["spec"]["replicatedJobs"]:
            metadata = manifest["metadata"] | replicated["template"].get("metadata", {})  # the CRD does not describe it
            job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"], "metadata": metadata}
            validate(job, version)
    else:
        validator(f"{kind.lower()}-{api.replace('/', '-')}", version).validate(manifest)


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
