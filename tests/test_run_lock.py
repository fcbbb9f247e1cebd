"""utils/run_lock.py: one owner at a time, whatever became of the last one."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import UserError
from utils import run_lock
from utils.run_lock import LOCK_NAME, RunLock

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent


def test_a_second_owner_is_refused_with_the_name_of_the_first_until_that_lets_go(tmp_path):
    lock = RunLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
        RunLock(tmp_path / "run")
    lock.release()
    assert not (tmp_path / "run").exists()  # made for the lock alone
    RunLock(tmp_path / "run").release()


def test_a_folder_that_holds_something_stays_and_the_lock_file_goes(tmp_path):
    lock = RunLock(tmp_path / "run")
    (tmp_path / "run" / "log").write_text("x")
    lock.release()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["log"]


def test_the_lock_of_a_killed_process_is_free_without_cleaning(tmp_path):
    code = f"from utils.run_lock import RunLock; lock = RunLock({str(tmp_path)!r}); print('taken', flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
            RunLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_NAME).exists()
    RunLock(tmp_path).release()


def test_an_owner_on_another_machine_is_believed_as_long_as_it_shows_itself(tmp_path, monkeypatch):
    """As on a file system whose locks do not reach other machines."""
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 1.0)
    path = tmp_path / LOCK_NAME
    path.write_text(json.dumps({"host": "far", "process": 7, "start": 1}))
    done = threading.Event()

    def touch():
        stamp = 10**18
        while not done.wait(0.05):
            stamp += 10**9
            os.utime(path, ns=(stamp, stamp))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 on far"):
            RunLock(tmp_path)
    finally:
        done.set()
        thread.join()
    RunLock(tmp_path).release()  # nobody touches it any more


def test_an_owner_shows_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    os.utime(tmp_path / LOCK_NAME, ns=(0, 0))
    deadline = time.monotonic() + 60
    while os.stat(tmp_path / LOCK_NAME).st_mtime_ns == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    lock.release()
    assert time.monotonic() < deadline


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_a_process_of_this_machine_is_looked_for(tmp_path, monkeypatch, alive):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {"host": socket.gethostname(), "process": process.pid, "start": run_lock._start(process.pid)}
    if not alive:
        owner["start"] += 1  # the number belongs to another process now
    (tmp_path / LOCK_NAME).write_text(json.dumps(owner))
    if alive:
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            RunLock(tmp_path)
    else:
        RunLock(tmp_path).release()
    process.communicate(b"\n")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"'])
def test_a_damaged_lock_file_is_nobodys(tmp_path, content):
    (tmp_path / LOCK_NAME).write_text(content)
    RunLock(tmp_path).release()
