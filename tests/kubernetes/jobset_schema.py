"""Reduce JobSet's CRD (823 kB) to the schema that the tests use:

    python -m tests.kubernetes.jobset_schema jobset.x-k8s.io_jobsets.yaml COMMIT > tests/kubernetes/jobset.json

The CRD is config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of https://github.com/kubernetes-sigs/jobset. Descriptions,
the status and the Job inside the JobSet are left out: the Job is checked with Kubernetes' own schema (manifests.py). Unknown
fields become errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

COMMENT = (
    "Derived from config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of https://github.com/kubernetes-sigs/jobset, "
    "commit {}, Copyright The Kubernetes Authors, Apache License 2.0; reduced by tests/kubernetes/jobset_schema.py"
)


def strict(schema: Any) -> Any:
    """Without descriptions and extensions of Kubernetes; objects with known fields have no others."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if isinstance(kept.get("description"), str):
        del kept["description"]
    if isinstance(kept.get("properties"), dict) and "type" in kept:
        kept.setdefault("additionalProperties", False)
    return kept


def reduce(crd: dict[str, Any], commit: str) -> dict[str, Any]:
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    del schema["properties"]["status"]
    template = schema["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]["template"]
    template["properties"]["spec"] = {"type": "object"}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return {"$comment": COMMENT.format(commit), **schema}


if __name__ == "__main__":
    print(json.dumps(reduce(yaml.safe_load(Path(sys.argv[1]).read_text()), sys.argv[2]), indent=1, sort_keys=True))
