"""scripts/supervise.py: a failed job starts again, one that makes no progress is given up, nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SUPERVISE = Path(__file__).resolve().parent.parent / "scripts/supervise.py"


def supervise(folder, job, *flags):
    """A supervisor of `python -c job` in `folder`, which is its run directory too."""
    return subprocess.Popen(
        [sys.executable, str(SUPERVISE), "--pause", "0.2", "--grace", "2", *flags, "--",
         sys.executable, "-c", job, "--logdir", str(folder)],
        cwd=folder, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ends(process, seconds=60):
    """(exit code, what it said)"""
    try:
        return process.wait(seconds), process.stderr.read()
    finally:
        process.kill()


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def is_running(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


# Counts its starts in the file "starts", and writes a checkpoint of the step it is given as train.py does.
COUNT = """
import os, signal, subprocess, sys, time
starts = os.path.getsize("starts") + 1 if os.path.exists("starts") else 1
with open("starts", "a") as f: f.write(".")
def checkpoint(step):
    with open("checkpoint", "w") as f: f.write(f'model_checkpoint_path: "model-{step}"\\n')
"""


@pytest.mark.quick
def test_a_job_that_fails_is_started_again_until_it_ends_well(tmp_path):
    code, said = ends(supervise(tmp_path, COUNT + "sys.exit(0 if starts == 3 else 9)"))
    assert code == 0 and (tmp_path / "starts").read_text() == "..."
    assert said.count("the job ended with 9; its newest checkpoint is of step 0; starting it again") == 2


@pytest.mark.quick
def test_a_job_without_progress_is_given_up_and_one_with_progress_is_not(tmp_path):
    job = COUNT + "checkpoint(min(starts, 4)); os.kill(os.getpid(), 9)"
    code, said = ends(supervise(tmp_path, job, "--attempts", "2"))
    # Four starts that each wrote a newer checkpoint, then two that did not.
    assert code == 137 and (tmp_path / "starts").read_text() == "......"
    assert "was killed by signal 9; its newest checkpoint is of step 4; 2 failures in a row: giving up on" in said


@pytest.mark.quick
def test_a_wrong_command_line_is_not_tried_again(tmp_path):
    code, said = ends(supervise(tmp_path, COUNT + "sys.exit(2)"))
    assert code == 2 and (tmp_path / "starts").read_text() == "." and "its command line is wrong" in said


def test_sigterm_is_passed_on_and_a_job_that_saves_then_is_not_started_again(tmp_path):
    job = COUNT + (
        "def save(*_): time.sleep(1); open('saved', 'w').close(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); open('up', 'w').close(); time.sleep(60)"
    )
    process = supervise(tmp_path, job)
    wait_for(tmp_path / "up")
    process.send_signal(signal.SIGTERM)
    code, _ = ends(process)
    assert code == 143 and (tmp_path / "saved").exists() and (tmp_path / "starts").read_text() == "."


def test_what_a_failed_job_leaves_behind_is_ended_before_the_next_start(tmp_path):
    """A grandchild in a session of its own that ignores SIGTERM."""
    job = COUNT + (
        "if starts == 2: sys.exit(os.path.exists(f'/proc/{open(\"orphan\").read()}'))\n"
        'code = \'import signal, time; signal.signal(15, signal.SIG_IGN); open("up", "w").close(); time.sleep(60)\'\n'
        "orphan = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
        "open('orphan', 'w').write(str(orphan.pid))\n"
        "while not os.path.exists('up'): time.sleep(0.05)\n"
        "sys.exit(1)"
    )
    assert ends(supervise(tmp_path, job))[0] == 0
    assert not is_running((tmp_path / "orphan").read_text())


def test_a_job_that_hangs_is_started_again(tmp_path):
    job = COUNT + "sys.exit(0) if starts == 2 else time.sleep(60)"
    code, said = ends(supervise(tmp_path, job, "--stall", "2"))
    assert code == 0 and "the job has written nothing for 2 s" in said


def test_the_job_of_a_supervisor_that_is_killed_saves_and_ends(tmp_path):
    job = COUNT + (
        "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(0)))\n"
        "open('pid.tmp', 'w').write(str(os.getpid())); os.rename('pid.tmp', 'pid'); time.sleep(60)"
    )
    process = supervise(tmp_path, job)
    wait_for(tmp_path / "pid")
    process.kill()
    wait_for(tmp_path / "saved")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "the command to run is missing"),
        (["--", "true"], "the command has no --logdir"),
        (["--attempts", "0", "--", "true", "--logdir", "x"], "--attempts must be 1 or more"),
        (["--logdir", "x", "--", "/no/such/program"], "/no/such/program cannot be started: No such file"),
    ],
)
def test_what_cannot_work_is_refused(words, named):
    done = subprocess.run([sys.executable, str(SUPERVISE), *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and named in done.stderr
