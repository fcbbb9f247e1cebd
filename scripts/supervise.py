#!/usr/bin/env python3
"""Keeps a training job running: starts it again whenever it fails, until it ends well.

    scripts/supervise.py -- horovodrun --gloo -np 8 -H localhost:8 ./train.py --config TRAINER=horovod … --logdir DIR
    scripts/supervise.py -- scripts/train_hosts.sh 10.0.0.1:8,10.0.0.2:8 r50-fpn --data /data/coco --logdir DIR

A run of train.py continues from its newest checkpoint when the same command is given again, so a rank, a process of
the launcher or a machine that dies costs no more than the steps since then. The job is given up when it fails
--attempts times in a row without writing a new checkpoint, or at once when its exit code is 2, a mistake in the command
line. Whatever processes a failed job leaves behind are ended before the next start. With --stall a job that is alive
but writes nothing into its run directory for so long counts as failed. SIGTERM and SIGINT are passed on, and the job
that saves its checkpoint then is not started again. The exit code is the last job's.
"""

import argparse
import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

USAGE = 2  # exit code of a wrong command line, ours and train.py's
LONGEST_PAUSE = 300

_libc = ctypes.CDLL(None)


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def newest_step(logdir: Path) -> int:
    """Step of the checkpoint from which a run goes on, 0 without one."""
    try:
        found = re.search(r'^model_checkpoint_path: ".*-(\d+)"', (logdir / "checkpoint").read_text(), re.M)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


def last_write(logdir: Path) -> float:
    """When anything in the run directory was written last; 0 if there is nothing."""
    times = [0.0]
    with contextlib.suppress(OSError):
        for entry in os.scandir(logdir):
            with contextlib.suppress(OSError):  # files come and go
                times.append(entry.stat().st_mtime)
    return max(times)


def descendants() -> list[int]:
    """Processes that this one has brought about and that still run."""
    parents = {}
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            # pid (name) state parent …; the name may hold anything.
            state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new}
        found |= new
    return sorted(found)


def end_all(seconds: float) -> None:
    """Ends them: SIGTERM, `seconds` to react, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while descendants() and time.monotonic() < deadline:
            time.sleep(0.1)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # those whose parents had died
            pass


def end_with_parent() -> None:
    """In a new process: has Linux send it SIGTERM when its parent dies, so that it saves and does not run unwatched."""
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Job:
    """One start of the command."""

    def __init__(self, command: Sequence[str]):
        self.started = time.time()
        # A session of its own: Ctrl-C at a terminal comes through this program, once.
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
        self.stopped = False

    def stop(self, number: int) -> None:
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def wait(self, logdir: Path, stall: float) -> tuple[int, str]:
        """Until the job ends -> (exit code, how it ended)."""
        while True:
            try:
                code = self.process.wait(1.0)
                return (code, f"ended with {code}") if code >= 0 else (128 - code, f"was killed by signal {-code}")
            except subprocess.TimeoutExpired:
                pass
            if stall and not self.stopped and time.time() - max(self.started, last_write(logdir)) > stall:
                return 1, f"has written nothing for {stall:.0f} s"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=5, metavar="N", help="failures in a row (default %(default)s)")
    parser.add_argument(
        "--pause", type=float, default=5, metavar="S",
        help="seconds before a new start, twice as many after each failure without progress (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stall", type=float, default=0, metavar="S", help="seconds without a sign of life; 0 = for ever"
    )
    parser.add_argument(
        "--grace", type=float, default=10, metavar="S", help="seconds for what a failed job leaves behind"
    )
    parser.add_argument("--logdir", type=Path, metavar="DIR", help="the run; default: the command's --logdir")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command of the job")
    args = parser.parse_args(argv)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("the command to run is missing: put it behind --")
    if args.logdir is None:
        if "--logdir" not in args.command[:-1]:
            parser.error("the command has no --logdir, which it needs to continue: add it")
        args.logdir = Path(args.command[args.command.index("--logdir") + 1])
    if args.attempts < 1:
        parser.error("--attempts must be 1 or more")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    # Processes whose parent has died become children of this one, where `end_all` finds them.
    _libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    job: Job | None = None
    asked = 0

    def stop(number: int, _frame: object) -> None:
        nonlocal asked
        asked = number
        if job is not None:
            job.stop(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    failures = 0
    while True:
        before = newest_step(args.logdir)
        try:
            job = Job(args.command)
        except OSError as e:
            say(f"{args.command[0]} cannot be started: {e.strerror}")
            return USAGE
        if asked and not job.stopped:
            job.stop(asked)
        code, how = job.wait(args.logdir, args.stall)
        end_all(args.grace)
        if code == 0 or asked:
            return code
        step = newest_step(args.logdir)
        failures = 0 if step > before else failures + 1
        text = f"the job {how}; its newest checkpoint is of step {step}"
        if code == USAGE or failures >= args.attempts:
            reason = "its command line is wrong" if code == USAGE else f"{failures} failures in a row"
            say(f"{text}; {reason}: giving up on {shlex.join(args.command)}")
            return code
        pause = min(args.pause * 2 ** max(failures - 1, 0), LONGEST_PAUSE)
        say(f"{text}; starting it again in {pause:.0f} s")
        deadline = time.monotonic() + pause
        while time.monotonic() < deadline:
            time.sleep(min(0.2, pause))
            if asked:
                return 128 + asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
