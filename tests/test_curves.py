"""The picture of a run's losses and scores."""

import json

import cv2
import numpy as np
import pytest

from common import UserError
from tools.curves import draw_curves, read_log

pytestmark = pytest.mark.quick


def write_run(path, records):
    path.mkdir()
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_a_step_logged_again_after_a_resumption_counts_once_and_steps_ascend(tmp_path):
    records = [{"step": 20, "total_loss": 3.0}, {"step": 40, "total_loss": 2.0}, {"step": 20, "total_loss": 2.5}]
    run = write_run(tmp_path / "run", [*records, {"step": 40, "bbox/AP": 0.5}])
    assert read_log(run) == {"total_loss": ([20, 40], [2.5, 2.0]), "bbox/AP": ([40], [0.5])}


def test_a_falling_loss_is_drawn_falling_and_only_known_keys_get_a_panel(tmp_path):
    run = write_run(tmp_path / "run", [{"step": s, "total_loss": 1000.0 - s} for s in range(0, 1000, 10)])
    out = tmp_path / "curves.png"
    assert draw_curves({"run": run}, ["total_loss", "bbox/AP"], out) == ["total_loss"]
    picture = cv2.imread(str(out)).astype(int)
    line = picture[..., 0] - picture[..., 2] > 100  # matplotlib's first colour is a blue
    rows = [np.flatnonzero(line[:, x]).mean() for x in np.flatnonzero(line.any(0))]
    assert len(rows) > 100 and (np.diff(rows) >= -1).all() and rows[-1] - rows[0] > 150


@pytest.mark.parametrize(
    ("lines", "says"),
    [(None, "does not exist"), ('{"step": 1, "a": 2}\nnonsense', "line 2"), ('{"step": 1, "a": 2}', "they have a")],
)
def test_what_cannot_be_drawn_is_one_line_that_says_why(tmp_path, lines, says):
    run = tmp_path / "run"
    run.mkdir()
    if lines is not None:
        (run / "log.jsonl").write_text(lines)
    with pytest.raises(UserError, match=says) as raised:
        draw_curves({"run": run}, ["total_loss"], tmp_path / "curves.png")
    assert "\n" not in str(raised.value)
