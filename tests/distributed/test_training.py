"""train.py under Horovod: ranks together train as one process does with the joined batch, and stop together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("horovod.tensorflow", reason="horovod is not installed: make horovod")

from test_train import assert_same_weights, data_of_one_size, train_tiny, weights_of
from tiny import TINY_TRAINING

from utils.checkpoint import newest_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_")} | {"CUDA_VISIBLE_DEVICES": "-1"}
pytestmark = pytest.mark.slow


def command(ranks, logdir, *settings):
    run = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}"]
    program = [sys.executable, "train.py", "--logdir", str(logdir), "--config", *TINY_TRAINING, "TRAINER=horovod"]
    return [*run, *program, *settings]


def test_two_ranks_equal_one_process_with_the_joined_batch_and_only_rank_0_writes(tmp_path):
    data = data_of_one_size(tmp_path)
    assert train_tiny(tmp_path / "joined", "TRAIN.BATCH_SIZE_PER_GPU=2", *data, steps=5) == 0
    done = subprocess.run(
        command(2, tmp_path / "ranks", *data, "TRAIN.MAX_STEPS=5"),
        cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_weights(weights_of(tmp_path / "joined"), weights_of(tmp_path / "ranks"), 2e-5, 5e-5)
    assert len(list((tmp_path / "ranks").glob("events.*"))) == 1


def test_sharded_evaluation_equals_that_of_one_process(tmp_path):
    settings = ["TRAIN.MAX_STEPS=1", "TRAIN.EVAL_PERIOD=1", "TEST.RESULT_SCORE_THRESH=0.0"]
    data = data_of_one_size(tmp_path)
    assert train_tiny(tmp_path / "one", *settings, *data, "TRAIN.BATCH_SIZE_PER_GPU=2", "DATA.VAL=one_size") == 0
    done = subprocess.run(
        command(2, tmp_path / "ranks", *data, *settings, "DATA.VAL=one_size"),
        cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, ranks = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "ranks"))
    assert one.keys() == ranks.keys()
    assert ranks["bbox/AR100"] == pytest.approx(one["bbox/AR100"], abs=0.02)


def test_sigterm_to_the_job_saves_one_checkpoint_at_one_step(tmp_path):
    logdir = tmp_path / "run"
    environment = CLEAN | {"HOROVOD_GRACEFUL_TERMINATION_TIME_S": "50"}
    run = command(2, logdir, "TRAIN.MAX_STEPS=100000")
    with subprocess.Popen(
        run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as p:
        for line in p.stdout:
            if "s/step" in line:
                break
        p.send_signal(signal.SIGTERM)
        rest = p.stdout.read()
        assert p.wait(90) != 0
    assert "continue with: ./train.py --resume" in rest
    assert newest_checkpoint(logdir) is not None
