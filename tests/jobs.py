"""What tests of jobs share: the environment of one that no other job's launcher has touched, stand-ins for Slurm."""

import os
import socket
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
HOROVODRUN = [sys.executable, str(REPOSITORY / "tests/distributed/horovodrun.py")]  # test_launch.py has the real one
_OF_OTHER_JOBS = ("SLURM_", "JOB_COMPLETION", "HOROVOD_", "CUDA_", "TF_", "OMP_")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(_OF_OTHER_JOBS)}
CLEAN |= {
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def slurm_stand_ins(folder):
    """Puts an `srun`, which runs the launcher once for each of two machines, and an `scontrol` into the folder -> the
    environment of a job that finds them; what scontrol is asked to do is a line in `folder`/notes."""
    (folder / "srun").write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 == -* ]]; do shift; done\n"
        "trap 'kill -TERM $a $b' TERM\n"
        'SLURM_NODEID=0 "$@" & a=$!\n'
        'SLURM_NODEID=1 "$@" & b=$!\n'
        "highest=0\n"
        "for p in $a $b; do while kill -0 $p 2>/dev/null; do code=0; wait $p || code=$?; done\n"
        "  [ $code -le $highest ] || highest=$code; done\n"
        "exit $highest\n"
    )
    (folder / "scontrol").write_text(
        f'#!/bin/sh\ncase $1 in show) echo 127.0.0.1; echo other;; *) echo "$*" >> {folder}/notes;; esac\n'
    )
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": str(free_port() % 20000),
        "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_NODELIST": "n[1-2]",
    }  # fmt: skip
