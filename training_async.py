"""Evaluations in a process of their own while training goes on (TEST.ASYNC).

The training process starts a new Python interpreter for each evaluation, with the settings and a checkpoint's path on
its standard input; it evaluates as the training process would and returns the scores. One evaluation runs at a time and
one waits; a newer one takes the place of the one that waits. The process dies with its parent.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from common import UserError, describe_error, installed_gpus, logger, new_process_code, visible_gpus
from config import Config, default_config, finalize_config
from dataset import load_validation_splits
from run_start import weight_loader
from training_pictures import evaluation_pictures
from utils.checkpoint import is_model_tensor, load_weights, without_averages

__all__ = ["AsyncEvaluations", "Outcome", "check_device"]

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
_PRIORITY = 19  # the lowest: it gets the time that training leaves
LOG_NAME = "evaluation.log"


class Outcome(NamedTuple):
    """How an evaluation ended."""

    step: int
    seconds: float
    metrics: dict[str, float] | None  # None: it failed
    problem: str = ""


class _Running(NamedTuple):
    step: int
    process: subprocess.Popen
    result: IO[bytes]
    started: float


def check_device(cfg: Config) -> None:
    """Raises UserError if TEST.ASYNC_DEVICE names a GPU that training uses or that is not there."""
    number = cfg.TEST.ASYNC_DEVICE
    if not cfg.TEST.ASYNC or number == "cpu":
        return
    installed = installed_gpus()
    if number >= installed:
        raise UserError(f"setting TEST.ASYNC_DEVICE={number}: this machine has {installed} GPUs; the first is 0")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(installed)] if visible is None else [v.strip() for v in visible.split(",")]
    if str(number) in names[: visible_gpus()]:
        free = ",".join(n for n in names if n != str(number))
        raise UserError(
            f"setting TEST.ASYNC_DEVICE={number}: this run trains on that GPU; leave it out, e.g. with "
            f"CUDA_VISIBLE_DEVICES={free}, or use TEST.ASYNC_DEVICE=cpu"
        )


class AsyncEvaluations:
    """The evaluation that runs and the one that waits. All methods return at once, except `wait`."""

    def __init__(self, cfg: Config, logdir: Path):
        self._cfg, self._logdir = cfg, logdir
        self._running: _Running | None = None
        self._waiting: int | None = None

    def submit(self, step: int) -> int | None:
        """Evaluates the checkpoint of this step as soon as possible; returns the step that will not be evaluated
        because this one takes its place."""
        skipped, self._waiting = self._waiting, step
        self._start_next()
        return skipped

    @property
    def busy(self) -> bool:
        return self._running is not None

    def poll(self) -> Outcome | None:
        """The outcome of an evaluation that has ended since the last call; the next one is started."""
        run = self._running
        if run is None or run.process.poll() is None:
            return None
        self._running = None
        outcome = self._outcome(run)
        self._start_next()
        return outcome

    def stop(self) -> None:
        """Ends the evaluation that runs, without its scores."""
        if self._running is not None:
            self._running.process.kill()
            self._running.process.wait()
            self._running.result.close()
        self._running = self._waiting = None

    def _start_next(self) -> None:
        if self._running is not None or self._waiting is None:
            return
        step, self._waiting = self._waiting, None
        task = {"settings": self._cfg.to_dict(), "checkpoint": str((self._logdir / f"model-{step}").absolute())}
        result = tempfile.TemporaryFile()  # noqa: SIM115  closed when the evaluation has ended
        code = new_process_code(__name__, f"_run({result.fileno()}, {os.getpid()})")
        with tempfile.TemporaryFile() as given, open(self._logdir / LOG_NAME, "w") as log:
            given.write(json.dumps(task).encode())
            given.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=given,
                stdout=log,
                stderr=log,
                pass_fds=(result.fileno(),),
                env=_environment(self._cfg),
                start_new_session=True,  # Ctrl-C in the terminal is the training process's business
            )
        self._running = _Running(step, process, result, time.monotonic())
        device, threads = self._cfg.TEST.ASYNC_DEVICE, self._cfg.TEST.ASYNC_THREADS
        where = "the CPU" if device == "cpu" else f"GPU {device}"
        where += f" with {threads} threads" if threads else ""
        logger.info(
            f"evaluating step {step} in process {process.pid} on {where}; its output is in {self._logdir / LOG_NAME}"
        )

    def _outcome(self, run: _Running) -> Outcome:
        seconds = time.monotonic() - run.started
        with run.result as f:
            f.seek(0)
            content = f.read()
        found: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            found = json.loads(content)
        if "metrics" in found:
            return Outcome(run.step, seconds, found["metrics"])
        code = run.process.returncode
        ended = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with code {code}"
        return Outcome(run.step, seconds, None, found.get("error") or f"{ended}, see {self._logdir / LOG_NAME}")


def _environment(cfg: Config) -> dict[str, str]:
    """That of this process, for another one that computes alone on the device of the settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_")}
    device = cfg.TEST.ASYNC_DEVICE
    environment["CUDA_VISIBLE_DEVICES"] = "-1" if device == "cpu" else str(device)
    if cfg.TEST.ASYNC_THREADS is not None:
        threads = str(cfg.TEST.ASYNC_THREADS)
        environment |= dict.fromkeys(
            ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads
        )
    return environment


# ------------------------------------------------------------------------------------------------ the other process
def _run(result: int, parent: int) -> None:
    """The whole of the other process: reads its task, writes {metrics} or {error} to the descriptor `result`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    os.nice(_PRIORITY)
    task = json.load(sys.stdin)
    with _written_to(result) as answer:
        cfg = finalize_config(default_config().update_from_dict(task["settings"], "settings of the run"))
        answer["metrics"] = _evaluate_checkpoint(cfg, task["checkpoint"])


@contextlib.contextmanager
def _written_to(result: int) -> Iterator[dict[str, Any]]:
    answer: dict[str, Any] = {}
    try:
        yield answer
    except UserError as e:
        answer["error"] = str(e)
    except Exception as e:  # the training process names it in one line
        traceback.print_exc()
        answer["error"] = describe_error(e)
    with open(result, "w") as f:
        json.dump(answer, f)
    os._exit(0 if "metrics" in answer else 1)  # TensorFlow's threads need no farewell


def _evaluate_checkpoint(cfg: Config, prefix: str) -> dict[str, float]:
    """The scores of a checkpoint, as an evaluation in the training process would give them."""
    from inference import start_session
    from predict import evaluation_builder
    from utils.tf_v1 import tf

    weights, _ = without_averages(load_weights(prefix, is_model_tensor)[0], cfg.TEST.USE_EMA)
    splits = load_validation_splits(cfg)
    with tf.Graph().as_default() as graph:
        evaluate = evaluation_builder(cfg, splits, ["/cpu:0"], 0, 1, reuse=False)()
        logdir, step = Path(prefix).parent, int(prefix.rsplit("-", 1)[1])
        show = evaluation_pictures(logdir, step, cfg)
        return evaluate(start_session(graph, weight_loader(weights, prefix)), on_results=show)
