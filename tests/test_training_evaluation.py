"""Evaluations of whole runs: the best checkpoint and the end of runs that are killed, and other processes' scores."""

import json

import pytest
from test_train import assert_same_weights, logged_steps, run, train_tiny, weights_of

import predict
import training
import training_async
import training_evaluation
from utils.checkpoint import best_score, load_weights, newest_checkpoint, read_checkpoint_meta
from utils.tf_v1 import tf

EVERY_STEP = ["TRAIN.STEPS_PER_EPOCH=1", "TRAIN.EVAL_PERIOD=1"]


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
        def evaluate(sess, should_stop=None):
            steps.append(int(tf.train.global_step(sess, tf.train.get_global_step(sess.graph))))
            return {"bbox/AP": scores[steps[-1]], "bbox/AP_per_class/cat": 0.5}

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
    assert "bbox/AP has not improved by more than 0 in 2 evaluations (TRAIN.PATIENCE=2)" in capsys.readouterr().err
    assert best_score(alone) == {"metric": "bbox/AP", "score": 0.5, "step": 4}
    assert weights_of(alone)["global_step"] == 6 and weights_of(alone / "best")["global_step"] == 4
    assert sorted(p.name for p in alone.glob("model-*.index")) == ["model-5.index", "model-6.index"]

    moments = [
        (training, "save_tf_checkpoint"),  # before the first checkpoint
        (training_evaluation, "write_json"),  # its scores are known and not written anywhere
        (training.Checkpoints, "describe"),  # they are in the log alone
        (training_evaluation, "keep_best"),  # stored, while model-best is still the one before
        (training.ProgressLog, "write_metrics"),
        (training, "save_tf_checkpoint"),  # complete, before the next checkpoint
    ]
    for n, (owner, name) in enumerate(moments):
        with monkeypatch.context() as patch:
            evaluated = scripted(patch, SCORES)
            # A run that goes on brings model-best in line first.
            dying(patch, owner, name, 2 if name == "keep_best" and n else 1 if n in (0, 1) else 2)
            with pytest.raises(Killed):
                train_tiny(logdir, *SETTINGS, steps=9)
    with monkeypatch.context() as patch:
        evaluated = scripted(patch, SCORES)
        assert train_tiny(logdir, *SETTINGS, steps=9) == 0
        assert evaluated[-1] == 6
        capsys.readouterr()
        assert train_tiny(logdir, *SETTINGS, steps=9) == 0  # finished
        assert evaluated[-1] == 6
        assert "has ended at step 6: bbox/AP has not improved" in capsys.readouterr().err
        assert best_score(logdir) == best_score(alone)
        assert_same_weights(weights_of(alone), weights_of(logdir))
        assert_same_weights(weights_of(alone / "best"), weights_of(logdir / "best"))
        assert evaluations(logdir) == evaluations(alone) == {s: {"bbox/AP": v} for s, v in SCORES.items() if s < 7}
        metas = [read_checkpoint_meta(newest_checkpoint(folder)) for folder in (alone, logdir)]
        assert metas[0]["evaluations"] == metas[1]["evaluations"] and metas[0]["stopped"] == metas[1]["stopped"]

        # From an earlier checkpoint, and with another setting.
        more = ["--config", "TRAIN.PATIENCE=None", "TRAIN.MAX_STEPS=7"]
        assert run("--resume", logdir / "model-5", *more) == 0
        assert evaluated[-2:] == [6, 7] and best_score(logdir)["step"] == 7
        assert "the best model is" in capsys.readouterr().err


def test_a_run_killed_in_its_last_evaluation_is_scored_when_it_is_started_again(tmp_path, monkeypatch, capsys):
    logdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        scripted(patch, {2: 0.3})
        dying(patch, training_evaluation, "write_json")
        with pytest.raises(Killed):
            train_tiny(logdir, "TRAIN.EVAL_PERIOD=1", "TRAIN.TARGET={'bbox/AP':0.2}", steps=2)
    assert not (logdir / "metrics.json").exists()
    evaluated = scripted(monkeypatch, {2: 0.3})
    for _ in range(2):
        assert train_tiny(logdir, "TRAIN.EVAL_PERIOD=1", "TRAIN.TARGET={'bbox/AP':0.2}", steps=2) == 0
    assert evaluated == [2]
    assert json.loads((logdir / "metrics.json").read_text()) == {"bbox/AP": 0.3, "bbox/AP_per_class/cat": 0.5}
    assert best_score(logdir)["step"] == 2
    assert "has finished its 2 steps" in capsys.readouterr().err


def test_an_unknown_metric_ends_the_run_before_it_begins(tmp_path, capsys):
    assert train_tiny(tmp_path / "run", *EVERY_STEP, "TRAIN.BEST_METRIC=bbox/mAP") == 2
    assert "TRAIN.BEST_METRIC: the evaluations on coco_val2017 give no bbox/mAP; the nearest" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- other processes
REAL = ["TRAIN.STEPS_PER_EPOCH=2", "TRAIN.EVAL_PERIOD=1", "TRAIN.VAL_LOSS=True", "TRAIN.EMA_DECAY=0.9",
        "TEST.RESULT_SCORE_THRESH=0.0", "TRAIN.BEST_METRIC=-val_loss"]  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A run that evaluates in its own process after steps 2 and 4, with validation losses."""
    logdir = tmp_path_factory.mktemp("here") / "run"
    assert train_tiny(logdir, *REAL, steps=4) == 0
    return logdir


def test_evaluations_and_their_losses_change_nothing_in_training(here, tmp_path):
    assert train_tiny(tmp_path / "run", "TRAIN.EMA_DECAY=0.9", steps=4) == 0
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


def test_another_process_gives_the_same_scores_to_the_digit(here, tmp_path, capsys):
    logdir = tmp_path / "run"
    assert train_tiny(logdir, *REAL, "TEST.ASYNC=True", "TRAIN.KEEP_CHECKPOINTS=1", steps=4) == 0
    assert_same_weights(weights_of(here), weights_of(logdir))
    assert (logdir / "metrics.json").read_text() == (here / "metrics.json").read_text()
    assert evaluations(logdir) == evaluations(here)
    assert best_score(logdir) == best_score(here)
    assert "scores by class" in (logdir / "evaluation.log").read_text()
    metas = [read_checkpoint_meta(newest_checkpoint(folder)) for folder in (here, logdir)]
    for a,b in zip(metas[0]["evaluations"],metas[1]["evaluations"]):
        print({k:(v,b["metrics"][k]) for k,v in a["metrics"].items() if v!=b["metrics"][k]})
    assert metas[0]["evaluations"] == metas[1]["evaluations"] and "pending_evaluations" not in metas[1]


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
        if step == 3:
            return training_async.Outcome(step, 1.0, None, "it was killed by SIGKILL")
        return training_async.Outcome(step, 1.0, {"bbox/AP": SCORES[step]})

    def stop(self):
        self._running = self._waiting = None


def test_scores_of_another_process_come_later_and_decide_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_evaluation, "AsyncEvaluations", Slow)
    monkeypatch.setattr(Slow, "asked", asked := [])
    logdir = tmp_path / "run"
    settings = [*EVERY_STEP, "TEST.ASYNC=True", "TRAIN.KEEP_CHECKPOINTS=1", "TRAIN.TARGET={'bbox/AP':0.2}"]
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
    assert "the evaluation of step 3 failed and training goes on: it was killed by SIGKILL" in err
    skipped = [int(line.split()[5]) for line in err.splitlines() if "is skipped" in line]
    assert skipped
    found = evaluations(logdir)
    assert all(found[step] == {"bbox/AP": SCORES[step]} for step in found) and not set(skipped) & set(found)
    last = int(newest_checkpoint(logdir).rpartition("-")[2])
    reached = min(step for step in found if SCORES[step] >= 0.2)
    assert f"TRAIN.TARGET was reached at step {reached}" in err and last > reached
    best = max(found, key=lambda step: SCORES[step])
    assert best_score(logdir)["step"] == best == load_weights(logdir / "best")[0]["global_step"]
    steps = {int(p.stem.split("-")[1]) for p in logdir.glob("model-*.index")}
    assert max(steps) == last and len(steps) <= 3  # the newest one, and what was being evaluated when it was saved
    assert "pending_evaluations" not in read_checkpoint_meta(newest_checkpoint(logdir))
    assert train_tiny(logdir, *settings, steps=99) == 0
    assert "has ended at step" in capsys.readouterr().err
