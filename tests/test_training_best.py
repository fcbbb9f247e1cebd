"""The best checkpoint and early end: decisions compared with a plain loop, and the files, killed at any moment."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import utils.checkpoint as checkpoint_module
from common import UserError
from config import default_config, finalize_config
from dataset_split import DatasetSplit
from eval_protocols import PROTOCOLS
from training_best import Rule, Scores, check_metrics, make_rule
from utils.checkpoint import BEST, best_score, keep_best, load_weights, newest_checkpoint, read_description
from utils.checkpoint import update_description as update

pytestmark = pytest.mark.quick


def settings(*changes, training=True):
    return finalize_config(default_config().update_args(["MODE_FPN=True", *changes]), training)


# ---------------------------------------------------------------------------------------------------------- decisions
def plain_loop(values, sign, patience, min_delta, target):
    """(best step, its value, the step after which the run ends or None) of values {step: value}."""
    best = best_step = last_improvement = None
    unimproved = 0
    for step, value in values.items():
        if math.isfinite(value):
            if best is None or sign * value > sign * best:
                best, best_step = value, step
            if last_improvement is None or sign * value > sign * last_improvement + min_delta:
                last_improvement, unimproved = value, 0
            else:
                unimproved += 1
            if target is not None and sign * value >= sign * target:
                return best_step, best, step
        else:
            unimproved += 1
        if patience is not None and unimproved >= patience:
            return best_step, best, step
    return best_step, best, None


SCORE = st.one_of(st.integers(0, 8).map(lambda n: n / 8), st.just(math.nan), st.just(math.inf), st.floats(0, 1))


@given(
    st.lists(SCORE, min_size=1, max_size=12), st.booleans(), st.none() | st.integers(1, 4),
    st.sampled_from([0.0, 0.125, 0.3]), st.none() | st.floats(0, 1), st.lists(st.integers(0, 11)),
)  # fmt: skip
def test_decisions_equal_a_plain_loop_also_when_the_run_is_killed_anywhere(
    values, smaller, patience, min_delta, target, kills
):
    metric = "-val/total_loss" if smaller else "bbox/AP"
    name = metric.removeprefix("-")
    rule = Rule((metric,), patience, min_delta, () if target is None else ((metric, target),))
    scores = Scores(rule)
    ended = None
    for number, value in enumerate(values):
        step = 10 * (number + 1)
        scores.begin(step)
        if number in kills:  # after the checkpoint of the step, before its scores
            scores = Scores(rule, stored(scores, step))
            assert scores.pending == [step]
        scores.add(step, {name: value, "other": 1.0})
        if number in kills:  # with its scores
            scores = Scores(rule, stored(scores, step))
        assert scores.pending == []
        if scores.why_finished():
            ended = step
            break
    best_step, best, end = plain_loop(
        {10 * (n + 1): v for n, v in enumerate(values)}, -1 if smaller else 1, patience, min_delta, target
    )
    now = scores.standing()
    assert (now.step, ended) == (best_step, end)
    assert best_step is None or (now.score, now.metric) == (best, metric)


def stored(scores, step):
    """The description of the checkpoint of this step, as another process reads it."""
    return json.loads(json.dumps({k: v for k, v in scores.description(step).items() if v is not None}, allow_nan=False))


def test_an_earlier_checkpoint_knows_the_evaluations_up_to_its_own_step_only():
    scores = Scores(Rule(("bbox/AP",), patience=2))
    for step, value in ((10, 0.1), (20, 0.5), (30, 0.2)):
        scores.add(step, {"bbox/AP": value})
    assert [Scores(scores.rule, scores.description(s)).standing().step for s in (5, 15, 25, 35)] == [None, 10, 20, 20]


def test_a_run_that_ended_by_its_scores_goes_on_only_if_the_settings_change():
    scores = Scores(Rule(("bbox/AP",), patience=1))
    scores.add(1, {"bbox/AP": 0.2})
    scores.add(2, {"bbox/AP": 0.1})
    reason = scores.why_finished()
    assert reason == "bbox/AP has not improved by more than 0 in 1 evaluations (TRAIN.PATIENCE=1)"
    scores.stop(reason)
    scores.add(3, {"bbox/AP": 0.3})  # of an evaluation in another process that ended later
    meta = stored(scores, 3)
    assert Scores(Rule(("bbox/AP",), patience=1), meta).why_finished() == reason
    assert Scores(Rule(("bbox/AP",), patience=2), meta).why_finished() == ""
    assert Scores(Rule(("bbox/AP",), target=(("bbox/AP", 0.3),)), meta).why_finished().startswith("TRAIN.TARGET was re")


def test_all_targets_must_be_reached_by_one_evaluation():
    rule = make_rule(settings("TRAIN.TARGET={'bbox/AP':0.4,'segm/AP':0.3}"), ["val"])
    scores = Scores(rule)
    scores.add(1, {"bbox/AP": 0.5, "segm/AP": 0.2})
    scores.add(2, {"bbox/AP": 0.3, "segm/AP": 0.4})
    assert scores.why_finished() == ""
    scores.add(3, {"bbox/AP": 0.4, "segm/AP": 0.3})
    assert scores.why_finished() == "TRAIN.TARGET was reached at step 3 (bbox/AP 0.4000, segm/AP 0.3000)"


@pytest.mark.parametrize(
    ("metrics", "sets", "decides"),
    [
        ({"bbox/AP": 0.1, "segm/AP": 0.2}, ["val"], "segm/AP"),
        ({"bbox/AP": 0.1, "keypoints/AP": 0.2}, ["val"], "bbox/AP"),
        ({"oid-v2/mAP": 0.1, "oid-challenge/mAP": 0.2}, ["val"], "oid-v2/mAP"),
        ({"voc07/mAP": 0.1}, ["val"], "voc07/mAP"),
        ({"cityscapes/AP": 0.1, "cityscapes/AP50": 0.2}, ["val"], "cityscapes/AP"),
        ({"proposals/AR@100": 0.1, "proposals/AR@1000": 0.2}, ["val"], "proposals/AR@1000"),
        ({"b/segm/AP": 0.2, "a/bbox/AP": 0.1}, ["a", "b"], "a/bbox/AP"),
        ({"val/total_loss": 0.1}, ["val"], "-val/total_loss"),
    ],
)
def test_auto_takes_the_first_metric_that_there_is_of_the_first_set(metrics, sets, decides):
    scores = Scores(make_rule(settings(), sets))
    scores.add(1, metrics)
    assert scores.standing().metric == decides


# -------------------------------------------------------------------------------------------------------------- names
def split_of(protocols, name="val"):
    split = DatasetSplit(name, "", [], ["cat", "dog"], [1, None], {}, {}, 0, np.arange(0))
    split.protocols = protocols
    return split


@pytest.mark.parametrize(
    ("protocols", "right", "wrong", "named"),
    [
        (["coco"], ["segm/AP75", "bbox/AP_per_class/cat"], "segm/ap_75", "segm/AP75"),
        (["coco"], ["bbox/AR100"], "keypoints/AP", "bbox/AP"),
        (["lvis"], ["bbox/APr", "segm/APf"], "bbox/APrr", "bbox/APr"),
        (["voc07"], ["voc07/mAP"], "voc12/mAP", "voc07/mAP"),
        (["cityscapes"], ["cityscapes/AP50"], "segm/AP", "cityscapes/AP"),
    ],
)
def test_a_wrong_metric_is_named_at_the_start_with_those_that_exist(protocols, right, wrong, named):
    for metric in right:
        check_metrics(
            settings(f"TRAIN.BEST_METRIC={metric}", f"TRAIN.TARGET={{'{metric}':0.5}}"), [split_of(protocols)]
        )
    for change in (f"TRAIN.BEST_METRIC={wrong}", f"TRAIN.TARGET={{'{wrong}':0.5}}"):
        with pytest.raises(UserError, match=rf"setting {change.split('=')[0]}: .* val give no {wrong}; .*{named}"):
            check_metrics(settings(change), [split_of(protocols)])


def test_with_several_sets_a_metric_begins_with_its_set():
    splits = [split_of(["coco"], "a"), split_of(["coco"], "b")]
    check_metrics(settings("TRAIN.BEST_METRIC=b/segm/AP"), splits)
    with pytest.raises(UserError, match="give no segm/AP; the nearest are [ab]/segm/AP"):
        check_metrics(settings("TRAIN.BEST_METRIC=segm/AP"), splits)


def test_every_protocol_says_its_names():
    for protocol in PROTOCOLS:
        with pytest.raises(UserError, match="give no nothing/here"):
            check_metrics(settings("TRAIN.BEST_METRIC=nothing/here"), [split_of([protocol])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("TRAIN.BEST_METRIC=val_loss", "a loss is better when it is smaller: -val_loss"),
        ("TRAIN.BEST_METRIC=-val_loss", "needs TRAIN.VAL_LOSS=True"),
        ("TRAIN.TARGET={'-val/total_loss':1}", "needs TRAIN.VAL_LOSS=True"),
        ("TRAIN.TARGET={'bbox/AP':'high'}", "must be {metric: number}"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        settings(change)


@pytest.mark.parametrize("key", ["TRAIN.PATIENCE=3", "TRAIN.TARGET={'a':1}", "TRAIN.VAL_LOSS=True", "TEST.ASYNC=True"])
def test_what_needs_evaluations_says_so(key):
    with pytest.raises(UserError, match="needs TRAIN.EVAL_PERIOD"):
        settings(key, "DATA.VAL=[]")
    settings(key, "DATA.VAL=[]", training=False)  # as stored in a checkpoint


# -------------------------------------------------------------------------------------------------------------- files
def write_checkpoint(run: Path, step: int, text: str = "") -> None:
    """Files of the shape of a checkpoint."""
    for end in ("data-00000-of-00001", "index"):
        (run / f".{step}").write_text(f"{text}{step} {end}")
        os.replace(run / f".{step}", run / f"model-{step}.{end}")  # another file, as a saved checkpoint is
    (run / f"model-{step}.meta.json").write_text(json.dumps({"step": step}))


def named_by(run: Path) -> tuple[str, str]:
    """The files that the best checkpoint of a run consists of."""
    prefix = newest_checkpoint(run / BEST)
    return tuple(Path(f"{prefix}.{end}").read_text() for end in ("data-00000-of-00001", "index"))


def test_the_best_checkpoint_outlasts_the_others_and_so_do_those_that_others_need(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
        assert keep_best(tmp_path, step, {"metric": "bbox/AP", "score": step / 100}, {10})
    for path in tmp_path.glob("model-*.*"):
        path.unlink()
    assert named_by(tmp_path) == ("30 data-00000-of-00001", "30 index")
    assert best_score(tmp_path) == {"metric": "bbox/AP", "score": 0.3, "step": 30}
    assert sorted(p.name for p in (tmp_path / BEST).glob("*.index")) == ["model-10.index", "model-30.index"]
    assert keep_best(tmp_path, 10, {"metric": "bbox/AP", "score": 0.1})  # continued from an earlier checkpoint
    assert named_by(tmp_path) == ("10 data-00000-of-00001", "10 index")
    assert not keep_best(tmp_path, 20, {"metric": "bbox/AP", "score": 0.2})  # gone
    keep_best(tmp_path, None, {})
    assert best_score(tmp_path) is None


def test_a_step_that_was_trained_again_replaces_the_best_checkpoint_of_that_step(tmp_path):
    for text in ("old ", "new "):
        write_checkpoint(tmp_path, 10, text)
        keep_best(tmp_path, 10, {"metric": "bbox/AP", "score": 0.5})
    assert named_by(tmp_path) == ("new 10 data-00000-of-00001", "new 10 index")


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_leaves_a_complete_best_checkpoint(tmp_path, monkeypatch, links):
    """The process ends before each call that changes a file, in turn."""

    class Killed(BaseException):
        pass

    def no_links(*_):
        raise OSError("no hard links here")

    calls, limit = [0], [None]

    def counted(function):
        def call(*args, **options):
            calls[0] += 1
            if limit[0] is not None and calls[0] > limit[0]:
                raise Killed
            return function(*args, **options)

        return call

    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(os, "link", counted(os.link) if links else no_links)
        keep_best(tmp_path, 10, {"metric": "bbox/AP", "score": 0.1})
        for allowed in range(40):
            limit[0], calls[0] = allowed, 0
            try:
                keep_best(tmp_path, 20, {"metric": "bbox/AP", "score": 0.2})
            except Killed:
                assert named_by(tmp_path)[0].split()[0] == named_by(tmp_path)[1].split()[0]
            else:
                break
    assert allowed > 5
    assert named_by(tmp_path)[1] == "20 index"
    assert [p.name for p in (tmp_path / BEST).glob("*.index")] == ["model-20.index"]


def test_a_run_without_a_best_checkpoint_says_so(tmp_path):
    write_checkpoint(tmp_path, 10)
    with pytest.raises(UserError, match=r"has no best checkpoint: no evaluation of it gave a score yet.*model-10"):
        load_weights(tmp_path / "best")


def test_a_description_changes_in_one_entry_and_a_wrong_one_is_named(tmp_path):
    write_checkpoint(tmp_path, 10)
    scores = Scores(Rule(("bbox/AP",)))
    scores.add(10, {"bbox/AP": math.nan})
    update(tmp_path / "model-10", scores.description(10))
    assert read_description(tmp_path / "model-10.meta.json") == {
        "step": 10, "evaluations": [{"step": 10, "metrics": {"bbox/AP": None}}],
    }  # fmt: skip
    update(tmp_path / "model-10", {"evaluations": [{"step": "ten"}]})
    with pytest.raises(UserError, match="evaluations must be a list of steps with their metrics"):
        checkpoint_module.read_checkpoint_meta(str(tmp_path / "model-10"))
