"""MLflow as a place that a run also logs to: the server of MLFLOW_TRACKING_URI, else a database in RUN/mlflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# MLflow counts its users unless told not to, and waits minutes for a server that is away; a sink is tried again anyway.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # seconds
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
from mlflow import MlflowClient  # pyright: ignore[reportMissingImports] optional
from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

from boxwright.training.sinks import keep_id, kept_id

PARAMS = 100  # that MLflow takes at once
PARAM_LENGTH = 500  # characters that every version of MLflow takes
STOPPED = (75, 130)  # exit codes of a run that was asked to stop and may go on


class MLflow:
    """Logs numbers, options and pictures as one MLflow run, of the experiment MLFLOW_EXPERIMENT_NAME or boxwright."""

    def __init__(self) -> None:
        self._client: Any = None
        self._run_id = ""

    def start(self, run_folder: Path, run: Mapping[str, Any], total_steps: int) -> str:
        place = (run_folder / "mlflow").resolve()
        local = f"sqlite:///{(place / 'mlflow.db').as_posix()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or local
        self._client = MlflowClient(tracking_uri=uri)
        run_id = kept_id(place)
        if run_id and self._is_there(run_id):
            self._client.update_run(run_id, status="RUNNING")
        else:
            artifacts = (place / "artifacts").as_uri() if uri == local else None
            run_id = self._begin(run_folder.name, {**run, "total_steps": total_steps}, artifacts)
            keep_id(place, run_id)
        self._run_id = run_id
        if uri == local:
            return f"run {run_id}; mlflow ui --backend-store-uri {uri}"
        return f"run {run_id} at {uri.rpartition('@')[2]}"  # without a password

    def has(self, handed: Mapping[str, int]) -> Mapping[str, int]:
        return {metric.key: metric.step for metric in self._client.get_run(self._run_id).to_proto().data.metrics}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(name, v, now, step) for name, v in values.items()])

    def picture(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._run_id, str(path), f"{name}/{step:08}")

    def finish(self, exit_code: int) -> None:
        status = "FINISHED" if exit_code == 0 else "KILLED" if exit_code in STOPPED else "FAILED"
        self._client.set_terminated(self._run_id, status)

    def _is_there(self, run_id: str) -> bool:
        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # deleted, or begun on another server
                return False
            raise

    def _begin(self, name: str, described: Mapping[str, Any], artifacts: str | None) -> str:
        """A new MLflow run with its parameters."""
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "boxwright"
        experiment = self._client.get_experiment_by_name(title)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(title, artifacts)
        run_id: str = self._client.create_run(experiment_id, run_name=name).info.run_id
        params = [Param(key, str(value)[:PARAM_LENGTH]) for key, value in described.items()]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(run_id, params=params[start : start + PARAMS])
        return run_id
