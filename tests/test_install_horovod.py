"""scripts/install_horovod.sh: where it finds NCCL, with stand-ins for the package; tests/distributed tests what it
builds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "install_horovod.sh"


@pytest.fixture
def show(tmp_path):
    """show(variable=…) runs the script with an interpreter whose packages lie in tmp_path/site."""
    interpreter = tmp_path / "python"
    interpreter.write_text(
        f'#!/bin/sh\ncase "$2" in *purelib*) echo "{tmp_path}/site" ;; *) exec "{sys.executable}" "$@" ;; esac\n'
    )
    interpreter.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HOROVOD_") and k != "LDFLAGS"}

    def run(**variables):
        command = [str(SCRIPT), "--python", str(interpreter), "--nccl", "--show-nccl"]
        environment = clean | {"HOROVOD_CUDA_HOME": str(tmp_path / "cuda")} | variables
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


@pytest.fixture
def package(tmp_path):
    """The folder of the package nvidia-nccl-cu12, with empty files."""
    folder = tmp_path / "site" / "nvidia" / "nccl"
    for name in ("include/nccl.h", "lib/libnccl.so.2"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    return folder


def test_the_packages_headers_and_library_are_found_under_the_names_that_cmake_wants(show, package):
    result = show(LDFLAGS="-s")
    home, header, library, flags = result.stdout.splitlines()
    assert home and Path(header) == package / "include" / "nccl.h"
    assert Path(library) == package / "lib" / "libnccl.so.2"
    assert flags == "-s '-Wl,-rpath,$ORIGIN/../../nvidia/nccl/lib'"


def test_a_place_that_the_user_names_is_left_alone(show, package):
    assert show(HOROVOD_NCCL_HOME="/opt/nccl").stdout.split() == ["/opt/nccl"]
    assert show(HOROVOD_NCCL_INCLUDE="/opt/nccl/include").stdout.split() == []


def test_missing_headers_are_one_line_that_names_the_package(show):
    if Path("/usr/include/nccl.h").exists():
        pytest.skip("this system has NCCL's headers")
    result = show()
    assert result.returncode == 1 and "nvidia-nccl-cu12" in result.stderr and result.stderr.count("\n") == 1
