"""Training batches from worker processes: order, errors, ends and memory (data_workers.py)."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_data import MINI, ROOT, SMALL, box_annotation, mini, same, settings, write_set

import data
import data_workers
from common import UserError
from data_workers import training_dataflow
from dataset import load_training_split

# ---------------------------------------------------------------- the plan of an epoch


@pytest.mark.parametrize("processes, per_step, images", [(1, 2, 2), (2, 1, 2), (2, 2, 1), (4, 1, 1), (1, 4, 1)])
def test_a_step_is_the_same_however_it_is_spread(processes, per_step, images):
    """The images of an update, and what is done to them, depend on the seed and the total batch alone."""
    split, whole_cfg = mini("TRAIN.BATCH_SIZE_PER_GPU=4", "DATA.NUM_WORKERS=0")
    cfg = settings(MINI, *SMALL, f"TRAIN.BATCH_SIZE_PER_GPU={images}", "DATA.NUM_WORKERS=0")

    def rows(batches, keys):
        found = set()
        for batch in batches:
            batch = dict(zip(keys, batch))
            for n in range(len(batch["image"])):
                count = (batch["gt_labels"][n] > 0).sum()
                height, width = batch["image_shape"][n]
                pixels = batch["image"][n, :height, :width].tobytes()
                found.add((pixels, batch["gt_boxes"][n, :count].tobytes(), int(batch["image_seed"][n])))
        return found

    keys = data.training_keys(cfg)
    flows = [islice(training_dataflow(split, cfg, 0, (r, processes), per_step), 3 * per_step) for r in range(processes)]
    parts = [list(f) for f in flows]
    for step, whole in enumerate(islice(training_dataflow(split, whole_cfg), 3)):
        spread = [b for p in parts for b in p[step * per_step : (step + 1) * per_step]]
        assert rows(spread, keys) == rows([whole], keys) and len(rows([whole], keys)) == 4


def test_ids_of_a_step_are_those_of_its_images():
    split, cfg = mini("TRAIN.BATCH_SIZE_PER_GPU=2", "DATA.NUM_WORKERS=0")
    flow = training_dataflow(split, cfg, start_batch=6, batches_per_step=2)
    classes = [set(labels[labels > 0]) for batch in islice(flow, 2) for labels in batch[4]]
    number = {split.image_id(i): i for i in range(len(split))}
    ids = [image["id"] for batch in data.batch_images(split, cfg, 6, 2) for image in batch]
    assert [set(split.annotations(number[i])["labels"]) for i in ids] == classes and len(set(ids)) == 4


# ---------------------------------------------------------------- worker processes
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers_nor_on_where_they_start(workers):
    split, cfg = mini("TRAIN.BATCH_SIZE_PER_GPU=2", "DATA.NUM_WORKERS=0")
    expected = list(islice(training_dataflow(split, cfg), 12))
    other = settings(MINI, *SMALL, "TRAIN.BATCH_SIZE_PER_GPU=2", f"DATA.NUM_WORKERS={workers}", "DATA.PREFETCH=2")
    flow = training_dataflow(split, other, start_batch=5)
    batches = iter(flow)
    assert all(same(a, b) for a, b in zip(islice(batches, 7), expected[5:]))
    batches.close()
    again = iter(flow)  # from the beginning
    assert same(next(again), expected[5])
    again.close()


def test_batches_stay_as_they_are_while_later_ones_arrive():
    split, cfg = mini("DATA.NUM_WORKERS=1", "DATA.PREFETCH=1")
    batches = iter(training_dataflow(split, cfg))
    kept = list(islice(batches, 6))
    batches.close()
    inline = settings(MINI, *SMALL, "DATA.NUM_WORKERS=0")
    assert all(same(a, b) for a, b in zip(kept, training_dataflow(split, inline)))


def test_a_killed_worker_is_an_error_within_seconds():
    split, cfg = mini("DATA.NUM_WORKERS=2")
    flow = training_dataflow(split, cfg)
    batches = iter(flow)
    next(batches)
    pids = flow.worker_pids
    os.kill(pids[1], signal.SIGKILL)
    started = time.time()
    with pytest.raises(RuntimeError, match=rf"data worker 1 \(process {pids[1]}\) was killed by SIGKILL before batch"):
        for _ in range(100):
            next(batches)
    assert time.time() - started < 10
    assert not any(psutil.pid_exists(p) for p in pids)


def test_a_worker_that_hangs_is_named_and_replaced_and_the_batches_stay_the_same(capsys):
    split, cfg = mini("DATA.NUM_WORKERS=2", "DATA.PREFETCH=1", "DATA.WORKER_TIMEOUT=1")
    flow = training_dataflow(split, cfg)
    batches = iter(flow)
    got = list(islice(batches, 2))
    hanging = flow.worker_pids[1]
    os.kill(hanging, signal.SIGSTOP)
    got += islice(batches, 5)
    assert f"data worker 1 (process {hanging}) delivered nothing for 1 s before batch" in capsys.readouterr().err
    assert hanging not in flow.worker_pids and not psutil.pid_exists(hanging)
    batches.close()
    assert all(same(a, b) for a, b in zip(got, training_dataflow(split, settings(MINI, *SMALL, "DATA.NUM_WORKERS=0"))))


def test_images_that_hang_every_worker_are_named(tmp_path, monkeypatch):
    """As on a disk that does not answer: a file whose reading never ends."""
    monkeypatch.setattr(data_workers, "START_SECONDS", 0.0)
    images = {f"{n}.png": np.full((40, 60, 3), n, np.uint8) for n in range(2)}
    args = write_set(tmp_path, images, [box_annotation(1, 1, 9, 9, image_id=n) for n in (1, 2)])
    cfg = settings(tmp_path, *args, *SMALL, "DATA.NUM_WORKERS=1", "DATA.WORKER_TIMEOUT=1")
    split = load_training_split(cfg)
    for file in (tmp_path / "set").iterdir():
        file.unlink()
        os.mkfifo(file)
    flow = training_dataflow(split, cfg)
    with pytest.raises(
        UserError, match=r"data worker 0 .* delivered nothing for 1 s .* \((1|2)\), or raise DATA.WORKER"
    ):
        next(iter(flow))
    assert not flow.worker_pids


def test_an_error_in_a_worker_arrives_with_its_message(tmp_path):
    images = {f"{n}.png": np.full((40, 60, 3), n, np.uint8) for n in range(4)}
    args = write_set(tmp_path, images, [box_annotation(1, 1, 9, 9, image_id=n) for n in (1, 2, 3, 4)])
    cfg = settings(tmp_path, *args, *SMALL, "DATA.NUM_WORKERS=2")
    (tmp_path / "set" / "2.png").write_bytes(b"damaged")
    batches = iter(training_dataflow(load_training_split(cfg), cfg))
    with pytest.raises(UserError, match=r"set/2.png \(id 3\) is not an image"):
        for _ in range(20):
            next(batches)


def test_a_programming_error_in_a_worker_arrives_with_its_traceback():
    split, cfg = mini("DATA.NUM_WORKERS=1")
    split.columns = {**split.columns, "boxes": split.columns["boxes"][:0]}
    with pytest.raises(RuntimeError, match=r"data worker 0 failed:\nTraceback (.|\n)*_draw_picture"):
        list(islice(training_dataflow(split, cfg), 20))


def test_workers_ignore_ctrl_c_and_have_no_tensorflow_and_few_threads():
    split, cfg = mini("DATA.NUM_WORKERS=2")
    flow = training_dataflow(split, cfg)
    batches = iter(flow)
    next(batches), next(batches)
    for pid in flow.worker_pids:
        os.kill(pid, signal.SIGINT)
        assert "tensorflow" not in Path(f"/proc/{pid}/maps").read_text()
        assert psutil.Process(pid).num_threads() <= 2
        assert os.getsid(pid) != os.getsid(0)
    list(islice(batches, 30))
    pids = flow.worker_pids
    batches.close()
    assert not any(psutil.pid_exists(p) for p in pids)


ENDING = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from data_workers import training_dataflow
from test_data import mini
split, cfg = mini("DATA.NUM_WORKERS=2", "DATA.PREFETCH=1")
flow = training_dataflow(split, cfg)
batches = iter(flow)
next(batches), next(batches)  # one of each worker, which have then all started
child = os.fork() if {fork} else 1  # a child that shares the parent's end of the connection
if child == 0:
    time.sleep(60)
if {stopped}:
    for pid in flow.worker_pids:
        os.kill(pid, signal.SIGSTOP)
print(*flow.worker_pids, child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("fork", "stopped"), [(False, False), (True, False), (False, True)])
def test_workers_end_with_their_parent(fork, stopped):
    code = ENDING.format(root=str(ROOT), tests=str(ROOT / "tests"), fork=fork, stopped=stopped)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    *pids, child = map(int, process.stdout.readline().split())
    process.wait()
    assert process.returncode == -signal.SIGKILL
    deadline = time.time() + 15
    while any(alive(p) for p in pids) and time.time() < deadline:
        time.sleep(0.1)
    if fork:
        os.kill(child, signal.SIGKILL)
    process.stdout.close()
    assert not any(alive(p) for p in pids)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_memory_of_a_worker_does_not_grow_with_the_annotations():
    split, cfg = mini("DATA.NUM_WORKERS=1")

    def private_megabytes(vertices):
        big = load_training_split(cfg)
        c = big.columns
        more = np.ones((vertices, 2), np.float32)
        big.columns = {**c, "vertices": np.concatenate([c["vertices"], more])}
        flow = training_dataflow(big, cfg)
        batches = iter(flow)
        list(islice(batches, 5))
        used = psutil.Process(flow.worker_pids[0]).memory_full_info().uss / 2**20
        batches.close()
        return used

    assert private_megabytes(20_000_000) - private_megabytes(0) < 10  # of 160 MB


def test_the_training_process_holds_the_annotations_in_the_shared_memory():
    split, cfg = mini("DATA.NUM_WORKERS=1")
    before = [split.annotations(i)["boxes"].copy() for i in range(len(split))]
    batches = iter(training_dataflow(split, cfg))
    next(batches)
    assert not split.columns["vertices"].flags.owndata and not split.columns["vertices"].flags.writeable
    assert all(np.array_equal(split.annotations(i)["boxes"], b) for i, b in enumerate(before))
    batches.close()
    assert split.annotations(2)["boxes"].shape == before[2].shape  # still there


def test_a_missing_seed_is_refused():
    split, _ = mini()
    with pytest.raises(ValueError, match="TRAIN.SEED"):
        training_dataflow(split, settings(MINI, "TRAIN.SEED=None"))


def test_tensorpack_takes_the_flow_for_one_of_its_own():
    from utils.tf_v1 import tf  # first, with the environment that tensorpack needs

    assert tf is not None
    from tensorpack.dataflow import DataFlow

    split, cfg = mini("DATA.NUM_WORKERS=0")
    assert isinstance(training_dataflow(split, cfg), DataFlow)
