"""MLflow (TRAIN.MLFLOW): a run's scalars, settings and pictures in an experiment of a tracking server or database."""

import math
import posixpath
import re
import time
from pathlib import Path
from typing import Any

__all__ = ["MlflowRun"]

# Limits of MLflow's requests and values.
MOST_METRICS, MOST_PARAMETERS, LONGEST_VALUE = 1000, 100, 500
STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRun:
    """A run in MLflow; see training_trackers.py for the methods."""

    def __init__(self, target: str, logdir: Path, settings: dict[str, Any], run_id: str | None):
        """target: tracking URI/experiment; run_id: the run that is continued."""
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri, _, experiment = target.rpartition("/")
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
        else:
            run_id = self._client.create_run(
                self._experiment(uri, experiment), run_name=logdir.absolute().name
            ).info.run_id
            parameters = [Param(k, str(v)[:LONGEST_VALUE]) for k, v in settings.items()]
            for start in range(0, len(parameters), MOST_PARAMETERS):
                self._client.log_batch(run_id, params=parameters[start : start + MOST_PARAMETERS])
        self.run_id: str = run_id
        self.place = f"run {run_id} of {uri}, experiment {experiment}"

    def _experiment(self, uri: str, name: str) -> str:
        """The experiment's id; a new one of a local database has its files beside that, not in the working folder."""
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return known.experiment_id
        place = None
        if uri.startswith("sqlite:///"):
            place = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / name).as_uri()
        return self._client.create_experiment(name, artifact_location=place)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(_name(k), v, now, step) for k, v in values.items() if math.isfinite(v)]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + MOST_METRICS])

    def pictures(self, step: int, files: dict[str, Path]) -> None:
        for path in files.values():  # their names hold the step
            self._client.log_artifact(self.run_id, str(path), "pictures")

    def end(self, state: str) -> None:
        self._client.set_terminated(self.run_id, STATES[state])


def _name(key: str) -> str:
    """A metric's name of the characters that MLflow allows; others, as in names of classes, by their number."""
    return posixpath.normpath(re.sub(r"[^A-Za-z0-9_\-. /]", lambda m: f"_{ord(m.group()):x}", key))
