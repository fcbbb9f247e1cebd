"""train.py: whole runs through the command line, on real photographs with a tiny model."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny import COCO_MINI, RPN_ALONE, TINY_TRAINING

import data
import train
import training
from common import UserError, git_revision
from utils.checkpoint import load_weights, newest_checkpoint, save_npz
from utils.tf_v1 import tf

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
pytestmark = pytest.mark.usefixtures("unoptimised_graphs")


def run(*args) -> int:
    return train.main([str(a) for a in args])


def train_tiny(logdir, *settings, steps=3, flags=()) -> int:
    return run("--logdir", logdir, *flags, "--config", *TINY_TRAINING, f"TRAIN.MAX_STEPS={steps}", *settings)


def losses_of(logdir) -> dict[int, float]:
    lines = (Path(logdir) / "log.jsonl").read_text().splitlines()
    return {e["step"]: e["total_loss"] for e in map(json.loads, lines) if "total_loss" in e}


def weights_of(logdir) -> dict[str, np.ndarray]:
    return load_weights(logdir)[0]


def assert_same_weights(a, b, tolerance=0.0, momentum_tolerance=0.0):
    """||b - a|| / ||a|| of every tensor, momentum included, is within the tolerance; equal to the bit by default."""
    assert sorted(a) == sorted(b)
    assert any(name.endswith("Momentum") for name in a)
    for name, value in a.items():
        limit = momentum_tolerance if name.endswith("Momentum") else tolerance
        error, norm = np.linalg.norm(b[name] - value), np.linalg.norm(value)
        assert error <= limit * norm, f"{name}: {error:.3g} of {norm:.3g}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    logdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert train_tiny(logdir, steps=4) == 0
    return logdir


# ----------------------------------------------------------------------------------------------------------- training
def test_a_run_leaves_a_checkpoint_that_describes_itself(trained):
    weights, meta = load_weights(trained)
    assert weights["global_step"] == 4
    assert meta["settings"]["MODE_FPN"] is True
    assert len(meta["class_names"]) == 80
    assert meta["class_names"][0] == "person"
    assert meta["category_ids"][:13] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14] and len(meta["category_ids"]) == 80
    assert set(meta["versions"]) >= {"tensorflow", "numpy", "python"}
    assert losses_of(trained).keys() == {4}
    assert list(trained.glob("events.out.tfevents.*"))


def test_a_run_logs_its_speed_memory_and_first_batch(trained):
    (line,) = map(json.loads, (trained / "log.jsonl").read_text().splitlines())
    assert line["speed/images_per_s"] == pytest.approx(1 / line["speed/step_s"], rel=1e-5)
    assert 0 <= line["speed/data_wait"] <= 1 and line["speed/eta_s"] == 0
    assert 0.2 < line["memory/host_gb"] < 50 and line["gradient_norm"] > 0
    documented = re.findall(r"`([^`\s]+)`", (ROOT / "docs" / "OUTPUTS.md").read_text())
    assert set(line) <= set(documented)
    assert [p.name for p in (trained / "pictures").iterdir()] == ["batch-0-step0000001.jpg"]


def test_the_time_in_which_a_step_waits_for_its_last_batch_is_counted(tmp_path, monkeypatch):
    """The batches of steps 3 and 4 come 0.3 s after the graph has begun to wait for them, which two of them have done
    with two micro-batches."""
    begins, waits = threading.Semaphore(0), []
    make, begin, add = data.BatchMaker.make, training.InputClock.run_begins, training.Meter.add_step

    def late(self, batch, *args):
        if batch >= 4:
            begins.acquire(timeout=100)
            time.sleep(0.3)
        return make(self, batch, *args)

    def run_begins(self):
        begin(self)
        if len(waits) >= 1:  # steps 1 and 2 are done
            begins.release()

    monkeypatch.setattr(data.BatchMaker, "make", late)
    monkeypatch.setattr(training.InputClock, "run_begins", run_begins)
    monkeypatch.setattr(
        training.Meter, "add_step", lambda self, s, waited: waits.append(waited) or add(self, s, waited)
    )
    assert train_tiny(tmp_path / "run", *RPN_ALONE, "TRAIN.ACCUMULATION=2", "TRAIN.PICTURES=0", steps=4) == 0
    # The clock may note the last of the four batches after the end of its step.
    assert len(waits) == 3 and sum(waits[1:]) > 3 * 0.29
    (line,) = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert line["speed/data_wait"] > 0
    assert not (tmp_path / "run" / "pictures").exists()


def logged_steps(logdir) -> tuple[list[int], list[int]]:
    """The steps in log.jsonl, and those of total_loss in TensorBoard's files."""
    lines = [json.loads(line)["step"] for line in (Path(logdir) / "log.jsonl").read_text().splitlines()]
    events = [
        event.step
        for path in sorted(Path(logdir).glob("events.out.tfevents.*"))
        for event in tf.train.summary_iterator(str(path))
        if any(v.tag == "total_loss" for v in event.summary.value)
    ]
    return lines, events


def test_a_resumed_run_continues_as_the_uninterrupted_one(trained, tmp_path):
    logdir = tmp_path / "run"
    assert train_tiny(logdir, steps=2) == 0
    assert weights_of(logdir)["global_step"] == 2
    assert train_tiny(logdir, steps=4) == 0  # the same --logdir continues
    assert_same_weights(weights_of(trained), weights_of(logdir))
    assert losses_of(logdir)[4] == losses_of(trained)[4]  # smoothed over steps before and after
    # From an earlier checkpoint, as after a divergence: what was logged since is replaced, not repeated.
    assert run("--logdir", logdir, "--resume", logdir / "model-2") == 0
    assert_same_weights(weights_of(trained), weights_of(logdir))
    assert losses_of(logdir)[4] == losses_of(trained)[4]
    assert logged_steps(logdir) == ([2, 4], [2, 4])


def test_a_finished_run_has_nothing_left_to_do_until_its_settings_change(tmp_path, caplog):
    """As after a kill between its last checkpoint and its last evaluation. --resume needs no other setting again."""
    logdir = tmp_path / "run"
    assert train_tiny(logdir, *RPN_ALONE, steps=1) == 0
    before = {p.name: p.stat().st_mtime_ns for p in logdir.iterdir()}
    assert run("--resume", "--logdir", logdir, "--config", "TRAIN.EVAL_PERIOD=1") == 0
    assert "has finished its 1 steps; raise TRAIN.MAX_STEPS" in caplog.text
    assert f"not scored yet: ./train.py --evaluate results.json --load {logdir}" in caplog.text
    assert {p.name: p.stat().st_mtime_ns for p in logdir.iterdir()} == before
    assert run("--resume", "--logdir", logdir, "--config", "TRAIN.MAX_STEPS=2") == 0
    assert weights_of(logdir)["global_step"] == 2


def test_another_seed_changes_the_run(trained, tmp_path):
    """That the same one fixes it is seen where a run is interrupted, above."""
    assert train_tiny(tmp_path / "b", "TRAIN.SEED=7", *RPN_ALONE, steps=1) == 0
    one, other = weights_of(trained)["conv0/W"], weights_of(tmp_path / "b")["conv0/W"]
    assert np.linalg.norm(other - one) > np.linalg.norm(one)  # a few steps do not change that much


def test_other_settings_in_the_same_directory_are_refused_with_the_two_ways_on(trained, caplog, capsys):
    before = sorted(p.name for p in trained.iterdir())
    assert train_tiny(trained, "TRAIN.BASE_LR=0.002", steps=9) == 2
    message = last_error(capsys)
    assert "TRAIN.BASE_LR: 0.001 -> 0.002" in message
    assert "--resume" in message
    assert "another --logdir" in message
    assert sorted(p.name for p in trained.iterdir()) == before


def test_a_directory_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert train_tiny(tmp_path) == 2
    assert str(tmp_path) in last_error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def data_of_one_size(folder, images=4) -> list[str]:
    """Settings of the 640 x 480 photographs alone, at a size without padding: then batches of any size agree.

    They are repeated under other ids until there are as many as asked for. Only the classes
    in them are kept, and masks are small: all proposals go to the heads.
    """
    content = json.loads((COCO_MINI / "annotations/instances_train2017.json").read_text())
    found = [i for i in content["images"] if (i["width"], i["height"]) == (640, 480)]
    annotations = content["annotations"]
    content["images"], content["annotations"] = [], []
    for number in range(images):
        image = found[number % len(found)]
        content["images"].append({**image, "id": number + 1})
        for annotation in (a for a in annotations if a["image_id"] == image["id"]):
            identity = len(content["annotations"]) + 1
            content["annotations"].append({**annotation, "id": identity, "image_id": number + 1})
    used = {a["category_id"] for a in content["annotations"]}
    content["categories"] = [c for c in content["categories"] if c["id"] in used]
    path = folder / "one_size.json"
    path.write_text(json.dumps(content))
    return [
        f"DATA.DATASETS={{'one_size':['{path}','{COCO_MINI}/train2017']}}", "DATA.TRAIN=one_size",
        "PREPROC.SHORT_EDGE_SIZE=[96,96]", "PREPROC.MAX_SIZE=128",
        # All proposals of both runs become RoIs: an untrained model's ranking would turn rounding into other samples.
        "RPN.ANCHOR_RATIOS=[1.0]", "RPN.PROPOSAL_NMS_THRESH=1.0", "RPN.TRAIN_PER_LEVEL_NMS_TOPK=768",
        "RPN.TRAIN_FPN_NMS_TOPK=1023", "FRCNN.BATCH_PER_IM=5000", "FRCNN.FG_RATIO=1.0", "TRAIN.GRADIENT_CLIP=None",
        "MRCNN.ROI_SIZE=7",
    ]  # fmt: skip


TWO_REPLICAS = ["TRAIN.CPU_REPLICAS=2", "TRAIN.BATCH_SIZE_PER_GPU=2"]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """joined(settings): the weights after 5 steps of a batch of 4 on one device."""
    done = {}

    def train(*settings):
        if settings not in done:
            logdir = tmp_path_factory.mktemp("joined") / "run"
            assert train_tiny(logdir, *settings, "TRAIN.BATCH_SIZE_PER_GPU=4", steps=5) == 0
            done[settings] = weights_of(logdir)
        return done[settings]

    data = [
        *data_of_one_size(tmp_path_factory.mktemp("data"), 11), "TRAIN.EMA_DECAY=0.9", "TRAIN.LR_POLICY=cosine",
        "TRAIN.FREEZE_PATTERN=^group0/",
    ]  # fmt: skip
    return lambda *settings: (train(*data, *settings), [*data, *settings])


def test_replicas_with_synchronised_norms_equal_one_device_with_the_joined_batch(joined, tmp_path):
    """In float64: the order of a sum must not decide on which side of a threshold a float32 value falls."""
    want, settings = joined("TRAIN.PRECISION=float64", "BACKBONE.NORM=SyncBN")
    assert train_tiny(tmp_path / "run", *settings, *TWO_REPLICAS, steps=5) == 0
    got = weights_of(tmp_path / "run")
    assert_same_weights(want, got, 1e-7, 1e-7)
    assert got["conv0/bn/mean/EMA"].any()


def test_the_gradient_of_accumulated_micro_batches_is_that_of_the_batch(tmp_path):
    """After the first update the momentum is the gradient. Losses are float32, where a third is rounded."""
    data = [*data_of_one_size(tmp_path), "TRAIN.PRECISION=float64"]
    assert train_tiny(tmp_path / "joined", "TRAIN.BATCH_SIZE_PER_GPU=3", *data, steps=1) == 0
    assert train_tiny(tmp_path / "accumulated", "TRAIN.ACCUMULATION=3", *data, steps=1) == 0
    assert_same_weights(weights_of(tmp_path / "joined"), weights_of(tmp_path / "accumulated"), 1e-6, 1e-6)


def test_a_run_of_a_fixed_total_batch_goes_on_with_other_numbers_of_replicas(joined, tmp_path):
    """4 accumulated micro-batches, then 2 on each of 2 replicas, equal the uninterrupted run on one device (4 ranks:
    the job that follows machines, in tests/distributed)."""
    want, settings = joined("TRAIN.PRECISION=float64", "BACKBONE.NORM=FreezeBN", *RPN_ALONE)
    logdir = tmp_path / "run"
    assert train_tiny(logdir, *settings, "TRAIN.TOTAL_BATCH=4", steps=2) == 0
    assert run("--resume", "--logdir", logdir, "--config", "TRAIN.CPU_REPLICAS=2", "TRAIN.MAX_STEPS=5") == 0
    got = weights_of(logdir)
    assert_same_weights(want, got, 1e-7, 1e-7)
    assert not got["conv0/bn/mean/EMA"].any()


def test_a_run_does_not_go_on_with_another_total_batch(trained, capsys):
    before = sorted(p.name for p in trained.iterdir())
    assert run("--resume", "--logdir", trained, "--config", "TRAIN.CPU_REPLICAS=2", "TRAIN.MAX_STEPS=6") == 2
    message = last_error(capsys)
    assert "at step 4 was trained with a total batch of 1 images and would go on with 2" in message
    assert "--resume --config TRAIN.TOTAL_BATCH=1" in message and f"--load {trained}" in message
    assert sorted(p.name for p in trained.iterdir()) == before


def test_training_fits_a_repeated_image(tmp_path):
    """The total loss of one image, seen again and again, falls to less than half."""
    annotations = json.loads((COCO_MINI / "annotations/instances_train2017.json").read_text())
    annotations["images"] = annotations["images"][:1]
    keep = annotations["images"][0]["id"]
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] == keep]
    path = tmp_path / "one.json"
    path.write_text(json.dumps(annotations))
    assert (
        train_tiny(
            tmp_path / "run", f"DATA.DATASETS={{'one':['{path}','{COCO_MINI}/train2017']}}", "DATA.TRAIN=one",
            "PREPROC.SHORT_EDGE_SIZE=[96,96]", "PREPROC.FLIP=False", "TRAIN.BASE_LR=0.01", "TRAIN.WARMUP=20",
            steps=80,
        )
        == 0
    )  # fmt: skip
    losses = losses_of(tmp_path / "run")
    assert losses[80] < 0.5 * losses[20]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_and_evaluates_like_float32(trained, tmp_path, precision):
    logdir = tmp_path / "run"
    assert train_tiny(logdir, f"TRAIN.PRECISION={precision}", "TRAIN.EVAL_PERIOD=1", steps=4) == 0
    assert losses_of(logdir)[4] == pytest.approx(losses_of(trained)[4], rel=0.03)
    metrics = json.loads((logdir / "metrics.json").read_text())
    assert 0 <= metrics["bbox/AP"] <= 1 and 0 <= metrics["segm/AP"] <= 1
    weights = weights_of(logdir)
    assert all(np.isfinite(v).all() and v.dtype != np.float16 for v in weights.values())
    assert ("loss_scale" in weights) == (precision == "float16")


@pytest.mark.parametrize(
    "others",
    [
        [],
        ["TRAIN.CPU_REPLICAS=2", "TRAIN.TOTAL_BATCH=4", "TRAIN.PRECISION=float16", "TRAIN.LOSS_PER_IMAGE=False",
         "TRAIN.EMA_DECAY=0.9", "TRAIN.LR_POLICY=cosine", "TRAIN.LR_FINAL=0.1", "MODE_MASK=False",
         "MODE_RPN_ONLY=True"],
    ],
    ids=["alone", "two replicas and all other switches"],
)  # fmt: skip
def test_a_frozen_pattern_stays_as_loaded(others, trained, tmp_path):
    logdir = tmp_path / "run"
    flags = ["--load", trained]
    assert train_tiny(logdir, "TRAIN.FREEZE_PATTERN='^(conv0|group)'", *others, flags=flags, steps=2) == 0
    before, after = weights_of(trained), weights_of(logdir)
    assert np.array_equal(before["group2/block0/conv1/W"], after["group2/block0/conv1/W"])
    assert not np.array_equal(before["rpn/conv0/W"], after["rpn/conv0/W"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_during_training_ends_the_run_with_its_name(tmp_path, capsys, workers):
    shutil.copytree(COCO_MINI / "train2017", tmp_path / "images")
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    sets = {"cut": [str(COCO_MINI / "annotations/instances_train2017.json"), str(tmp_path / "images")]}
    settings = [f"DATA.DATASETS={sets}", "DATA.TRAIN=cut", f"DATA.NUM_WORKERS={workers}", *RPN_ALONE]
    assert train_tiny(tmp_path / "run", *settings, steps=3) == 2
    assert str(tmp_path / "images") in last_error(capsys)


# As TensorFlow tells it.
FULL_DISK = """Graph execution error:

Detected at node 'save/SaveV2' defined at (most recent call last):
    File "train.py", line 6, in <module>
Node: 'save/SaveV2'
/x/model-1.data-00000-of-00001.tempstate1; No space left on device
\t [[{{node save/SaveV2}}]]
Hint: If you want to see a list of allocated tensors when OOM happens, add report_tensor_allocations_upon_oom."""


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.OutOfRangeError(None, None, "File too large"),
        tf.errors.ResourceExhaustedError(None, None, FULL_DISK),
        OSError(28, "No space left on device", "/x/model-1"),
    ],
)
def test_a_run_whose_checkpoint_cannot_be_written_does_not_say_that_it_finished(tmp_path, capsys, monkeypatch, error):
    """tensorpack takes OutOfRangeError, which TensorFlow raises for a file over a limit, for the end of training."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(training, "save_tf_checkpoint", fail)
    assert train_tiny(tmp_path / "run", *RPN_ALONE, steps=1) == 2
    err = capsys.readouterr()
    assert "finished" not in err.err and "Traceback" not in err.err
    assert re.search(r"checkpoint .*/model-1 cannot be written: (File too large|.*No space left)", err.err)


def test_a_disk_on_which_no_checkpoint_fits_ends_the_run_before_its_first_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    assert train_tiny(tmp_path / "run", *RPN_ALONE, steps=1) == 2
    message = last_error(capsys)
    assert re.search(r"a checkpoint takes \d\.\d MB, but the disk of .*/run has 0\.1 MB free: make room", message)
    assert "step 1/1" not in message


def test_a_file_size_limit_is_named_as_the_reason(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        assert train_tiny(tmp_path / "run", steps=1) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"checkpoint .*/model-1 cannot be written: .*File too large$", last_error(capsys))


@pytest.mark.parametrize("moment", ["_before_train", "_trigger_step"])
def test_a_run_ends_when_its_directory_is_removed(tmp_path, capsys, monkeypatch, moment):
    original = getattr(training.ProgressLog, moment)

    def remove_and_go_on(self):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return original(self)

    monkeypatch.setattr(training.ProgressLog, moment, remove_and_go_on)
    assert train_tiny(tmp_path / "run", *RPN_ALONE, steps=2) == 2
    assert "was deleted or moved while this run trained in it" in last_error(capsys)
    assert newest_checkpoint(tmp_path / "run") is None


def test_weights_that_are_not_finite_are_refused_in_one_line(tmp_path, capsys):
    assert train_tiny(tmp_path / "before", *RPN_ALONE, steps=1) == 0
    weights, meta = load_weights(tmp_path / "before")
    save_npz(tmp_path / "bad.npz", weights | {"conv0/W": weights["conv0/W"] * np.nan}, meta)
    capsys.readouterr()
    assert train_tiny(tmp_path / "run", *RPN_ALONE, flags=["--load", tmp_path / "bad.npz"], steps=1) == 2
    assert "the weights to start from are not finite, or of a norm above 1e19: conv0/W" in last_error(capsys)


def test_a_signal_while_the_input_stalls_saves_what_was_trained(tmp_path, capsys, monkeypatch):
    """The main thread waits inside of TensorFlow for images that do not come, as from a disk that hangs."""
    original, stalled = data.BatchMaker.make, threading.Event()
    trigger_step, trained = training.Checkpoints._trigger_step, threading.Event()

    def step_is_made(self):
        trigger_step(self)
        if self.global_step == 2:
            trained.set()

    def make(self, batch, *args):
        if batch == 2:
            assert trained.wait(120)  # the input is ahead of the steps
            os.kill(os.getpid(), signal.SIGHUP)
            stalled.wait(120)
        return original(self, batch, *args)

    monkeypatch.setattr(data.BatchMaker, "make", make)
    monkeypatch.setattr(training.Checkpoints, "_trigger_step", step_is_made)
    started, before = time.monotonic(), signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    try:
        assert train_tiny(tmp_path / "run", *RPN_ALONE, steps=9) == 128 + signal.SIGHUP
    finally:
        stalled.set()
        signal.signal(signal.SIGHUP, before)
    assert time.monotonic() - started < 110
    assert weights_of(tmp_path / "run")["global_step"] == 2
    assert "stopped by SIGHUP; continue with: ./train.py --resume" in capsys.readouterr().err


def test_a_signal_during_an_evaluation_ends_it_and_the_run_goes_on_later(tmp_path, capsys, monkeypatch):
    import predict

    original, seen = predict.inference_batches, []

    def batches(*args):
        for batch in original(*args):
            seen.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(predict, "inference_batches", batches)
    settings = [*RPN_ALONE, "TRAIN.STEPS_PER_EPOCH=1", "TRAIN.EVAL_PERIOD=1", "TRAIN.CHECKPOINT_PERIOD=5"]
    assert train_tiny(tmp_path / "run", *settings, steps=4) == 128 + signal.SIGTERM
    assert len(seen) <= 2
    assert weights_of(tmp_path / "run")["global_step"] == 1
    assert "stopped by SIGTERM; continue with" in capsys.readouterr().err


def test_a_signal_before_the_first_step_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_training_split", lambda cfg: os.kill(os.getpid(), signal.SIGTERM))
    assert train_tiny(tmp_path / "run") == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert "stopped by SIGTERM; there was nothing to save yet" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_training_runs_in_another_thread(tmp_path):
    """As in a notebook's or a server's: signals belong to the main thread alone."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train_tiny(tmp_path / "run", *RPN_ALONE, steps=1)))
    thread.start()
    thread.join()
    assert codes == [0] and weights_of(tmp_path / "run")["global_step"] == 1


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    logdir = tmp_path / "run"
    command = [
        sys.executable,
        "train.py",
        "--logdir",
        str(logdir),
        "--config",
        *TINY_TRAINING,
        *RPN_ALONE,
        "TRAIN.MAX_STEPS=100000",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "first step" in line:
                break
        time.sleep(0.5)
        for _ in range(2):  # from the launcher and from the scheduler
            process.send_signal(signal.SIGTERM)
            time.sleep(0.03)
        rest = process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert f"./train.py --resume --logdir {logdir}" in rest
    assert "Traceback" not in rest
    assert newest_checkpoint(logdir) is not None


# ------------------------------------------------------------------------------------------------ loading and running
def test_weights_load_from_a_run_a_checkpoint_and_an_npz_alike(trained, tmp_path, capsys):
    weights, meta = load_weights(trained)
    save_npz(tmp_path / "model.npz", weights, meta)
    image = next((COCO_MINI / "val2017").glob("*.jpg"))
    entries = []
    for i, source in enumerate([trained, newest_checkpoint(trained), tmp_path / "model.npz"]):
        out = tmp_path / str(i)
        assert run("--predict", image, "--load", source, "--output", out, "--no-window") == 0
        entries.append(json.loads((out / "predictions.json").read_text()))
        assert cv2.imread(str(out / image.name)) is not None
    assert entries[0] == entries[1] == entries[2]
    assert "loaded" in capsys.readouterr().err


def test_a_damaged_image_of_an_evaluation_is_named_and_costs_no_other_result(trained, tmp_path, capsys):
    shutil.copytree(COCO_MINI / "val2017", tmp_path / "val2017")
    damaged = sorted((tmp_path / "val2017").glob("*.jpg"))[0]
    damaged.write_bytes(damaged.read_bytes()[:300])
    annotations = COCO_MINI / "annotations/instances_val2017.json"
    data = [f"DATA.DATASETS={{'mine':['{annotations}','{tmp_path}/val2017']}}", "DATA.VAL=mine"]
    out = tmp_path / "results.json"
    settings = ["--config", "TEST.RESULT_SCORE_THRESH=0.0", *data]
    assert run("--evaluate", out, "--load", trained, *settings) == 2
    message = last_error(capsys)
    assert "1 of the images could not be read" in message and damaged.name in message
    images = {i["file_name"]: i["id"] for i in json.loads(annotations.read_text())["images"]}
    assert {r["image_id"] for r in json.loads(out.read_text())} == set(images.values()) - {images[damaged.name]}
    assert "bbox/AP" in json.loads((tmp_path / "results.metrics.json").read_text())


def test_predict_takes_files_and_folders_and_writes_what_it_found(trained, tmp_path):
    files = sorted((COCO_MINI / "val2017").glob("*.jpg"))
    settings = ["--config", "TEST.RESULT_SCORE_THRESH=0.0", "TEST.BATCH_SIZE=2"]
    assert (
        run("--predict", COCO_MINI / "val2017", "--load", trained, "--output", tmp_path, "--no-window", *settings) == 0
    )
    entries = json.loads((tmp_path / "predictions.json").read_text())
    assert sorted(Path(e["file"]).name for e in entries) == [f.name for f in files]
    categories = json.loads((COCO_MINI / "annotations" / "instances_val2017.json").read_text())["categories"]
    ids = {c["name"]: c["id"] for c in categories}
    for entry in entries:
        image = cv2.imread(entry["file"])
        assert (entry["height"], entry["width"]) == image.shape[:2]
        assert entry["detections"]
        for found in entry["detections"]:
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 < x2 <= entry["width"]
            assert 0 <= y1 < y2 <= entry["height"]
            assert found["category_id"] == ids[found["class"]]
            assert found["mask"]["size"] == [entry["height"], entry["width"]]


def test_evaluation_without_detections_gives_zero_not_nothing(trained, tmp_path):
    out = tmp_path / "results.json"
    assert run("--evaluate", out, "--load", trained, "--config", "TEST.RESULT_SCORE_THRESH=0.999") == 0
    assert json.loads(out.read_text()) == []
    metrics = json.loads((tmp_path / "results.metrics.json").read_text())
    assert metrics["bbox/AP"] == 0
    assert metrics["segm/AP"] == 0


def test_evaluation_scores_every_set_and_its_ids_are_the_jsons(trained, tmp_path):
    out = tmp_path / "results.json"
    code = run(
        "--evaluate", out, "--load", trained, "--report", tmp_path / "report", "--config", "TEST.BATCH_SIZE=2",
        "TEST.RESULT_SCORE_THRESH=0.0", "DATA.VAL=['coco_val2017','coco_train2017']",
    )  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "results-coco_train2017.json").read_text())
    truth = json.loads((COCO_MINI / "annotations/instances_train2017.json").read_text())
    assert {r["image_id"] for r in results} == {i["id"] for i in truth["images"]}
    assert {r["category_id"] for r in results} <= {c["id"] for c in truth["categories"]}
    metrics = json.loads((tmp_path / "results.metrics.json").read_text())
    assert "coco_val2017/bbox/AP" in metrics
    assert "coco_train2017/segm/AP50" in metrics
    for name in ("coco_val2017", "coco_train2017"):  # and writes a report of each
        report = json.loads((tmp_path / "report" / name / "report.json").read_text())
        for kind in ("bbox", "segm"):
            ap = report["models"][0]["summary"][kind]["AP"]["value"]
            assert ap == pytest.approx(metrics[f"{name}/{kind}/AP"], abs=1e-12)
        assert report["data"]["anchors"]["objects"] > 0 and report["pictures"]["worst"][0]


def test_one_augmented_view_of_the_plain_size_scores_as_without(trained, tmp_path):
    common = ["TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=20", "DATA.VAL=coco_train2017"]
    augmented = ["TEST.AUG_SHORT_EDGES=[96]", "TEST.AUG_FLIP=False", "TEST.AUG_MAX_SIZE=192"]
    assert run("--evaluate", tmp_path / "a.json", "--load", trained, "--config", *common) == 0
    assert run("--evaluate", tmp_path / "b.json", "--load", trained, "--config", *common, *augmented) == 0
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert [(e["image_id"], e["category_id"]) for e in a] == [(e["image_id"], e["category_id"]) for e in b]
    np.testing.assert_allclose([e["bbox"] for e in a], [e["bbox"] for e in b], atol=0.01)
    np.testing.assert_allclose([e["score"] for e in a], [e["score"] for e in b], atol=1e-5)


def test_several_views_of_images_in_a_batch_come_back_in_their_own_frames(trained, tmp_path):
    settings = ["--config", "TEST.RESULT_SCORE_THRESH=0.0", "TEST.BATCH_SIZE=2", "TEST.AUG_SHORT_EDGES=[64,96]"]
    folder = COCO_MINI / "val2017"
    assert run("--predict", folder, "--load", trained, "--output", tmp_path, "--no-window", *settings) == 0
    entries = json.loads((tmp_path / "predictions.json").read_text())
    assert len(entries) == len(list(folder.glob("*.jpg")))
    for entry in entries:
        boxes = np.array([d["box"] for d in entry["detections"]])
        assert (boxes >= 0).all() and (boxes[:, 2:] <= [entry["width"], entry["height"]]).all()
        assert boxes[:, 2].max() > entry["width"] / 2  # not in the frame of a view, which is far smaller
        assert {tuple(d["mask"]["size"]) for d in entry["detections"]} == {(entry["height"], entry["width"])}


def test_evaluations_during_training_are_without_augmentation_and_say_so(tmp_path, capsys, monkeypatch):
    import predict

    seen, score = [], predict.evaluate_split

    def spy(predictors, split, cfg, *args, **options):
        seen.append(cfg.TEST.AUG_SHORT_EDGES)
        return score(predictors, split, cfg, *args, **options)

    monkeypatch.setattr(predict, "evaluate_split", spy)
    assert (
        train_tiny(tmp_path / "run", "TRAIN.EVAL_PERIOD=1", "TEST.AUG_SHORT_EDGES=[64,96]", "MODE_MASK=False", steps=1)
        == 0
    )
    assert seen == [[]]
    assert "test-time augmentation is off for evaluation during training" in capsys.readouterr().err
    assert load_weights(tmp_path / "run")[1]["settings"]["TEST.AUG_SHORT_EDGES"] == [64, 96]


def test_training_on_two_replicas_evaluates_at_the_end_when_asked(tmp_path):
    logdir = tmp_path / "run"
    assert train_tiny(logdir, *RPN_ALONE, "TRAIN.EVAL_PERIOD=1", "TRAIN.CPU_REPLICAS=2", steps=2) == 0
    recall = json.loads((logdir / "metrics.json").read_text())["proposals/AR@1000"]
    assert run("--evaluate", tmp_path / "o.json", "--load", logdir) == 0
    assert recall == json.loads((tmp_path / "o.metrics.json").read_text())["proposals/AR@1000"] and 0 <= recall <= 1


def test_a_report_that_cannot_be_written_leaves_results_and_scores(trained, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise UserError("--report: the disk is full")

    monkeypatch.setattr(train, "write_report", fail)
    out = tmp_path / "results.json"
    settings = ["--config", "TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=5"]
    assert run("--evaluate", out, "--load", trained, "--report", tmp_path / "report", *settings) == 2
    assert last_error(capsys) == "--report: the disk is full"
    assert json.loads(out.read_text()) and "bbox/AP" in json.loads((tmp_path / "results.metrics.json").read_text())


def test_a_mismatch_stops_and_partial_loading_or_trimming_goes_on(trained, tmp_path, capsys):
    annotations = json.loads((COCO_MINI / "annotations/instances_train2017.json").read_text())
    annotations["categories"] = annotations["categories"][:13]
    kept = {c["id"] for c in annotations["categories"]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["category_id"] in kept]
    path = tmp_path / "thirteen.json"
    path.write_text(json.dumps(annotations))
    settings = [f"DATA.DATASETS={{'thirteen':['{path}','{COCO_MINI}/train2017']}}", "DATA.TRAIN=thirteen"]
    assert train_tiny(tmp_path / "a", *settings, flags=["--load", trained], steps=1) == 2
    assert "fastrcnn/outputs" in last_error(capsys)
    assert train_tiny(tmp_path / "b", *settings, flags=["--load", trained, "--trim-heads"], steps=1) == 0
    assert "fastrcnn/outputs/class/W" in capsys.readouterr().err
    still = ["TRAIN.BASE_LR=0.0", "TRAIN.WARMUP_INIT_LR=0.0"]
    assert train_tiny(tmp_path / "c", *settings, *still, flags=["--load", trained, "--match-classes"], steps=1) == 0
    kept, before = weights_of(tmp_path / "c"), weights_of(trained)
    np.testing.assert_array_equal(kept["fastrcnn/outputs/class/W"], before["fastrcnn/outputs/class/W"][:, :14])
    np.testing.assert_array_equal(kept["maskrcnn/conv/b"], before["maskrcnn/conv/b"][:13])
    # Equally many classes by chance: their tensors start anew all the same, and nothing else does.
    assert train_tiny(tmp_path / "d", *still, flags=["--load", trained, "--trim-heads"], steps=1) == 0
    trimmed = weights_of(tmp_path / "d")
    changed = {n for n in before if n in trimmed and not np.array_equal(before[n], trimmed[n])}
    changed = {n for n in changed if not n.endswith("Momentum")} - {"global_step"}
    assert {n for n in changed if n.endswith("W")} == {
        "fastrcnn/outputs/class/W", "fastrcnn/outputs/box/W", "maskrcnn/conv/W",
    }  # fmt: skip
    weights, meta = load_weights(tmp_path / "b")
    assert weights["fastrcnn/outputs/class/b"].shape == (14,)
    assert meta["class_names"] == [c["name"] for c in annotations["categories"]]


def test_open_images_train_with_what_they_say_and_their_own_score(tmp_path):
    """Open Images as published: csv files, group-of boxes, verified classes, hierarchy, images without boxes, the
    official metric, the submission file."""
    oid = tmp_path / "oid"
    shutil.copytree(DATA / "golden_oid", oid)  # its cache is written beside the files
    sets = {f"oid_{s}": ["openimages", str(oid), s, f"images={oid}/images/{s}", "expand=True"]
            for s in ("train", "validation")}  # fmt: skip
    logdir = tmp_path / "run"
    code = train_tiny(
        logdir, f"DATA.DATASETS={sets}", "DATA.TRAIN=oid_train", "DATA.VAL=oid_validation", "MODE_MASK=False",
        "DATA.SAMPLING=repeat_factor", "DATA.REPEAT_THRESHOLD=0.9", "DATA.FILTER_EMPTY=False",
        "FRCNN.FEDERATED_LOSS=True", "FRCNN.CROWD_OVERLAP_THRESH=0.7", "RPN.CROWD_OVERLAP_THRESH=0.7", steps=2,
    )  # fmt: skip
    assert code == 0
    out = tmp_path / "results.json"
    settings = ["TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=20"]
    assert run("--evaluate", out, "--load", logdir, "--config", *settings) == 0
    metrics = json.loads((tmp_path / "results.metrics.json").read_text())
    assert 0 <= metrics["oid-v2/mAP"] <= 1
    submission = (tmp_path / "results-submission.csv").read_text().splitlines()
    assert submission[0] == "ImageID,PredictionString"
    assert len(submission) == 1 + len(list((oid / "images/validation").glob("*.jpg")))


def test_a_plain_folder_layout_is_found_by_the_base_directory_alone(tmp_path):
    """annotations/train.json beside train/, val.json beside val/: the Open Images example of tensorpack has it so."""
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / "annotations" / f"{part}.json").symlink_to(COCO_MINI / f"annotations/instances_{part}2017.json")
        (tmp_path / part).symlink_to(COCO_MINI / f"{part}2017")
    logdir = tmp_path / "run"
    assert train_tiny(logdir, f"DATA.BASEDIR={tmp_path}", *RPN_ALONE, steps=1) == 0
    assert run("--evaluate", tmp_path / "o.json", "--load", logdir) == 0
    assert "proposals/AR@1000" in json.loads((tmp_path / "o.metrics.json").read_text())


# ------------------------------------------------------------------------------------------------------------- errors
def last_error(capsys) -> str:
    """The message of the one ERROR line of standard error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)
    lines = [line for line in text.splitlines() if " ERROR " in line]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0].split(" ERROR ", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config", "MODE_FNP=True"], "MODE_FPN"),
        (["--config", "DATA.BASEDIR=/nowhere"], "/nowhere"),
        (["--config", f"DATA.BASEDIR={COCO_MINI}", "DATA.TRAIN=coco_train2071"], "coco_train2017"),
        (["--load", "/nowhere/model.npz"], "/nowhere/model.npz"),
        (["--config", "BACKBONE.WEIGHTS=/nowhere/R50.npz"], "/nowhere/R50.npz"),
        (["--resume", "--logdir", "/nowhere/run"], "/nowhere/run"),
        (["--predict", "/nowhere/a.jpg", "--load", "LOGDIR"], "/nowhere/a.jpg"),
        (["--evaluate", "o.json", "--load", "LOGDIR", "--config", "DATA.BASEDIR=/nowhere"], "/nowhere"),
        (["--evaluate", "o.json", "--load", "LOGDIR", "--config", "DATA.VAL=[]"], "DATA.VAL"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, trained, capsys):
    assert run(*[trained if a == "LOGDIR" else a for a in arguments]) == 2
    assert named in last_error(capsys)


def test_an_unreadable_image_is_named(trained, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not a picture")
    assert run("--predict", bad, "--load", trained) == 2
    assert str(bad) in last_error(capsys)


@pytest.mark.slow
def test_tensorflow_is_quiet_and_a_flag_brings_it_back(trained, tmp_path):
    image = next((COCO_MINI / "val2017").glob("*.jpg"))

    def stderr(*flags):
        command = [
            sys.executable, "train.py", "--predict", str(image), "--load", str(trained), "--output", str(tmp_path),
            "--no-window", *flags,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "PACKRCNN"))}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
        return done.stderr

    noises = ("oneDNN", "cudart", "absl", "deprecated", "Warning", "np_resource")
    quiet, loud = stderr(), stderr("--verbose-tf")
    assert not [noise for noise in noises if noise in quiet]
    assert [noise for noise in noises if noise in loud]  # which of them depends on the machine


def test_a_backbone_brings_its_settings_which_the_command_line_overrides(tmp_path, capsys):
    path = tmp_path / "R50.npz"
    stored = {"BACKBONE.STRIDE_1X1": True, "BACKBONE.BN_EPSILON": 2e-5, "BACKBONE.FREEZE_AT": 4, "MODE_FPN": True,
              "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0]}  # fmt: skip
    save_npz(path, {"conv0/W": np.zeros([7, 7, 3, 64], np.float32)}, {"settings": stored})
    assert run("--print-config", "--config", f"BACKBONE.WEIGHTS={path}", "BACKBONE.BN_EPSILON=1e-5") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert {"BACKBONE.STRIDE_1X1=True", "PREPROC.PIXEL_STD=[1.0, 1.0, 1.0]", "BACKBONE.BN_EPSILON=1e-05"} <= {*lines}
    assert {"BACKBONE.FREEZE_AT=2", "MODE_FPN=False"} <= {*lines}  # choices of a run, not facts of a backbone
    assert f"settings stored in {path}: BACKBONE.STRIDE_1X1=True, PREPROC.PIXEL_STD=[1.0, 1.0, 1.0]" in err
    assert "BN_EPSILON" not in err


def test_the_version_is_that_of_the_project_and_the_revision_of_the_checkout(capsys):
    assert run("--version") == 0
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    revision = git_revision()
    assert capsys.readouterr().out == f"packrcnn {version}{f' (git {revision})' * (revision != 'unknown')}\n"


def test_print_config_shows_the_settings_in_effect(trained, capsys):
    assert run("--print-config", "--config", "MODE_FPN=True") == 0
    out = capsys.readouterr().out
    assert "MODE_FPN=True" in out.splitlines()
    assert "TRAIN.LR_SCHEDULE='auto'" in out.splitlines()


def test_browsing_with_a_model_shows_its_proposals_and_the_sampled_rois(trained, tmp_path):
    from tools import browse

    assert browse.main(["--load", str(trained), "--batches", "1", "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page/index.html").read_text()
    found = re.search(r"batch 0, image 0: (\d+) sampled RoIs, (\d+) foreground", page)
    # TINY_MODEL samples 32, a quarter of them foreground at most; the objects themselves are among the candidates.
    assert 0 < int(found[2]) <= 8 and int(found[2]) < int(found[1]) <= 32
    assert re.search(r"batch 0, image 0: the best \d+ of \d+ proposals", page)
