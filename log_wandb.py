"""Weights & Biases (TRAIN.WANDB): a run's scalars, settings and pictures there. With WANDB_MODE=offline they stay in
the run directory until `wandb sync` sends them."""

import math
from pathlib import Path
from typing import Any

__all__ = ["WandbRun"]

FINISH_SECONDS = 60  # how long the end of a run may wait for what is still on its way


class WandbRun:
    """A run at Weights & Biases; see training_trackers.py for the methods."""

    def __init__(self, target: str, logdir: Path, settings: dict[str, Any], run_id: str | None):
        """target: a project, or entity/project; run_id: the run that is continued."""
        import wandb

        entity, _, project = target.rpartition("/")
        self._wandb = wandb
        self._run = wandb.init(
            project=project, entity=entity or None, name=logdir.absolute().name, dir=str(logdir), config=settings,
            id=run_id, resume="allow" if run_id else None,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS),
        )  # fmt: skip
        # Own steps: after --resume some come again, which W&B's counter does not allow.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.run_id: str = self._run.id
        self.place = f"{self._run.dir} (offline)" if self._run.offline else str(self._run.url)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **{k: v for k, v in values.items() if math.isfinite(v)}})

    def pictures(self, step: int, files: dict[str, Path]) -> None:
        shown = {f"pictures/{name}": self._wandb.Image(str(path)) for name, path in files.items()}
        self._run.log({"step": step, **shown})

    def end(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "finished" else 1)
