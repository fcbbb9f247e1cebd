"""What the tests of launchers share: the environment of a job that no other job's launcher has touched."""

import os
import socket
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
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
