"""training_find_lr.py: the rates that are tried, the rule of the suggestion, and a whole search that touches no run."""

import json
import math

import numpy as np
import pytest
from tiny import TINY_TRAINING

import train
from config import default_config, finalize_config
from training_find_lr import Record, rising, suggestion, write_found
from training_plan import make_plan


def settings(*args):
    return finalize_config(default_config().update_args(args))


def records_of(losses, rates=None):
    """Records as a search makes them, with the smoothing written out plainly."""
    found, rates = [], rates if rates is not None else np.geomspace(1e-5, 1, len(losses))
    for n in range(len(losses)):
        weights = 0.9 ** np.arange(n, -1, -1)
        smoothed = float(np.dot(weights, losses[: n + 1]) / weights.sum())
        found.append(Record(n + 1, float(rates[n]), float(losses[n]), smoothed))
    return found


@pytest.mark.parametrize("steps", [20, 200, 1000])
def test_the_rate_rises_by_the_same_factor_in_each_step(steps):
    plan = rising(make_plan(settings("TRAIN.LR_POLICY=cosine"), 2, 1000), steps)
    rates = [plan.learning_rate(step) for step in range(steps)]
    assert rates == pytest.approx(np.geomspace(1e-5, 1.0, steps).tolist())
    assert plan.total_steps == steps


def test_the_graph_has_the_rate_of_the_plan():
    from trainers import learning_rate_tensor
    from utils.tf_v1 import tf

    plan = rising(make_plan(settings(), 2, 1000), 200)
    with tf.Graph().as_default(), tf.Session() as session:
        got = session.run([learning_rate_tensor(plan, tf.constant(step, tf.int64)) for step in (0, 1, 77, 199)])
    assert got == pytest.approx([plan.learning_rate(step) for step in (0, 1, 77, 199)], rel=1e-5)


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_smoothed_loss():
    rates = np.geomspace(1e-5, 1, 200)
    losses = 3 + 0.3 * (np.log10(rates) + 1.5) ** 2  # falls until 10^-1.5 = 0.032, then rises
    records = records_of(losses + np.random.default_rng(0).normal(0, 0.05, 200), rates)
    best = min(records[10:], key=lambda r: r.smoothed)
    found = suggestion(records)
    assert found.rate == pytest.approx(best.rate / 10, rel=0.05) and 0.002 < found.rate < 0.01
    assert "still falling" not in found.said
    assert "still falling" in suggestion(records_of(np.linspace(5, 1, 100))).said


@pytest.mark.parametrize("losses", [np.linspace(1, 3, 100), np.full(100, 2.0), [math.nan] * 30])
def test_no_rate_is_suggested_where_none_lowered_the_loss(losses):
    assert suggestion(records_of(losses)).rate is None


def test_the_setting_is_written_for_a_total_batch_of_eight(tmp_path):
    records = records_of(3 + (np.log10(np.geomspace(1e-5, 1, 100)) + 1) ** 2)
    rate = suggestion(records).rate
    for words, factor in (([], 0.5), (["TRAIN.LR_SCALING=none"], 1)):
        cfg = settings(*words)
        said = write_found(records, suggestion(records), make_plan(cfg, 4, 1000), cfg, tmp_path)
        assert f"suggested: TRAIN.BASE_LR={float(f'{rate / factor:.2g}'):g} " in said[-1]
    lines = [json.loads(line) for line in (tmp_path / "find_lr.jsonl").read_text().splitlines()]
    assert [Record(**line) for line in lines] == records
    assert (tmp_path / "find_lr.png").read_bytes()[:4] == b"\x89PNG"


def test_a_search_trains_with_the_runs_batches_and_leaves_no_run(tmp_path, capsys):
    words = ["--config", *TINY_TRAINING, "TRAIN.ACCUMULATION=2", "TRAIN.WARMUP_INIT_LR=0.001"]
    assert train.main(["--find-lr", "20", "--logdir", str(tmp_path / "lr"), *words]) == 0
    assert {p.name for p in (tmp_path / "lr").iterdir()} == {"find_lr.jsonl", "find_lr.png"}
    rows = [json.loads(line) for line in (tmp_path / "lr" / "find_lr.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 10
    assert rows[0]["rate"] == 1e-5 and rows[0]["loss"] > 0
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "lr").iterdir()}
    assert train.main(["--find-lr", "--logdir", str(tmp_path / "lr"), *words]) == 2
    assert "--find-lr never touches a run" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "lr").iterdir()} == before
