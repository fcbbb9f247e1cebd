"""Averaged weights (TRAIN.EMA_DECAY): their values, that runs resume with them, and that models are run with them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_train import COCO_MINI, assert_same_weights, run, train_tiny, weights_of

import inference
import training
from dataset_split import DatasetSplit
from trainers import DetectionOptimizer, average_decay_tensor
from utils.checkpoint import load_weights, without_averages
from utils.tf_v1 import tf

pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
# Without masks the graphs are built sooner. SyncBN has statistics that are averaged too.
SMALL = ["MODE_MASK=False", "BACKBONE.NORM=SyncBN"]
AVERAGED = [*SMALL, "TRAIN.EMA_DECAY=0.2", "TRAIN.STEPS_PER_EPOCH=1"]


def decay_of(step, decay=0.2):
    return min(decay, (1 + step) / (10 + step))


def assert_is_average(now, before, step, decay=0.2):
    """The averages of checkpoint `now` are those of `before` after the update that makes step + 1."""
    names = [n for n in now if n.startswith("EMA/")]
    for name in names:
        d, old = decay_of(step, decay), before.get(name, before[name.removeprefix("EMA/")]).astype(np.float64)
        expected = d * old + (1 - d) * now[name.removeprefix("EMA/")]
        np.testing.assert_allclose(now[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
    assert len(names) > 50


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> tuple[Path, list[bool]]:
    """A run of one step, and for each operation in its graph that counts a step if it waits for the update."""
    logdir = tmp_path_factory.mktemp("runs") / "plain"
    waits = []
    original = training.ProgressLog._before_train

    def before_train(self):
        (step,) = [v for v in tf.global_variables() if v.op.name == "global_step"]
        counts = [op for op in step.graph.get_operations() if op.type == "AssignAddVariableOp"]
        waits.extend(self.trainer.train_op in op.control_inputs for op in counts if op.inputs[0] is step.handle)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ProgressLog, "_before_train", before_train)
        assert train_tiny(logdir, *SMALL, steps=1) == 0
    return logdir, waits


@pytest.fixture(scope="module")
def plain(plain_run) -> Path:
    return plain_run[0]


@pytest.fixture(scope="module")
def averaged(plain, tmp_path_factory) -> Path:
    """Four steps from the weights of `plain`, each with its checkpoint."""
    logdir = tmp_path_factory.mktemp("runs") / "averaged"
    assert train_tiny(logdir, *AVERAGED, "TRAIN.FREEZE_PATTERN='^fpn/'", steps=4, flags=["--load", plain]) == 0
    return logdir


# ---------------------------------------------------------------- values
@pytest.mark.quick
def test_the_decay_rises_to_its_setting():
    with tf.Graph().as_default(), tf.Session() as sess:
        step = tf.placeholder(tf.int64, [])
        decay = average_decay_tensor(0.9998, step)
        found = [sess.run(decay, {step: s}) for s in (0, 1, 90, 44980, 45000, 10**6)]
    assert found == pytest.approx([0.1, 2 / 11, 0.91, 44981 / 44990, 0.9998, 0.9998], rel=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("loss_scale", [False, True])
def test_averages_follow_updates_and_not_those_that_are_skipped(loss_scale):
    with tf.Graph().as_default(), tf.Session() as sess:
        weight = tf.get_variable("layer/W", [2], tf.float32, tf.ones_initializer())
        gradient = tf.placeholder(tf.float32, [2])
        optimizer = DetectionOptimizer(0.5, 0.0, 0.0, None, loss_scale, tf.constant(0.75))
        update = optimizer.apply_gradients([(gradient, weight)])
        (average,) = [v for v in tf.global_variables() if v.op.name == "EMA/layer/W"]
        assert average not in tf.trainable_variables()
        sess.run(tf.global_variables_initializer())
        sess.run(update, {gradient: [1.0, -2.0]})
        np.testing.assert_allclose(sess.run(weight), [0.5, 2.0])
        np.testing.assert_allclose(sess.run(average), [0.125, 0.5])
        if loss_scale:
            sess.run(update, {gradient: [np.inf, 0.0]})
            np.testing.assert_allclose(sess.run(average), [0.125, 0.5])
        sess.run(update, {gradient: [0.0, 0.0]})
        np.testing.assert_allclose(sess.run(average), [0.21875, 0.875])


def test_the_step_is_counted_after_the_update_that_reads_it(plain_run):
    assert plain_run[1] == [True]


def test_a_run_averages_what_is_trained_and_the_statistics_step_by_step(plain, averaged):
    steps = [weights_of(plain), *(load_weights(averaged / f"model-{n}")[0] for n in range(1, 5))]
    for n in range(4):
        assert_is_average(steps[n + 1], steps[n], n)
    names = {name.removeprefix("EMA/") for name in steps[1] if name.startswith("EMA/")}
    trained = {name.removesuffix("/Momentum") for name in steps[1] if name.endswith("/Momentum")}
    statistics = {
        name for name in steps[1] if name.endswith(("/bn/mean/EMA", "/bn/variance/EMA")) and name[:4] != "EMA/"
    }
    assert names == trained | statistics and len(statistics) > 10
    assert not any(name.startswith("fpn/") for name in names)  # frozen: always its own average
    assert not any(name.startswith("EMA/") for name in steps[0])  # off by default
    assert np.abs(steps[4]["EMA/conv0/W"] - steps[4]["conv0/W"]).max() > 0


def test_a_resumed_run_continues_the_averages_exactly(averaged, tmp_path):
    logdir = tmp_path / "run"
    shutil.copytree(averaged, logdir)
    for file in [*logdir.glob("model-3*"), *logdir.glob("model-4*")]:
        file.unlink()
    assert run("--resume", "--logdir", logdir) == 0
    assert_same_weights(weights_of(averaged), weights_of(logdir))


def test_averages_turned_on_later_start_from_the_weights(plain, tmp_path):
    logdir = tmp_path / "run"
    shutil.copytree(plain, logdir)
    assert run("--resume", "--logdir", logdir, "--config", "TRAIN.EMA_DECAY=0.15", "TRAIN.MAX_STEPS=2") == 0
    assert_is_average(weights_of(logdir), weights_of(plain), 1, 0.15)


# ---------------------------------------------------------------- use
def variables_of_predictor(monkeypatch, load, folder, *settings):
    """{name: value} in the graph that --predict runs."""
    sessions = []
    original = inference.start_session
    monkeypatch.setattr(inference, "start_session", lambda *args: sessions.append(original(*args)) or sessions[0])
    image = next((COCO_MINI / "val2017").glob("*.jpg"))
    config = ["--config", *settings] if settings else []
    assert run("--predict", image, "--load", load, "--output", folder / "out", "--no-window", *config) == 0
    with sessions[0].graph.as_default():
        return sessions[0].run({v.op.name: v for v in tf.global_variables()})


@pytest.mark.parametrize("use", [True, False])
def test_prediction_uses_the_averages_unless_told_not_to(averaged, tmp_path, monkeypatch, use):
    weights = weights_of(averaged)
    settings = [] if use else ["TEST.USE_EMA=False"]
    found = variables_of_predictor(monkeypatch, averaged, tmp_path, *settings)
    assert len(found) > 50
    for name, value in found.items():
        np.testing.assert_array_equal(value, weights.get(f"EMA/{name}" if use else name, weights[name]), err_msg=name)


def test_fine_tuning_starts_from_the_averages(averaged, tmp_path):
    logdir = tmp_path / "run"
    still = ["TRAIN.BASE_LR=0.0", "TRAIN.WARMUP_INIT_LR=0.0", "TRAIN.EMA_DECAY=0.5", "BACKBONE.FREEZE_AT=5"]
    assert train_tiny(logdir, *still, "MODE_MASK=False", steps=1, flags=["--load", averaged]) == 0
    before, after = weights_of(averaged), weights_of(logdir)
    for name in ("rpn/conv0/W", "conv0/W", "group3/block0/conv1/bn/mean/EMA", "fastrcnn/fc6/W"):
        np.testing.assert_array_equal(after[name], before[f"EMA/{name}"])
        assert not np.array_equal(before[name], before[f"EMA/{name}"])
    np.testing.assert_array_equal(after["EMA/rpn/conv0/W"], after["rpn/conv0/W"])


def scores_and_boxes(results):
    return sorted((r["image_id"], -round(r["score"], 5), [round(v, 1) for v in r["bbox"]]) for r in results)


def test_evaluation_while_training_is_that_of_the_averages_on_every_replica(plain, tmp_path, monkeypatch):
    logdir = tmp_path / "run"
    scored = []
    monkeypatch.setattr(DatasetSplit, "evaluate", lambda _, results: scored.append(results) or {"bbox/AP": 0.0})
    sharp = ["TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=10"]
    assert train_tiny(
        logdir, *AVERAGED, *sharp, "TRAIN.BASE_LR=0.01", "TRAIN.EVAL_PERIOD=2", "TRAIN.CPU_REPLICAS=2", steps=2,
        flags=["--load", plain],
    ) == 0  # fmt: skip
    weights = weights_of(logdir)
    assert_is_average(weights, load_weights(logdir / "model-1")[0], 1)
    assert not any(re.match(r"(EMA/)?tower", name) for name in weights)
    for use in (True, False):
        out = tmp_path / f"{use}.json"
        assert run("--evaluate", out, "--load", logdir, "--config", f"TEST.USE_EMA={use}") == 0
        assert json.loads(out.read_text())
    during, after, without = map(scores_and_boxes, scored)
    assert during == after and len(during) >= 20
    assert during != without


@pytest.mark.quick
def test_only_averages_of_known_variables_are_taken():
    weights = {
        "conv0/W": np.zeros(2), "EMA/conv0/W": np.ones(2), "conv0/bn/mean/EMA": np.zeros(3), "fc/W": np.zeros(4),
        "EMA/QueueInput/queue_size": np.ones(1), "conv0/W/Momentum": np.full(2, 3.0),
    }  # fmt: skip
    used, count = without_averages(weights, True)
    assert count == 1 and (used["conv0/W"] == 1).all()
    assert sorted(used) == sorted(weights.keys() - {"EMA/conv0/W"})
    assert all(used[n] is weights[n] for n in used if n != "conv0/W")
    last, _ = without_averages(weights, False)
    assert sorted(last) == sorted(used) and (last["conv0/W"] == 0).all()
