"""scripts/supervise.py: a failed job starts again, one that makes no progress is given up, nothing is left behind."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

SUPERVISE = Path(__file__).resolve().parent.parent / "scripts/supervise.py"


spec = importlib.util.spec_from_file_location("supervise", SUPERVISE)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def supervise(folder, job, *flags, words=()):
    """A supervisor of `python -c job words` in `folder`, which is its run directory too."""
    return subprocess.Popen(
        [sys.executable, str(SUPERVISE), "--pause", "0.2", "--grace", "2", *flags, "--",
         sys.executable, "-c", job, "--logdir", str(folder), *words],
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
    ("found", "sizes", "running", "chosen"),
    [
        ({"a": 8, "b": 8}, [], {}, {"a": 8, "b": 8}),
        ({"a": 8, "b": 8}, [4, 12, 32], {}, {"a": 8, "b": 4}),
        ({"a": 8, "b": 8}, [8], {"b": 8}, {"b": 8}),  # where the job runs already
        ({"a": 8}, [16], {"a": 8}, {}),
        ({}, [], {"a": 1}, {}),
    ],
)
def test_the_largest_number_of_processes_that_there_are_slots_for_is_used(found, sizes, running, chosen):
    assert module.choose(found, sizes, running) == chosen


@pytest.mark.quick
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9)),
    st.lists(st.integers(1, 40), max_size=4),
    st.sets(st.sampled_from("abcdef")),
)
def test_chosen_slots_exist_add_up_and_keep_machines_in_use(found, sizes, running):
    running = dict.fromkeys(running, 1)
    chosen = module.choose(found, sizes, running)
    total = sum(chosen.values())
    assert all(0 < n <= found[name] for name, n in chosen.items())
    assert total == max([n for n in sizes if n <= sum(found.values())] or [0]) if sizes else chosen == found
    # No machine is new while one in use has slots left.
    if any(name not in running for name in chosen):
        assert all(chosen.get(name) == found[name] for name in found if name in running)
    assert module.choose(found, sizes, chosen) == chosen  # settles


# Says where it runs, saves when told to, and ends by itself on three machines. Some launchers answer SIGTERM with 0.
FOLLOW = (
    COUNT
    + """
with open("ran", "a") as f: f.write(sys.argv[-1] + "\\n")
if sys.argv[-1].count(":") == 3: sys.exit(0)
def save(*_): checkpoint(starts); sys.exit(143 if starts == 1 else 0)
signal.signal(signal.SIGTERM, save); open("up" + str(starts), "w").close(); time.sleep(60)
"""
)


def test_the_job_saves_and_moves_when_machines_come_and_go(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a:2\nb:2\n")
    flags = ["--hosts", f"cat {hosts}", "--poll", "0.3"]
    process = supervise(tmp_path, FOLLOW, *flags, words=["{np} on {hosts}"])
    wait_for(tmp_path / "up1")
    hosts.write_text("b:2\n")
    wait_for(tmp_path / "up2")
    hosts.write_text("no such line\n")  # a program that fails changes nothing
    time.sleep(1.5)
    hosts.write_text("c:1\nb:2\na:2\n")
    code, said = ends(process)
    assert code == 0, said
    assert (tmp_path / "ran").read_text().splitlines() == ["4 on a:2,b:2", "2 on b:2", "5 on b:2,c:1,a:2"]
    assert module.newest_step(tmp_path) == 2 and said.count("the machines have changed: the job saves") == 2
    assert "which is not of the form HOST:SLOTS; the machines stay as they are" in said


def test_machines_that_do_not_change_the_number_of_processes_leave_the_job_alone(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("")
    process = supervise(
        tmp_path, FOLLOW, "--hosts", f"cat {hosts}", "--poll", "0.3", "--np", "2,6", words=["{np} on {hosts}"]
    )
    time.sleep(1)
    assert process.poll() is None and not (tmp_path / "starts").exists()  # too few to start
    hosts.write_text("a:1 b:4")
    wait_for(tmp_path / "up1")
    hosts.write_text("c:2 b:1 a:1")  # still 2, for which a and b are enough
    time.sleep(1.5)
    hosts.write_text("a:1")  # too few to start with, so it goes on with what it has
    time.sleep(1.5)
    assert (tmp_path / "starts").read_text() == "."
    process.send_signal(signal.SIGTERM)
    code, said = ends(process)
    assert code == 143 and (tmp_path / "ran").read_text() == "2 on a:1,b:1\n" and "waiting for machines" in said


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "the command to run is missing"),
        (["--", "true"], "the command has no --logdir"),
        (["--attempts", "0", "--", "true", "--logdir", "x"], "--attempts must be 1 or more"),
        (["--np", "8,", "--", "true", "--logdir", "x"], "--np 8,: numbers of processes"),
        (["--np", "8", "--", "true", "--logdir", "x"], "--np goes with --hosts"),
        (["--hosts", "ls", "--", "true", "--logdir", "x"], "put {hosts} where the command names its machines"),
        (["--logdir", "x", "--", "/no/such/program"], "/no/such/program cannot be started: No such file"),
    ],
)
def test_what_cannot_work_is_refused(words, named):
    done = subprocess.run([sys.executable, str(SUPERVISE), *words], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and named in done.stderr
