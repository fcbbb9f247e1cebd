"""Systems beside TensorBoard that follow a run: Weights & Biases (log_wandb.py) and MLflow (log_mlflow.py).

Each is a class with `scalars(step, values)`, `pictures(step, {name: JPEG file})` and `end(state)`, an identity `run_id`
and a description `place`. A thread calls them, so that a slow network does not slow down training, and their errors do
not end it. The file trackers.json of the run directory has the identities, so that a resumed run continues the same
ones.
"""

import contextlib
import importlib.util
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError, describe_error, logger, write_json
from config import Config
from log_mlflow import MlflowRun
from log_wandb import WandbRun

__all__ = ["FILE", "Trackers", "check_trackers", "tracking"]

FILE = "trackers.json"
TRACKERS: dict[str, Any] = {"TRAIN.WANDB": WandbRun, "TRAIN.MLFLOW": MlflowRun}
PACKAGES = {"TRAIN.WANDB": "wandb", "TRAIN.MLFLOW": "mlflow"}
MOST_WAITING = 1000  # messages; more are dropped, as when a server does not answer for hours
END_SECONDS = 90.0  # how long the end of a run waits for what was not sent yet


def check_trackers(cfg: Config) -> None:
    """Raises UserError, before expensive work, for a setting that needs a package which is not installed."""
    for key, package in PACKAGES.items():
        if cfg.get(key) and not _installed(package):
            raise UserError(f"setting {key}={cfg.get(key)}: run `pip install {package}`, or leave the setting out")
    if cfg.TRAIN.MLFLOW and not all(cfg.TRAIN.MLFLOW.rpartition("/")):
        raise UserError(f"setting TRAIN.MLFLOW={cfg.TRAIN.MLFLOW}: must be URI/experiment")


def _installed(package: str) -> bool:
    """Whether there is a package; a mere folder of that name, as W&B leaves it where it was used, is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


class Trackers:
    """Passes what is logged to {setting: tracker} in a thread. With none it does nothing."""

    def __init__(self, trackers: dict[str, Any], patience: float = END_SECONDS):
        self._trackers, self._patience = trackers, patience
        self._messages: queue.Queue[tuple[str, tuple]] = queue.Queue(MOST_WAITING)
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        if trackers:
            self._thread.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._put("scalars", step, dict(values))

    def pictures(self, step: int, files: dict[str, Path]) -> None:
        self._put("pictures", step, dict(files))

    def end(self, state: str) -> None:
        """state: finished, stopped (by a signal) or failed."""
        if not self._trackers:
            return
        with contextlib.suppress(queue.Full):
            self._messages.put(("end", (state,)), timeout=self._patience)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            logger.warning(f"{', '.join(self._trackers)}: not everything was sent in {self._patience:g} s")

    def _put(self, *message: Any) -> None:
        if self._trackers:
            with contextlib.suppress(queue.Full):
                self._messages.put_nowait((message[0], message[1:]))

    def _work(self) -> None:
        kind = ""
        while kind != "end":
            kind, values = self._messages.get()
            for key, tracker in self._trackers.items():
                try:
                    getattr(tracker, kind)(*values)
                except Exception as e:  # whatever a client of a network service raises
                    if key not in self._warned:
                        self._warned.add(key)
                        logger.warning(f"{key}: {describe_error(e)}; the run goes on, later errors are not shown")


@contextlib.contextmanager
def tracking(cfg: Config, logdir: Path, chief: bool) -> Iterator[Trackers]:
    """Starts the trackers of the settings on the first rank, and tells them at the end how it came."""
    trackers = Trackers(_started(cfg, logdir) if chief else {})
    state = "failed"
    try:
        yield trackers
        state = "finished"
    except BaseException as e:
        state = "stopped" if hasattr(e, "signal_number") else "failed"
        raise
    finally:
        trackers.end(state)


def _started(cfg: Config, logdir: Path) -> dict[str, Any]:
    """{setting: tracker}. What cannot be reached ends a new run, which its user watches; a continued one goes on."""
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((logdir / FILE).read_text())
    trackers: dict[str, Any] = {}
    for key, start in TRACKERS.items():
        target = cfg.get(key)
        if not target:
            continue
        before = known.get(key) or {}
        run_id = before.get("run") if before.get("target") == target else None
        try:
            tracker = start(target, logdir, cfg.to_dict(), run_id)
        except Exception as e:
            if run_id is None:
                raise UserError(f"setting {key}={target}: {describe_error(e)}") from None
            logger.warning(f"{key}={target}: {describe_error(e)}; the run goes on without it")
            continue
        trackers[key] = tracker
        known[key] = {"target": target, "run": tracker.run_id}
        logger.info(f"{key}: {tracker.place}")
    if trackers:
        write_json(logdir / FILE, known, indent=1)
    return trackers
