"""Pods of an Indexed Job as processes of this machine, started, stopped and replaced as the manifest says.

What a process notices of Kubernetes is reproduced: arguments and environment of the container (``$(NAME)``, the downward API's
completion index, JOB_COMPLETION_INDEX), the working directory as the volume, preStop, SIGTERM and SIGKILL after the grace
period, and the Job controller's podFailurePolicy, backoffLimit and replacement of pods. Not reproduced: the network (pods
have loopback addresses), limits, images, JobSet's restarts.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.kubernetes.manifests import ROOT, container_of, job_of, pod_of

INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
PATIENCE = 600.0


def edited(manifest: dict[str, Any], arguments: dict[str, list[str]], env: dict[str, str], pods: int) -> dict[str, Any]:
    """The manifest as a user edits it: the only argument that begins with a key becomes the words of its value."""
    result = copy.deepcopy(manifest)
    container = container_of(result)
    for beginning, words in arguments.items():
        (at,) = [i for i, word in enumerate(container["args"]) if word.startswith(beginning)]
        container["args"][at : at + 1] = words
    for name, value in env.items():
        (variable,) = [v for v in container["env"] if v["name"] == name]
        variable["value"] = value
    job = job_of(result)
    job["completions"] = job["parallelism"] = pods
    return result


def entry_point() -> list[str]:
    """The image's entry point on this machine: tini, which only passes signals on, is left out."""
    dockerfile = (ROOT / "deploy" / "container" / "Dockerfile").read_text()
    tini, dashes, *command = json.loads(re.search(r"(?m)^ENTRYPOINT (\[.*\])$", dockerfile)[1])
    assert (tini, dashes, command) == ("tini", "--", ["megastar"])
    return [sys.executable, "-m", "megastar"]


class Pod:
    def __init__(self, manifest: dict[str, Any], index: int, workspace: Path, environment: dict[str, str], log: Path):
        self.index, self.log = index, log
        self.spec, self.container = pod_of(manifest), container_of(manifest)
        variables: dict[str, str] = {}
        for v in self.container["env"]:
            if "valueFrom" in v:
                assert v["valueFrom"] == {"fieldRef": {"fieldPath": INDEX}}
                variables[v["name"]] = str(index)
            else:
                variables[v["name"]] = re.sub(r"\$\(([A-Z_]+)\)", lambda m: variables[m[1]], v["value"])
        variables["JOB_COMPLETION_INDEX"] = str(index)  # appended by the Job controller
        words = [re.sub(r"\$\(([A-Z_]+)\)", lambda m: variables[m[1]], w) for w in self.container["args"]]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*entry_point(), *words], cwd=workspace, env=environment | variables, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.hook: subprocess.Popen | None = None
        self.deleted_at = 0.0
        self.disrupted = self.terminated = False

    def delete(self, *, disrupted: bool = False, hook: bool = True) -> None:
        """Begin to end the pod, as the kubelet does: preStop, SIGTERM, after the grace period SIGKILL."""
        if self.process.poll() is not None:
            return
        self.disrupted, self.deleted_at = self.disrupted or disrupted, time.monotonic()
        command = (
            self.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command") if hook else None
        )
        if command:
            shell, option, script = command
            assert (shell, option) == ("sh", "-c")
            mine = re.sub(r"\bkill -USR1 1\b", f"kill -USR1 {self.process.pid}", script)  # process 1 of the container
            assert mine != script
            self.hook = subprocess.Popen(["sh", "-c", mine], start_new_session=True)

    def poll(self) -> int | None:
        """The exit status of the container, None while it runs."""
        status = self.process.poll()
        if status is None and self.deleted_at:
            if not self.terminated and (self.hook is None or self.hook.poll() is not None):
                self.process.terminate()
                self.terminated = True
            if time.monotonic() - self.deleted_at > self.spec["terminationGracePeriodSeconds"]:
                self.kill()
        if status is not None and self.hook is not None and self.hook.poll() is None:
            os.killpg(self.hook.pid, signal.SIGKILL)  # it ends with the container
            self.hook.wait()
        return None if status is None else status if status >= 0 else 128 - status

    def kill(self) -> None:
        """All processes of the container at once."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for victim in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    victim.kill()


class IndexedJob:
    """The Job of ``manifest``; ``ends``: (index, exit status, action) of each pod that ended, in order."""

    def __init__(self, manifest: dict[str, Any], workspace: Path, environment: dict[str, str], log: Path):
        self.manifest, self.job = manifest, job_of(manifest)
        self.start = lambda index: Pod(manifest, index, workspace, environment, log)
        self.log = log
        self.pods: dict[int, Pod] = {}
        self.succeeded: set[int] = set()
        self.ends: list[tuple[int, int, str]] = []
        self.counted = 0
        self.failed = ""  # the reason of the Job's condition Failed
        assert self.job["completionMode"] == "Indexed" and pod_of(manifest)["restartPolicy"] == "Never"

    def __enter__(self) -> IndexedJob:
        self.pods = {index: self.start(index) for index in range(self.job["completions"])}
        return self

    def __exit__(self, *_: object) -> None:
        for pod in self.pods.values():
            pod.kill()
            pod.process.wait()
            pod.poll()

    def action(self, pod: Pod, status: int) -> str:
        for rule in self.job["podFailurePolicy"]["rules"]:
            codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
            if codes:
                assert codes["operator"] == "In" and codes["containerName"] == pod.container["name"]
                matches = status in codes["values"]
            else:
                matches = pod.disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions
            if matches:
                return rule["action"]
        return "Count"

    def poll(self) -> None:
        for index, pod in list(self.pods.items()):
            if (status := pod.poll()) is None:
                continue
            del self.pods[index]
            if status == 0:
                self.succeeded.add(index)
                self.ends.append((index, 0, "Succeeded"))
                continue
            action = self.action(pod, status)
            self.ends.append((index, status, action))
            self.counted += action == "Count"
            if action == "FailJob" or self.counted > self.job["backoffLimit"]:
                self.failed = self.failed or ("PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded")
                for other in self.pods.values():
                    other.delete()
            if not self.failed:
                self.pods[index] = self.start(index)

    def run(self, until: Callable[[], object] | None = None) -> None:
        """Until ``until()`` is true; without it, until all pods have ended."""
        deadline = time.monotonic() + PATIENCE
        while self.pods and not (until and until()):
            self.poll()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        assert until is None or until(), self.text()

    def text(self) -> str:
        return f"{self.ends}\n{self.log.read_text(errors='replace')[-6000:]}"
