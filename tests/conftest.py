"""Property tests draw the same examples in every run, however slow the machine is; HYPOTHESIS_PROFILE=explore draws new
ones."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# Comparisons want all 23 bits of float32 products; the CUDA libraries read this, also in the programs that tests start.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
TESTS = Path(__file__).parent

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


# The files that take longest, of which the last to begin decides when all tests end. Test processes take them in turn:
# the jobs of several ranks, which wait for each other and use the same names of hosts, come to the same process.
FIRST = [
    "distributed/test_training.py", "test_train.py", "distributed/test_launchers_training.py", "test_recipes.py",
    "distributed/test_launch.py", "test_backbones.py", "distributed/test_syncbn.py", "test_training_incidents.py",
    "test_notebook.py", "test_golden.py", "test_training_evaluation.py", "test_tta.py", "test_export.py",
    "test_model_rcnn.py", "test_ema.py", "test_random_kills.py", "test_proposals.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(FIRST)}
    assert all((TESTS / name).exists() for name in FIRST), "FIRST names a file that is no longer there"
    items.sort(key=lambda item: place.get(item.path.relative_to(TESTS).as_posix(), len(FIRST)))


@pytest.fixture(autouse=True, scope="module")
def _give_memory_back():
    """Graphs are cycles of objects, and freed memory stays with the process: it would grow by gigabytes."""
    yield
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def unoptimised_graphs():
    """Sessions in this process run their graphs as they were built: for a few steps of a tiny model, TensorFlow's graph
    optimiser costs more than it saves. (Programs that tests start have it, and so have the comparisons with recordings
    and with exported models.)"""
    import inference
    import trainers
    from utils.tf_v1 import tf

    def without(config):
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        return config

    start = tf.Session.__init__

    def session(self, target="", graph=None, config=None):
        start(self, target, graph, without(tf.ConfigProto()) if config is None else config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.Session, "__init__", session)
        for module in (inference, trainers):
            patch.setattr(module, "fast_graph_optimizer", without)
        yield


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
