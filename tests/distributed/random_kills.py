#!/usr/bin/env python3
"""Kills processes of a supervised job at random, and compares its model with that of a job left alone.

    python -m tests.distributed.random_kills --kills 10 --seed 1

Two ranks of train.py under horovodrun and scripts/supervise.py train the tests' tiny model; between its starts a rank,
a data worker or horovodrun itself gets SIGKILL at a random moment. Prints what each kill cost, and ends with 1 if more
than a checkpoint interval was ever lost or if the final weights or momentum differ in a bit.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from tests.jobs import HOROVODRUN
from tests.tiny import RPN_ALONE, TINY_TRAINING

TESTS = Path(__file__).resolve().parent.parent

INTERVAL = 4  # steps between checkpoints
VICTIMS = ("rank 0", "rank 1", "horovodrun", "worker of rank 0", "worker of rank 1")


def command(folder: Path, steps: int) -> list[str]:
    return [
        sys.executable, str(TESTS.parent / "scripts/supervise.py"), "--pause", "0.5",
        "--logdir", f"{folder}/run-0", "--",
        *HOROVODRUN, "--gloo", "-np", "2", "-H", "localhost:2",
        sys.executable, str(TESTS / "distributed/rank.py"), str(folder), "--logdir", f"{folder}/run-RANK",
        "--config", *TINY_TRAINING, "TRAINER=horovod", f"TRAIN.STEPS_PER_EPOCH={INTERVAL}", f"TRAIN.MAX_STEPS={steps}",
        "DATA.NUM_WORKERS=1", "TRAIN.KEEP_CHECKPOINTS=2", *RPN_ALONE,
    ]  # fmt: skip


def start(folder: Path, steps: int) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(TESTS.parent)}
    with open(folder / "output.txt", "w") as output:
        return subprocess.Popen(command(folder, steps), env=environment, stdout=output, stderr=subprocess.STDOUT)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def find(victim: str, folder: Path, supervisor: int) -> int | None:
    """Its process, once it runs."""
    try:
        if victim == "horovodrun":
            return children(supervisor)[0]
        rank = int((folder / f"pid-{victim[-1]}").read_text())
        if not victim.startswith("worker"):
            os.kill(rank, 0)
            return rank
        # Beside the process in which multiprocessing tracks what is shared.
        found = [p for p in children(rank) if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes()]
        return found[0] if found else None
    except (OSError, ValueError, IndexError):
        return None


def made_steps(folder: Path) -> list[int]:
    try:
        return [int(line) for line in (folder / "steps-0").read_text().split()]
    except OSError:
        return []


def wait_until(condition: Any, job: subprocess.Popen, seconds: float = 200) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the job ended with {job.poll()}" if job.poll() is not None else "nothing happens")
        time.sleep(0.02)
    return found


def kill_one(
    folder: Path, job: subprocess.Popen, number: int, victim: str, from_step: float, rng: random.Random
) -> list:
    """Kill `number`, at `from_step` or later, or while the job starts -> the row of the table."""
    # Not before it runs: a process of the start before is none.
    wait_until(lambda: all(find(f"rank {r}", folder, job.pid) for r in (0, 1)), job)
    before = len(made_steps(folder))
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0, 5))
    else:
        wait_until(lambda: made_steps(folder)[before:] and made_steps(folder)[-1] >= from_step, job)
        time.sleep(rng.uniform(0, 0.5))
    pid = wait_until(lambda: find(victim, folder, job.pid), job)
    for rank in (0, 1):
        (folder / f"pid-{rank}").unlink()
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: (folder / "output.txt").read_text().count("starting it again") > number, job)
    ended, made = time.monotonic() - began, made_steps(folder)
    wait_until(lambda: len(made_steps(folder)) > len(made), job)
    last, resumed = max(made, default=0), made_steps(folder)[len(made)] - 1
    return [victim, last, resumed, last - resumed, f"{ended:.1f}", f"{time.monotonic() - began:.1f}"]


def final_state(folder: Path, rank: int) -> dict[str, np.ndarray]:
    return dict(np.load(folder / f"state-{rank}.npz"))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    steps, rng, rows = 12 * args.kills + 30, random.Random(args.seed), []  # 30: the last one must not come too late
    # Each comes up as often as any other, in random order.
    victims = [v for _ in range(args.kills) for v in rng.sample(VICTIMS, len(VICTIMS))][: args.kills]
    with tempfile.TemporaryDirectory() as parent:
        killed, alone = Path(parent, "killed"), Path(parent, "alone")
        for folder in (killed, alone):
            folder.mkdir()
        job = start(killed, steps)
        try:
            for number, victim in enumerate(victims):
                rows.append(kill_one(killed, job, number, victim, 12 * (number + rng.random()), rng))
            code = job.wait(600)
        except RuntimeError as e:
            print(f"{e}\n{(killed / 'output.txt').read_text()[-3000:]}")
            return 1
        finally:
            job.terminate()
            job.wait(90)
        header = ["killed", "last step", "resumed after", "steps lost", "s to the job's end", "s to the next step"]
        print(tabulate(rows, header, tablefmt="github"))
        print(f"exit code {code}")
        other = start(alone, steps).wait(600)
        states = [final_state(folder, rank) for folder in (killed, alone) for rank in (0, 1)]
        different = [n for n in states[0] if any(not np.array_equal(states[0][n], state[n]) for state in states[1:])]
        made = [int(state["global_step"]) for state in states]
        print(f"{len(states[0])} variables after {made} steps, {len(different)} differ between the runs or ranks")
        starts = len(re.findall("continuing", (killed / "output.txt").read_text()))
        print(f"continued {starts} times")
        lost = max(row[3] for row in rows)
        good = code == other == 0 and not different and set(made) == {steps} and lost <= INTERVAL
        return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
