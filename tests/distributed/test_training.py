"""train.py under Horovod: ranks train as one process with the joined batch does, evaluate as one, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("horovod", reason="horovod is not installed: make horovod")

from jobs import CLEAN, HOROVODRUN, REPOSITORY
from test_train import assert_same_weights, data_of_one_size, run, train_tiny, weights_of
from tiny import COCO_MINI, RPN_ALONE, TINY_TRAINING

from utils.checkpoint import load_weights, newest_checkpoint

ENVIRONMENT = {**CLEAN, "HOROVOD_GRACEFUL_TERMINATION_TIME_S": "60"}
RANK = REPOSITORY / "tests/distributed/rank.py"
RANKS, BATCH, STEPS, IMAGES = 2, 4, 5, 11
pytestmark = pytest.mark.slow


def launcher(ranks):
    return [*HOROVODRUN, "--gloo", "-np", str(ranks), "-H", f"localhost:{ranks}"]


def command(ranks, folder, *settings, flags=()):
    """A job of rank.py; every rank has a run directory of its own, as machines without a common disk would have."""
    program = [sys.executable, str(RANK), str(folder), "--logdir", f"{folder}/run-RANK"]
    return [*launcher(ranks), *program, *flags, "--config", *TINY_TRAINING, "TRAINER=horovod", *settings]


def equality_settings(folder, norm, each):
    """Of a run of float64 (the order of a sum must not decide on which side of a threshold a float32 value falls) that
    is evaluated on two sets: that of training and a single image, fewer than there are ranks."""
    (datasets, *others), single = data_of_one_size(folder, IMAGES), folder / "single.json"
    content = json.loads((folder / "one_size.json").read_text())
    single.write_text(json.dumps({**content, "images": content["images"][:1]}))
    return [
        f"{datasets[:-1]},'single':['{single}','{COCO_MINI}/train2017']}}", *others, f"BACKBONE.NORM={norm}",
        "TRAIN.PRECISION=float64", f"TRAIN.BATCH_SIZE_PER_GPU={each}", f"TRAIN.MAX_STEPS={STEPS}",
        "TRAIN.EVAL_PERIOD=1", "DATA.VAL=['one_size','single']", "TEST.RESULT_SCORE_THRESH=0.0",
        "TRAIN.EMA_DECAY=0.9",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder of a finished job of 2 ranks and a total batch of 4, with synchronised norms: five steps, then an
    evaluation. (FreezeBN and 4 ranks: the job that follows machines, below.)"""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        command(RANKS, folder, *equality_settings(folder, "SyncBN", BATCH // RANKS)),
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_all_ranks_hold_the_same_weights_and_momentum_to_the_bit(job):
    first, second = (dict(np.load(job / f"state-{r}.npz")) for r in range(RANKS))
    assert first["global_step"] == STEPS
    assert_same_weights(first, second)


def test_ranks_train_as_one_process_with_the_joined_batch_does(job, tmp_path):
    settings = equality_settings(tmp_path, "SyncBN", BATCH)
    assert train_tiny(tmp_path / "run", *settings, "TRAIN.EVAL_PERIOD=0", steps=STEPS) == 0
    assert_same_weights(weights_of(tmp_path / "run"), weights_of(job / "run-0"), 1e-7, 1e-7)


def test_the_ranks_read_different_images_and_together_every_image_once_an_epoch(job):
    batches = [json.loads((job / f"images-{r}.json").read_text()) for r in range(RANKS)]
    # A step deals its images to the ranks in turn.
    sequence = [batches[i % RANKS][step][i // RANKS] for step in range(STEPS) for i in range(BATCH)]
    assert sorted(sequence[:IMAGES]) == list(range(1, IMAGES + 1))
    assert len(set(sequence[IMAGES:])) == STEPS * BATCH - IMAGES


def test_only_rank_0_writes(job):
    assert [p.name for p in job.glob("run-*")] == ["run-0"]
    files = [p.name for p in (job / "run-0").iterdir()]
    assert {"log.jsonl", "settings.json", "metrics.json", f"model-{STEPS}.index"} <= set(files)
    assert sum(name.startswith("events.") for name in files) == 1


def test_evaluation_shared_by_the_ranks_finds_what_one_process_finds(job, tmp_path):
    """To the digit, in training and with --evaluate."""
    words = ["--load", str(job / "run-0")]
    assert run("--evaluate", tmp_path / "one.json", *words) == 0
    done = subprocess.run(
        [*launcher(RANKS), sys.executable, "train.py", "--evaluate", str(tmp_path / "many.json"), *words],
        env=ENVIRONMENT, capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for split in ("one_size", "single"):
        one = json.loads((tmp_path / f"one-{split}.json").read_text())
        assert len(one) > 50
        assert json.loads((tmp_path / f"many-{split}.json").read_text()) == one
        assert json.loads((job / f"found-0-{split}.json").read_text()) == one
    files = job / "run-0/metrics.json", tmp_path / "one.metrics.json", tmp_path / "many.metrics.json"
    scores = [json.loads(file.read_text()) for file in files]
    assert scores[0] == scores[1] == scores[2]


def killed(job, folder, rank):
    """Kills one rank once there is a checkpoint; (seconds until the job ended, its output)."""
    checkpoint = newest_checkpoint(folder / "run-0")
    deadline = time.monotonic() + 120
    while newest_checkpoint(folder / "run-0") == checkpoint:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.1)
    os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
    began = time.monotonic()
    output = job.communicate(timeout=100)[0]
    return time.monotonic() - began, output


def test_a_killed_rank_ends_the_job_and_the_same_command_resumes_until_sigterm_saves(tmp_path):
    settings = ["TRAIN.MAX_STEPS=100000", "TRAIN.PERIOD_STEPS=3", *RPN_ALONE]

    def start():
        return subprocess.Popen(
            command(2, tmp_path, *settings),
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    job = start()
    seconds, output = killed(job, tmp_path, 1)
    assert seconds < 60 and job.returncode != 0
    assert "Process 1 exit with status code 137" in output  # horovodrun
    assert "[0]<stderr>" in output and "another process of the job has ended" in output
    assert "<stderr>:Traceback" not in output
    resumed_at = int(re.search(r"model-(\d+)", newest_checkpoint(tmp_path / "run-0")).group(1))
    assert resumed_at % 3 == 0
    job, said = start(), ""
    for line in job.stdout:
        said += line
        if "s/step" in line:
            break
    assert f"continuing {tmp_path}/run-0 at step {resumed_at}" in said
    job.send_signal(signal.SIGTERM)
    rest = job.communicate(timeout=100)[0]
    assert job.returncode != 0
    assert rest.count("continue with: ./train.py --resume") == 1
    saved = load_weights(tmp_path / "run-0")[0]["global_step"]
    assert saved > resumed_at
    states = [dict(np.load(tmp_path / f"state-{r}.npz")) for r in (0, 1)]
    assert states[0]["global_step"] == saved
    assert_same_weights(*states)


def test_a_supervised_job_of_which_processes_are_killed_at_random_ends_with_the_model_of_one_left_alone():
    """One kill; `random_kills.py --kills 10` is for doing it by hand."""
    program = [sys.executable, "-m", "tests.distributed.random_kills", "--kills", "1", "--seed", "2"]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and "0 differ between" in done.stdout, done.stdout + done.stderr


def test_a_job_follows_machines_that_come_and_go_and_ends_with_the_model_of_one_process(tmp_path):
    """2, 1, then 4 ranks make the same updates of 4 images each; nothing is lost where they change."""
    steps, hosts, folder = 12, tmp_path / "hosts", tmp_path / "many"
    folder.mkdir()
    (folder / "hold").write_text("3 8")
    settings = [
        *equality_settings(tmp_path, "FreezeBN", 1), f"TRAIN.MAX_STEPS={steps}", "TRAIN.TOTAL_BATCH=4",
        "TRAIN.EVAL_PERIOD=0", *RPN_ALONE,
    ]  # fmt: skip
    hosts.write_text("localhost:2")
    words = command("{np}", folder, *settings)
    words[words.index("localhost:{np}")] = "{hosts}"
    supervisor = [sys.executable, str(REPOSITORY / "scripts/supervise.py"), "--logdir", f"{folder}/run-0"]
    supervisor += ["--hosts", f"cat {hosts}", "--np", "1,2,4", "--poll", "0.2", "--", *words]
    job = subprocess.Popen(supervisor, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for seen, ranks in ((3, 1), (8, 5)):  # of five, four are used
            wait_for_step(folder, seen, job)
            hosts.write_text(f"localhost:{ranks}")
        output = job.communicate(timeout=300)[0]
    finally:
        job.terminate()
        job.wait(60)
    assert job.returncode == 0, output
    assert re.findall("starting on localhost:(.)", output) == ["2", "1", "4"]
    made = [int(line) for line in (folder / "steps-0").read_text().split()]
    assert made == list(range(1, steps + 1))  # none twice
    assert train_tiny(tmp_path / "one", *settings, "TRAINER=replicated") == 0
    assert_same_weights(weights_of(tmp_path / "one"), weights_of(folder / "run-0"), 1e-7, 1e-7)


def wait_for_step(folder, step, job):
    deadline = time.monotonic() + 200
    while not (folder / "steps-0").exists() or len((folder / "steps-0").read_text().split()) < step:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)


def test_a_mistake_ends_every_rank_and_is_told_once(tmp_path):
    done = subprocess.run(
        command(2, tmp_path, "TRAINER=replicated"), env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert done.stderr.count("2 processes were launched to train together") == 2
    assert "<stderr>:Traceback" not in done.stderr
