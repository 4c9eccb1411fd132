"""MLflow: SQLite and artifacts in RUN/mlflow unless MLFLOW_TRACKING_URI names another store."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megastar.engine.metrics.trackers.tracker import PROJECT, TrackedRun, Tracker, as_text
from megastar.run_dir import events

FOLDER, DATABASE, ARTIFACTS = "mlflow", "mlflow.db", "artifacts"
MOST_TEXT = 5000  # characters of a tag
MOST_PARAMS = 100  # in one request


class MlflowTracker(Tracker):
    """Events are tags ``event.KIND`` (the newest of each kind), and at the end events.jsonl is an artifact."""

    def start(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for name in ("alembic", "mlflow"):  # they report each step of creating the database
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._folder, place = run.folder, (run.folder / FOLDER).resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            place.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{place / DATABASE}"
        self._client: Any = MlflowClient(uri)
        found = run.identity("mlflow", lambda: self._create(run, "" if uri != _local(place) else place.as_uri()))
        self._id = found["run_id"]
        self._client.update_run(self._id, status="RUNNING")
        known = self._client.get_run(self._id).data.params
        config = {name: as_text(value)[:MOST_TEXT] for name, value in run.config.items()}
        new = [Param(name, value) for name, value in config.items() if name not in known]
        for i in range(0, len(new), MOST_PARAMS):
            self._client.log_batch(self._id, params=new[i : i + MOST_PARAMS])
        for name, value in config.items():  # a parameter cannot change
            if known.get(name, value) != value:
                self._client.set_tag(self._id, f"resumed_with.{name}", value)

    def _create(self, run: TrackedRun, place: str) -> dict[str, str]:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        where = f"{place}/{ARTIFACTS}" if place else None
        number = experiment.experiment_id if experiment else self._client.create_experiment(name, where)
        return {"run_id": self._client.create_run(number, run_name=run.name).info.run_id}

    def row(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(k, float(v), now, step) for k, v in values.items()])

    def event(self, step: int, kind: str, text: str) -> None:
        self._client.set_tag(self._id, f"event.{kind}", f"step {step}: {text}"[:MOST_TEXT])

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        self._client.log_artifact(self._id, str(path), name)
        self._client.set_tag(self._id, f"{name}.{path.name}", caption[:MOST_TEXT])

    def finish(self, complete: bool) -> None:
        if (path := self._folder / events.NAME).is_file():
            self._client.log_artifact(self._id, str(path))
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


def _local(place: Path) -> str:
    return f"sqlite:///{place / DATABASE}"
