#!/usr/bin/env python3
"""Prints the facts that a bug report needs: versions, processor, GPUs and revision, one line each.

python -m tools.env
python -m tools.env --quick     # without importing TensorFlow; packages and GPUs as the files on disk say
"""

import import_path

import argparse
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from common import git_revision, project_version, visible_gpus
from utils.processor import cpu_facts

__all__ = ["report"]

PACKAGES = [
    "tensorflow", "tf_keras", "tensorpack", "numpy", "opencv-python-headless", "pycocotools", "pyarrow", "h5py",
    "horovod", "protobuf",
]  # fmt: skip
# Variables that change what TensorFlow, Horovod or this program does. Their values are printed.
VARIABLES = re.compile(
    r"^(?!.*(KEY|SECRET|TOKEN|PASSWORD))"
    r"(TF_(?!CLI_)\w+|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|HOROVOD_\w+|NCCL_\w+|PACKRCNN_\w+|XLA_FLAGS)$"
)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    """The GPUs that TensorFlow sees, with name and compute capability, and the CUDA version it was built for."""
    try:
        from utils.tf_v1 import gpu_problem, tf
    except ImportError as e:
        return f"TensorFlow cannot be imported: {e}"
    devices = tf.config.list_physical_devices("GPU")
    names = []
    for device in devices:
        details = tf.config.experimental.get_device_details(device)
        capability = ".".join(map(str, details.get("compute_capability", ())))
        names.append(f"{details.get('device_name', device.name)} (compute capability {capability or 'unknown'})")
    build = tf.sysconfig.get_build_info()
    cuda = f"CUDA {build['cuda_version']}, cuDNN {build['cudnn_version']}" if "cuda_version" in build else "no CUDA"
    seen = f"{len(devices)} seen by TensorFlow{': ' if names else ''}{', '.join(names)}; built for {cuda}"
    return "; ".join(filter(None, [seen, gpu_problem()]))


def translated(package: str) -> str:
    """Whether Python finds the package translated to byte code, or translates it anew at every start."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return "not installed"
    if spec.cached and Path(spec.cached).exists():
        return "yes"
    folder = Path(spec.origin or "").parent.parent
    return f"no, so every start takes seconds longer; once: python -m compileall -q -j 0 {folder}"


def report(quick: bool = False) -> Iterator[tuple[str, str]]:
    """(what, fact) of each line."""
    variables = {k: v for k, v in os.environ.items() if VARIABLES.match(k)}  # before importing TensorFlow sets more
    yield "packrcnn", f"{project_version()}, git {git_revision()}"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    release = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read("/etc/os-release"), re.M)
    libc = " ".join(platform.libc_ver())
    yield "system", f"{release[1] if release else platform.system()}, kernel {platform.release()}, {libc}"
    name, features = cpu_facts(_read("/proc/cpuinfo"))
    yield "cpu", f"{name}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable"
    yield "cpu features", ", ".join(f"{feature} {'yes' if there else 'no'}" for feature, there in features.items())
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", _read("/proc/meminfo"), re.M)
    yield "memory", f"{int(memory[1]) / 2**20:.1f} GiB" if memory else "unknown"
    driver = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _read("/proc/driver/nvidia/version"))
    yield "nvidia driver", driver[1] if driver else "none"
    yield "gpus", f"{visible_gpus()} visible to this process" if quick else _gpus()
    for package in PACKAGES:
        yield package, _version(package)
    yield "tensorflow as byte code", translated("tensorflow")
    yield from sorted(variables.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="do not import TensorFlow")
    args = parser.parse_args(argv)
    for what, fact in report(args.quick):
        print(f"{what + ':':24} {' '.join(fact.split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
