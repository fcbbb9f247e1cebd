"""A killed run continues to the model of one left alone, to the bit; `make kills` tries a hundred kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_killed_twice_in_float16_ends_with_the_model_of_one_left_alone():
    program = [sys.executable, "-m", "tests.random_kills", "--kills", "2", "--seed", "3", "--precisions", "float16"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    folder = Path(__file__).resolve().parent.parent
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and "2 kills, 0 of 1 runs differ" in done.stdout, done.stdout + done.stderr
