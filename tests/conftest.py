"""Property tests draw the same examples in every run, however slow the machine is; HYPOTHESIS_PROFILE=explore draws new
ones."""

import contextlib
import ctypes
import gc
import os

import pytest
from hypothesis import settings

# Comparisons want all 23 bits of float32 products; the CUDA libraries read this, also in the programs that tests start.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True, scope="module")
def _give_memory_back():
    """Graphs are cycles of objects, and freed memory stays with the process: it would grow by gigabytes."""
    yield
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Test processes send their reports as UTF-8, which file names of other encodings in captured output are not."""
    report = yield
    report.sections = [(name, _printable(text)) for name, text in report.sections]
    if report.failed and _printable(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = _printable(str(report.longrepr))
    return report


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
