#!/usr/bin/env python3
"""Keeps a training job running: starts it again whenever it fails, until it ends well.

    scripts/supervise.py -- horovodrun --gloo -np 8 -H localhost:8 ./train.py --config TRAINER=horovod … --logdir DIR
    scripts/supervise.py -- scripts/train_hosts.sh 10.0.0.1:8,10.0.0.2:8 r50-fpn --data /data/coco --logdir DIR
    scripts/supervise.py --hosts ./list_hosts.sh --np 8,16,32 -- \\
        scripts/train_hosts.sh {hosts} r50-fpn TRAIN.TOTAL_BATCH=32 --data /data/coco --logdir DIR

A run of train.py continues from its newest checkpoint when the same command is given again, so if a rank, a launcher
process or a machine dies, only the steps since then are lost. The job is given up when it fails
--attempts times in a row without writing a new checkpoint, or at once when its exit code is 2, a mistake in the command
line. Processes that a failed job leaves behind are ended before the next start. With --stall, a running job that writes
nothing into its run directory for that many seconds is treated as failed. SIGTERM and SIGINT are passed on; the job
then saves a checkpoint and is not started again. The exit code is the last job's.

With --hosts the set of machines may change: the given program prints the available ones, one HOST:SLOTS per line, as
for horovodrun --host-discovery-script; {hosts} and {np} in the command become the machines and slots used. When that
changes, the job is told to save its checkpoint (SIGTERM) and starts again on the new machines, so that nothing is lost.
TRAIN.TOTAL_BATCH makes the run the same on any number of them; --np lists the numbers that divide it.
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
    """Step of the checkpoint from which a run continues, 0 without one."""
    try:
        found = re.search(r'^model_checkpoint_path: ".*-(\d+)"', (logdir / "checkpoint").read_text(), re.M)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


def last_write(logdir: Path) -> float:
    """Time of the last write into the run directory; 0 if it is empty or missing."""
    times = [0.0]
    with contextlib.suppress(OSError):
        for entry in os.scandir(logdir):
            with contextlib.suppress(OSError):  # files come and go
                times.append(entry.stat().st_mtime)
    return max(times)


def descendants() -> list[int]:
    """Running processes that descend from this one."""
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
    """Ends them: SIGTERM, up to `seconds` to react, then SIGKILL."""
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
    """Runs in a new process: Linux sends it SIGTERM when its parent dies, so that it saves and does not run
    unsupervised."""
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------------------------------------ machines
def discover(program: str) -> dict[str, int] | None:
    """{host: slots} that the program prints; None when it fails."""
    try:
        done = subprocess.run(program, shell=True, capture_output=True, text=True, timeout=60, start_new_session=True)
    except subprocess.TimeoutExpired:
        say(f"{program} takes longer than 60 s; the machines stay as they are")
        return None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"{program} failed with {done.returncode}: {said}; the machines stay as they are")
        return None
    hosts = {}
    for line in done.stdout.split():
        name, _, slots = line.rpartition(":")
        if not name or not slots.isdigit():
            say(f"{program} printed {line!r}, which is not of the form HOST:SLOTS; the machines stay as they are")
            return None
        if int(slots):
            hosts[name] = int(slots)
    return hosts


def choose(found: dict[str, int], sizes: Sequence[int], running: dict[str, int]) -> dict[str, int]:
    """Slots to use: the largest of `sizes` available (empty: all), preferring machines in use; {} if there are too
    few."""
    total = sum(found.values())
    left = max((n for n in sizes if n <= total), default=0) if sizes else total
    chosen = {}
    for name in sorted(found, key=lambda name: name not in running):  # stable: else in the order found
        if left:
            chosen[name] = min(found[name], left)
            left -= chosen[name]
    return chosen


def as_text(hosts: dict[str, int]) -> str:
    return ",".join(f"{name}:{slots}" for name, slots in hosts.items())


class Machines:
    """The machines to run on, asked for every few seconds from the program, if one is given."""

    def __init__(self, program: str | None, sizes: Sequence[int], seconds: float):
        self._program, self._sizes, self._seconds = program, sizes, seconds
        self._asked = 0.0
        self._seen: dict[str, int] | None = None
        self.used: dict[str, int] = {}

    def find(self) -> bool:
        """Asks the program and chooses machines again; False if there are too few."""
        if self._program is None:
            return True
        chosen = choose(discover(self._program) or {}, self._sizes, self.used)
        self.used, self._seen = chosen or self.used, None
        return bool(chosen)

    def changed(self) -> bool:
        """Whether the job should now run on other machines; a change must be found twice in a row."""
        if self._program is None or time.monotonic() - self._asked < self._seconds:
            return False
        self._asked = time.monotonic()
        found = discover(self._program)
        if found is None:
            return False
        wanted = choose(found, self._sizes, self.used)
        before, self._seen = self._seen, wanted
        # With too few machines left the job continues while it can, and is not restarted before there are enough.
        return bool(wanted) and wanted == before and wanted != self.used

    def put_into(self, command: Sequence[str]) -> list[str]:
        if self._program is None:
            return list(command)
        words = {"{hosts}": as_text(self.used), "{np}": str(sum(self.used.values()))}
        return [re.sub(r"\{(hosts|np)\}", lambda m: words[m[0]], word) for word in command]


class Job:
    """One start of the command."""

    def __init__(self, command: Sequence[str]):
        self.started = time.time()
        # Its own session: Ctrl-C at a terminal reaches the job only once, through this program.
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
        self.stopped = False
        self.moving = False  # stopped for other machines

    def stop(self, number: int) -> None:
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def wait(self, logdir: Path, stall: float, machines: Machines, save: float) -> tuple[int, str]:
        """Waits until the job ends, or `save` seconds after machines changed -> (exit code, how it ended)."""
        deadline = None
        while True:
            if deadline is None and not self.stopped and machines.changed():
                say("the machines have changed: the job saves and starts again on those there are now")
                self.stop(signal.SIGTERM)
                self.moving, deadline = True, time.monotonic() + save
            if deadline is not None and time.monotonic() > deadline:
                return 1, f"has not ended {save:.0f} s after SIGTERM"
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
        "--grace", type=float, default=10, metavar="S", help="seconds to end processes that a failed job leaves behind"
    )
    parser.add_argument("--logdir", type=Path, metavar="DIR", help="the run; default: the command's --logdir")
    parser.add_argument(
        "--hosts", metavar="PROGRAM", help="program that prints the available machines, one HOST:SLOTS per line"
    )
    parser.add_argument(
        "--np", metavar="N,N…", default="", help="numbers of processes that fit; the largest with slots is used"
    )  # fmt: skip
    parser.add_argument("--poll", type=float, default=10, metavar="S", help="seconds between checks of the machines")
    parser.add_argument(
        "--save",
        type=float,
        default=120,
        metavar="S",
        help="seconds to save a checkpoint when machines change (default %(default)s)",
    )
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
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", args.np):
        parser.error(f"--np {args.np}: numbers of processes, separated by commas")
    args.np = [int(n) for n in args.np.split(",") if n]
    if args.hosts and not any("{hosts}" in word for word in args.command):
        parser.error("--hosts: put {hosts} where the command names its machines, and {np} for their number")
    if args.np and not args.hosts:
        parser.error("--np goes with --hosts")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    # Processes whose parent has died become children of this one, where `end_all` finds them.
    _libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    # horovodrun's own limit for saving after SIGTERM is 5 s.
    os.environ.setdefault("HOROVOD_GRACEFUL_TERMINATION_TIME_S", "50")
    job: Job | None = None
    asked = 0

    def stop(number: int, _frame: object) -> None:
        nonlocal asked
        asked = number
        if job is not None:
            # Some launchers do not pass on SIGHUP.
            job.stop(signal.SIGTERM if number == signal.SIGHUP else number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    machines = Machines(args.hosts, args.np, args.poll)

    def pause(seconds: float) -> None:
        """Ends early when a signal asks to stop."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not asked:
            time.sleep(min(0.2, seconds))

    failures = 0
    while True:
        waiting = False
        while not machines.find():
            if not waiting:
                say(f"waiting for machines: {args.hosts} names too few")
                waiting = True
            pause(args.poll)
            if asked:
                return 128 + asked
        before = newest_step(args.logdir)
        command = machines.put_into(args.command)
        if args.hosts:
            say(f"starting on {as_text(machines.used)}")
        try:
            job = Job(command)
        except OSError as e:
            say(f"{command[0]} cannot be started: {e.strerror}")
            return USAGE
        if asked and not job.stopped:
            job.stop(asked)
        code, how = job.wait(args.logdir, args.stall, machines, args.save)
        end_all(args.grace)
        if asked or (code == 0 and not job.moving):
            return code
        step = newest_step(args.logdir)
        text = f"the job {how}; its newest checkpoint is of step {step}"
        if job.moving:  # after exit code 0 too: launchers may return it after SIGTERM, and a finished run ends at once
            say(text)
            continue
        failures = 0 if step > before else failures + 1
        if code == USAGE or failures >= args.attempts:
            reason = "its command line is wrong" if code == USAGE else f"{failures} failures in a row"
            say(f"{text}; {reason}: giving up on {shlex.join(command)}")
            return code
        seconds = min(args.pause * 2 ** max(failures - 1, 0), LONGEST_PAUSE)
        say(f"{text}; starting it again in {seconds:.0f} s")
        pause(seconds)
        if asked:
            return 128 + asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
