#!/usr/bin/env python3
"""Tries broken inputs of every kind, and counts what must not happen.

    python -m tests.fuzz.run --inputs 3000            a table for docs/ROBUSTNESS.md
    python -m tests.fuzz.run --seconds 60 --first 3000   others, as many as there is time for
    python -m tests.fuzz.run --only weights:17 COCO:4 the same inputs again, with the traceback

For each input: does any call end in another way than with a result or a UserError (the one line that a user sees);
does the process take more than 2 GB of memory or 30 s of processor time, or die; is a file of the input changed?
Inputs run in processes of their own, two side by side, of which one that dies is replaced.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

MEMORY, SECONDS, SILENCE = 2 * 2**30, 30, 240  # bytes, of processor time, of no answer at all
PROBLEMS = ("traceback", "memory", "time", "file changed", "process died")


# ----------------------------------------------------------------------------------------------------- in the processes
def peak_memory() -> int:
    """Most bytes that this process had in memory since the last call of `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def processor_seconds() -> float:
    return sum(os.times()[:4])


def digest(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest() for p in files}


def outcome(call: Any) -> str:
    """ "" for a result or a UserError, else the traceback."""
    from common import UserError

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            call()
    except (UserError, SystemExit):
        pass
    except BaseException:
        return traceback.format_exc()
    return said.getvalue() if "Traceback (most recent call last)" in said.getvalue() else ""


def problems_of(
    calls: Sequence[Callable], folder: Path, peak: Callable[[], int], seconds: Callable[[], float]
) -> dict[str, str]:
    """{problem: detail} of the calls on the input that lies in the folder; peak memory and seconds are asked at the
    end."""
    found, before = {}, digest(folder)
    for call in calls:
        text = outcome(call)
        if text and "traceback" not in found:
            found["traceback"] = text
    after = digest(folder)
    changed = [name for name, value in before.items() if after.get(name) != value]
    if changed:
        found["file changed"] = ", ".join(changed)
    if peak() > MEMORY:
        found["memory"] = f"{peak() / 2**30:.1f} GB"
    if seconds() > SECONDS:
        found["time"] = f"{seconds():.0f} s"
    return found


def examine(kind: str, number: int) -> dict[str, Any]:
    """{problems: see above, peak: bytes, seconds} of one input."""
    from tests.fuzz.inputs import make

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        calls = make(kind, number, Path(folder))
        forget_peak()
        began = processor_seconds()
        problems = problems_of(calls, Path(folder), peak_memory, lambda: processor_seconds() - began)
    return {"problems": problems, "peak": peak_memory(), "seconds": processor_seconds() - began}


def work() -> None:
    """Answers each line "kind:number" with a line of json; standard output is for nothing else."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import utils.tf_v1  # noqa: F401  once, not in the first input that needs it

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, _, number = line.strip().rpartition(":")
        print(json.dumps(examine(kind, int(number))), file=answers, flush=True)


# ----------------------------------------------------------------------------------------------------- in the first one
class Worker:
    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def _start(self) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.run", "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        self.process.stdout.readline()

    def ask(self, case: str) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self._start()
        print(case, file=self.process.stdin, flush=True)
        deadline = time.monotonic() + SILENCE
        status = Path(f"/proc/{self.process.pid}/status")
        while not select.select([self.process.stdout], [], [], 0.5)[0]:
            resident = [x for x in status.read_text().splitlines() if x.startswith("VmRSS")]
            if resident and int(resident[0].split()[1]) * 1024 > 3 * MEMORY:
                return self._end({"memory": "more than 6 GB"})
            if time.monotonic() > deadline:
                return self._end({"time": f"no answer for {SILENCE} s"})
        line = self.process.stdout.readline()
        return json.loads(line) if line else self._end({"process died": f"code {self.process.wait()}"})

    def _end(self, problems: dict[str, str]) -> dict[str, Any]:
        self.process.kill()
        self.process.wait()
        return {"problems": problems, "peak": 0, "seconds": 0}

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def try_all(cases: list[str], workers: int, seconds: float) -> dict[str, dict[str, Any]]:
    """{case: what `examine` found}, of as many as there is time for."""
    waiting, found, lock = list(reversed(cases)), {}, threading.Lock()
    deadline = time.monotonic() + seconds

    def run() -> None:
        worker = Worker()
        while True:
            with lock:
                if not waiting or time.monotonic() > deadline:
                    break
                case = waiting.pop()
            answer = worker.ask(case)
            with lock:
                found[case] = answer
                if answer["problems"]:
                    print(f"{case}: " + "; ".join(f"{k} {v[-300:]}" for k, v in answer["problems"].items()), flush=True)
        worker.close()

    threads = [threading.Thread(target=run) for _ in range(min(workers, len(cases)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    kinds = dict.fromkeys(case.rpartition(":")[0] for case in found)
    rows = []
    for kind in [*sorted(kinds), "together"]:
        answers = [a for case, a in found.items() if kind in (case.rpartition(":")[0], "together")]
        counts = Counter(problem for a in answers for problem in a["problems"])
        peak, seconds = max(a["peak"] for a in answers), max(a["seconds"] for a in answers)
        rows.append([kind, len(answers), *(counts[p] for p in PROBLEMS), f"{peak / 2**30:.2f}", f"{seconds:.1f}"])
    return tabulate(rows, ["inputs", "number", *PROBLEMS, "most GB", "most CPU s"], tablefmt="pipe")


def main(argv: list[str]) -> int:
    from tests.fuzz.inputs import KINDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=3000, help="how many, of all kinds together")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no input after that time")
    parser.add_argument("--first", type=int, default=0, help="number of the first of each kind")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="KIND:NUMBER", help="these; prints tracebacks")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work()
        return 0
    each = -(-args.inputs // len(args.kinds))
    cases = [f"{kind}:{n}" for n in range(args.first, args.first + each) for kind in args.kinds][: args.inputs]
    found = try_all(args.only or cases, args.workers, args.seconds)
    if args.only:
        for case, answer in found.items():
            print(f"{case}: {answer}\n" + answer["problems"].get("traceback", ""))
    print(table(found))
    return int(any(answer["problems"] for answer in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
