"""Evaluations of whole runs: the best checkpoint and the end of runs that are killed, and other processes' scores."""

import json
import re

import pytest
from test_train import assert_same_weights, logged_steps, run, train_tiny, weights_of
from tiny import RPN_ALONE

import predict
import training
import training_async
import training_evaluation
from utils.checkpoint import best_score, load_weights, newest_checkpoint, read_checkpoint_meta
from utils.tf_v1 import tf

pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
# The first stage alone: starts are fast. Its evaluations' scores are made up.
EVERY_STEP = [*RPN_ALONE, "TRAIN.STEPS_PER_EPOCH=1", "TRAIN.EVAL_PERIOD=1"]
METRIC = "proposals/AR@1000"
CLASS = "bbox/AP_per_class/cat"


class Killed(BaseException):
    """The process ends here, as far as its files are concerned."""


def evaluations(logdir) -> dict[int, dict]:
    """The evaluations in log.jsonl; each step must be there once."""
    lines = map(json.loads, (logdir / "log.jsonl").read_text().splitlines())
    found = [line for line in lines if "total_loss" not in line]
    assert len({line["step"] for line in found}) == len(found)
    return {line.pop("step"): line for line in found}


def scripted(monkeypatch, scores: dict[int, float]) -> list[int]:
    """Evaluations give these scores by step; returns the list of steps that are evaluated."""
    steps: list[int] = []

    def builder(*args, **options):
        def evaluate(sess, should_stop=None, on_results=None):
            steps.append(int(tf.train.global_step(sess, tf.train.get_global_step(sess.graph))))
            return {METRIC: scores[steps[-1]], CLASS: 0.5}

        return lambda: evaluate

    monkeypatch.setattr(predict, "evaluation_builder", builder)
    return steps


def dying(monkeypatch, owner, name, occurrence=1):
    """The process is killed when this function is called for the nth time."""
    original, calls = getattr(owner, name), [0]

    def function(*args, **options):
        calls[0] += 1
        if calls[0] == occurrence:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(owner, name, function)


SCORES = {1: 0.1, 2: 0.4, 3: 0.3, 4: 0.5, 5: 0.2, 6: 0.2, 7: 0.9}
SETTINGS = [*EVERY_STEP, "TRAIN.PATIENCE=2", "TRAIN.KEEP_CHECKPOINTS=2"]


def test_a_run_killed_between_any_two_writes_ends_with_the_same_best_checkpoint(tmp_path, monkeypatch, capsys):
    alone, logdir = tmp_path / "alone", tmp_path / "killed"
    with monkeypatch.context() as patch:
        assert scripted(patch, SCORES) == []
        assert train_tiny(alone, *SETTINGS, steps=9) == 0
    assert f"{METRIC} has not improved by more than 0 in 2 evaluations (TRAIN.PATIENCE=2)" in capsys.readouterr().err
    assert best_score(alone) == {"metric": METRIC, "score": 0.5, "step": 4}
    assert weights_of(alone)["global_step"] == 6 and weights_of(alone / "best")["global_step"] == 4
    assert sorted(p.name for p in alone.glob("model-*.index")) == ["model-5.index", "model-6.index"]

    logged = {step: {METRIC: score, CLASS: 0.5} for step, score in SCORES.items() if step < 7}
    moments = [
        (training_evaluation, "write_json", 1),  # the scores of step 1 are known and not written anywhere
        (training.Checkpoints, "describe", 2),  # those of step 2 are in the log alone
        (training_evaluation, "keep_best", 2),  # stored, while model-best is still that of step 1
        (training, "save_tf_checkpoint", 3),  # complete, before the checkpoint of step 5
    ]
    for owner, name, occurrence in moments:
        with monkeypatch.context() as patch:
            scripted(patch, SCORES)
            dying(patch, owner, name, occurrence)
            with pytest.raises(Killed):
                train_tiny(logdir, *SETTINGS, steps=9)
    with monkeypatch.context() as patch:
        evaluated = scripted(patch, SCORES)
        assert train_tiny(logdir, *SETTINGS, steps=9) == 0
        assert evaluated[-1] == 6
        capsys.readouterr()
        assert train_tiny(logdir, *SETTINGS, steps=9) == 0  # finished
        assert evaluated[-1] == 6
        assert f"has ended at step 6: {METRIC} has not improved" in capsys.readouterr().err
        assert best_score(logdir) == best_score(alone)
        assert_same_weights(weights_of(alone), weights_of(logdir))
        assert_same_weights(weights_of(alone / "best"), weights_of(logdir / "best"))
        assert evaluations(logdir) == evaluations(alone) == logged
        metas = [read_checkpoint_meta(newest_checkpoint(folder)) for folder in (alone, logdir)]
        assert metas[0]["evaluations"] == metas[1]["evaluations"] and metas[0]["stopped"] == metas[1]["stopped"]

        # From an earlier checkpoint, and with another setting.
        more = ["--config", "TRAIN.PATIENCE=None", "TRAIN.MAX_STEPS=7"]
        assert run("--resume", logdir / "model-5", *more) == 0
        assert evaluated[-2:] == [6, 7] and best_score(logdir)["step"] == 7
        assert "the best model is" in capsys.readouterr().err


def test_a_run_killed_in_its_last_evaluation_is_scored_when_it_is_started_again(tmp_path, monkeypatch, capsys):
    logdir = tmp_path / "run"
    settings = [*RPN_ALONE, "TRAIN.EVAL_PERIOD=1", f"TRAIN.TARGET={{'{METRIC}':0.2}}"]
    with monkeypatch.context() as patch:
        scripted(patch, {2: 0.3})
        dying(patch, training_evaluation, "write_json")
        with pytest.raises(Killed):
            train_tiny(logdir, *settings, steps=2)
    assert not (logdir / "metrics.json").exists()
    evaluated = scripted(monkeypatch, {2: 0.3})
    for _ in range(2):
        assert train_tiny(logdir, *settings, steps=2) == 0
    assert evaluated == [2]
    assert json.loads((logdir / "metrics.json").read_text()) == {METRIC: 0.3, CLASS: 0.5}
    assert best_score(logdir)["step"] == 2
    assert "has finished its 2 steps" in capsys.readouterr().err


def test_an_unknown_metric_ends_the_run_before_it_begins(tmp_path, capsys):
    assert train_tiny(tmp_path / "run", *EVERY_STEP, "TRAIN.BEST_METRIC=proposals/AR") == 2
    assert (
        "TRAIN.BEST_METRIC: the evaluations on coco_val2017 give no proposals/AR; the nearest"
        in capsys.readouterr().err
    )


# ----------------------------------------------------------------------------------------------------- other processes
# One class, so that boxes of an untrained model find some objects.
REAL = [
    "DATA.CLASS_NAMES=person", "DATA.VAL=coco_train2017", "TRAIN.STEPS_PER_EPOCH=2", "TRAIN.EVAL_PERIOD=1",
    "TRAIN.VAL_LOSS=True", "TRAIN.EMA_DECAY=0.9", "TEST.RESULT_SCORE_THRESH=0.0", "TRAIN.BEST_METRIC=-val_loss",
]  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A run that evaluates in its own process after steps 2 and 4, with validation losses."""
    logdir = tmp_path_factory.mktemp("here") / "run"
    assert train_tiny(logdir, *REAL, steps=4) == 0
    return logdir


def test_evaluations_and_their_losses_change_nothing_in_training(here, tmp_path):
    assert train_tiny(tmp_path / "run", "DATA.CLASS_NAMES=person", "TRAIN.EMA_DECAY=0.9", steps=4) == 0
    assert_same_weights(weights_of(tmp_path / "run"), weights_of(here))


def test_losses_are_logged_and_the_smallest_is_the_best(here):
    found = evaluations(here)
    assert found.keys() == {2, 4} and logged_steps(here)[1] == [4]
    parts = {k for k in found[4] if k.startswith("val/")} - {"val/total_loss"}
    losses = json.loads((here / "log.jsonl").read_text().splitlines()[-2])
    assert {k.removeprefix("val/") for k in parts} == {k for k in losses if k.endswith("_loss")} - {"total_loss"}
    for scores in found.values():
        assert scores["val/total_loss"] == pytest.approx(sum(scores[k] for k in parts), abs=1e-5)
    best = min(found, key=lambda step: found[step]["val/total_loss"])
    assert best_score(here)["step"] == best and best_score(here)["metric"] == "val/total_loss"
    tags = [
        v.tag
        for path in here.glob("events.out.tfevents.*")
        for event in tf.train.summary_iterator(str(path))
        for v in event.summary.value
    ]
    assert tags.count("val/total_loss") == 2
    assert tags.count("bbox_AP_per_class/person") == 2  # beside the other classes, not among the overall scores


def test_the_first_batch_and_fixed_validation_images_are_shown_in_tensorboard(here):
    shown = [
        (v.tag, event.step, v.image.encoded_image_string)
        for path in here.glob("events.out.tfevents.*")
        for event in tf.train.summary_iterator(str(path))
        for v in event.summary.value
        if v.HasField("image")
    ]
    assert [entry[:2] for entry in shown[:1]] == [("pictures/batch-0", 1)]
    tags = [[tag for tag, at, _ in shown if at == step] for step in (2, 4)]
    assert tags[0] == tags[1] and len(tags[0]) == 4  # all images of the set that show a person
    for tag, step, content in shown:
        assert content == (here / "pictures" / f"{tag.removeprefix('pictures/')}-step{step:07d}.jpg").read_bytes()


def test_another_process_gives_the_same_scores_to_the_digit(here, tmp_path, capsys):
    logdir = tmp_path / "run"
    assert train_tiny(logdir, *REAL, "TEST.ASYNC=True", "TRAIN.KEEP_CHECKPOINTS=1", steps=4) == 0
    assert_same_weights(weights_of(here), weights_of(logdir))
    for name, metric in json.loads((here / "metrics.json").read_text()).items():
        other = json.loads((logdir / "metrics.json").read_text())[name]
        assert other == (pytest.approx(metric, rel=1e-6) if "val/" in name else metric)
    drawn = sorted(p.name for p in (here / "pictures").glob("*-step0000004.jpg"))
    assert len(drawn) == 4
    for name in drawn:
        assert (logdir / "pictures" / name).read_bytes() == (here / "pictures" / name).read_bytes()
    found, others = evaluations(here), evaluations(logdir)
    assert found[4]["bbox/AR100"] > 0
    assert others.keys() <= found.keys() and 4 in others
    for step, scores in others.items():
        assert scores == pytest.approx(found[step], abs=2e-6, nan_ok=True)
        assert [v for k, v in scores.items() if "val/" not in k] == [
            v for k, v in found[step].items() if "val/" not in k
        ]
    assert "scores by class" in (logdir / "evaluation.log").read_text()
    meta = read_checkpoint_meta(newest_checkpoint(logdir))
    assert [e["step"] for e in meta["evaluations"]] == sorted(others) and "pending_evaluations" not in meta
    best = min(others, key=lambda step: others[step]["val/total_loss"])
    assert best_score(logdir)["step"] == best == load_weights(logdir / "best")[0]["global_step"]


def score_of(step):
    return SCORES.get(step, 0.05)


class Slow:
    """In place of AsyncEvaluations: each evaluation ends at the third poll after it began, or fails."""

    asked: list[int] = []

    def __init__(self, cfg, logdir):
        self._logdir, self._running, self._waiting, self._polls = logdir, None, None, 0

    busy = property(lambda self: self._running is not None)

    def submit(self, step):
        self.asked.append(step)
        skipped, self._waiting = self._waiting, step
        self._next()
        return skipped

    def _next(self):
        if self._running is None:
            self._running, self._waiting, self._polls = self._waiting, None, 0

    def poll(self):
        self._polls += 1
        step = self._running
        if step is None or self._polls < 3:
            return None
        assert (self._logdir / f"model-{step}.index").exists()
        self._running = None
        self._next()
        if step == 4:
            return training_async.Outcome(step, 1.0, None, "it was killed by SIGKILL")
        return training_async.Outcome(step, 1.0, {METRIC: score_of(step)})

    def stop(self):
        self._running = self._waiting = None


def test_scores_of_another_process_come_later_and_decide_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_evaluation, "AsyncEvaluations", Slow)
    monkeypatch.setattr(Slow, "asked", asked := [])
    logdir = tmp_path / "run"
    settings = [*EVERY_STEP, "TEST.ASYNC=True", "TRAIN.KEEP_CHECKPOINTS=1", f"TRAIN.TARGET={{'{METRIC}':0.2}}"]
    with monkeypatch.context() as patch:
        dying(patch, training, "save_tf_checkpoint", 3)
        with pytest.raises(Killed):
            train_tiny(logdir, *settings, steps=99)
    assert asked == [1, 2]
    assert read_checkpoint_meta(newest_checkpoint(logdir))["pending_evaluations"] == [1, 2]
    del asked[:]
    assert train_tiny(logdir, *settings, steps=99) == 0
    assert asked[:4] == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert "the evaluation of step 4 failed and training goes on: it was killed by SIGKILL" in err
    skipped = list(map(int, re.findall(r"the evaluation of step (\d+) is skipped", err)))
    assert skipped
    found = evaluations(logdir)
    assert all(found[step] == {METRIC: score_of(step)} for step in found) and not set(skipped) & set(found)
    last = int(newest_checkpoint(logdir).rpartition("-")[2])
    reached = min(step for step in found if score_of(step) >= 0.2)
    assert f"TRAIN.TARGET was reached at step {reached}" in err and last > reached
    best = max(found, key=score_of)
    assert best_score(logdir)["step"] == best == load_weights(logdir / "best")[0]["global_step"]
    steps = {int(p.stem.split("-")[1]) for p in logdir.glob("model-*.index")}
    assert max(steps) == last and len(steps) <= 3  # the newest one, and what was being evaluated when it was saved
    assert "pending_evaluations" not in read_checkpoint_meta(newest_checkpoint(logdir))
    assert train_tiny(logdir, *settings, steps=99) == 0
    assert "has ended at step" in capsys.readouterr().err
