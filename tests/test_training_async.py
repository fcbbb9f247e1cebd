"""The process that evaluates while training goes on: its queue, its failures, its end."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
import training_async
from common import UserError
from config import default_config, finalize_config
from training_async import AsyncEvaluations, check_device

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent


def patched(body):
    """In place of `new_process_code`: the other process as it is, with this in place of an evaluation."""
    start = f"import os, sys, time; sys.path[:] = {[str(ROOT), *sys.path]!r}; import training_async"
    return lambda module, call: "\n".join([start, body, f"{module}.{call}"])


def settings(*changes):
    return finalize_config(default_config().update_args(["TEST.ASYNC=True", *changes]))


def evaluating(monkeypatch, *lines):
    body = "\n".join(["def evaluate(cfg, prefix):", *(f"    {line}" for line in lines)])
    body += "\ntraining_async._evaluate_checkpoint = evaluate"
    monkeypatch.setattr(training_async, "new_process_code", patched(body))


def wait(evaluations):
    deadline = time.monotonic() + 120
    while (outcome := evaluations.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return outcome


def test_one_evaluation_runs_and_the_newest_waits(tmp_path, monkeypatch):
    gate = tmp_path / "open"
    lines = [
        f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)",
        "return {'step': int(prefix.split('-')[-1])}",
    ]
    evaluating(monkeypatch, *lines)
    evaluations = AsyncEvaluations(settings(), tmp_path)
    assert [evaluations.submit(step) for step in (10, 20, 30, 40)] == [None, None, 20, 30]
    assert evaluations.poll() is None and evaluations.busy
    gate.touch()
    outcomes = [wait(evaluations), wait(evaluations)]
    assert [(o.step, o.metrics) for o in outcomes] == [(10, {"step": 10}), (40, {"step": 40})]
    assert not evaluations.busy and evaluations.poll() is None


def test_numbers_arrive_as_they_are_and_settings_as_they_were_given(tmp_path, monkeypatch):
    evaluating(
        monkeypatch,
        "return {'a': 1 / 3, 'b': float('nan'), 'edge': cfg.PREPROC.TEST_SHORT_EDGE_SIZE, 'nice': os.nice(0),",
        "        'gpus': int(os.environ['CUDA_VISIBLE_DEVICES']),",
        "        'threads': int(os.environ['TF_NUM_INTRAOP_THREADS'])}",
    )
    evaluations = AsyncEvaluations(settings("PREPROC.TEST_SHORT_EDGE_SIZE=123", "TEST.ASYNC_THREADS=3"), tmp_path)
    evaluations.submit(1)
    metrics = wait(evaluations).metrics
    assert metrics.pop("b") != metrics.get("b")
    assert metrics == {"a": 1 / 3, "edge": 123, "nice": 19, "gpus": -1, "threads": 3}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("raise training_async.UserError('image 7 is gone')", "image 7 is gone"),
        ("raise ZeroDivisionError('no images')", "ZeroDivisionError: no images (<string>:3)"),
        ("os._exit(3)", "its process ended with code 3, see .*evaluation.log"),
        ("os.kill(os.getpid(), 9)", "it was killed by SIGKILL, see .*evaluation.log"),
    ],
)
def test_a_failure_is_one_line(tmp_path, monkeypatch, line, problem):
    evaluating(monkeypatch, line)
    evaluations = AsyncEvaluations(settings(), tmp_path)
    evaluations.submit(5)
    outcome = wait(evaluations)
    assert outcome.metrics is None and outcome.step == 5
    assert re.fullmatch(problem.replace("(", r"\(").replace(")", r"\)"), outcome.problem)
    evaluations.submit(6)  # the next one is tried all the same
    assert wait(evaluations).step == 6


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["stop", "killed"])
def test_it_ends_with_its_parent(tmp_path, how):
    body = "def evaluate(cfg, prefix):\n    open('started', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    body += "training_async._evaluate_checkpoint = evaluate"
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import training_async
from config import default_config, finalize_config
training_async.new_process_code = lambda module, call: {patched(body)("training_async", "")!r} + call
evaluations = training_async.AsyncEvaluations(finalize_config(default_config()), Path("."))
evaluations.submit(1)
while not Path("started").exists() or not Path("started").read_text():
    time.sleep(0.01)
if {how!r} == "stop":
    evaluations.stop()
print("ready", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        child = int((tmp_path / "started").read_text())
        if how == "killed":
            assert is_running(child)
            os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while is_running(child):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        parent.kill()


def test_a_gpu_that_trains_or_does_not_exist_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "_NVIDIA_GPUS", tmp_path)
    for n in range(3):
        (tmp_path / str(n)).mkdir()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    check_device(settings("TEST.ASYNC_DEVICE=2"))
    check_device(settings("TEST.ASYNC_DEVICE=cpu"))
    with pytest.raises(UserError, match="TEST.ASYNC_DEVICE=3: this machine has 3 GPUs"):
        check_device(settings("TEST.ASYNC_DEVICE=3"))
    with pytest.raises(UserError, match="trains on that GPU; leave it out, e.g. with CUDA_VISIBLE_DEVICES=0, or use"):
        check_device(settings("TEST.ASYNC_DEVICE=1"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=0,1, or use"):
        check_device(settings("TEST.ASYNC_DEVICE=2"))


def test_a_process_of_a_job_does_not_pass_its_rank_on(monkeypatch):
    monkeypatch.setenv("HOROVOD_RANK", "0")
    environment = training_async._environment(settings("TEST.ASYNC_DEVICE=1"))
    assert environment["CUDA_VISIBLE_DEVICES"] == "1" and "HOROVOD_RANK" not in environment
