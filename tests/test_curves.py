"""The picture of runs' losses and scores: what is drawn, in which colour, and where the best step is marked."""

import json

import cv2
import numpy as np
import pytest

from common import UserError
from tools import curves
from tools.curves import Best, best_of, draw_curves, matching, read_log

pytestmark = pytest.mark.quick


def write_run(path, records):
    path.mkdir(parents=True)
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, kept open."""
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    yield kept
    monkeypatch.undo()
    for figure in kept:
        pyplot.close(figure)


def lines_of(figure) -> dict[str, list]:
    """{title: [(colour, line style, x, y)]} of the panels."""
    found = {}
    for panel in figure.axes:
        if panel.get_title():
            found[panel.get_title()] = [
                (tuple(line.get_color()), line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata()))
                for line in panel.get_lines()
            ]
    return found


def test_a_step_logged_again_after_a_resumption_counts_once_and_steps_ascend(tmp_path):
    records = [{"step": 20, "total_loss": 3.0}, {"step": 40, "total_loss": 2.0}, {"step": 20, "total_loss": 2.5}]
    run = write_run(tmp_path / "run", [*records, {"step": 40, "bbox/AP": 0.5, "bbox/APl": None}])
    assert read_log(run) == {"total_loss": ([20, 40], [2.5, 2.0]), "bbox/AP": ([40], [0.5])}
    with open(run / "log.jsonl", "a") as f:
        f.write('{"step": 60, "total_l')  # a run that was killed, or that is writing
    assert read_log(run)["total_loss"] == ([20, 40], [2.5, 2.0])


def test_a_falling_loss_is_drawn_falling_and_only_known_keys_get_a_panel(tmp_path):
    run = write_run(tmp_path / "run", [{"step": s, "total_loss": 1000.0 - s} for s in range(0, 1000, 10)])
    out = tmp_path / "curves.png"
    assert draw_curves({"run": run}, ["total_loss", "bbox/AP"], out) == ["total_loss"]
    picture = cv2.imread(str(out)).astype(int)[60:]  # below the legend
    line = picture[..., 0] - picture[..., 2] > 100  # matplotlib's first colour is a blue
    rows = [np.flatnonzero(line[:, x]).mean() for x in np.flatnonzero(line.any(0))]
    assert len(rows) > 100 and (np.diff(rows) >= -1).all() and rows[-1] - rows[0] > 100


def test_a_run_has_one_colour_in_all_panels_also_where_others_have_no_value(tmp_path, figures):
    """Before, a run without AP and one with it had each other's colours."""
    losses = [{"step": s, "total_loss": 2.0} for s in (1, 2)]
    first = write_run(tmp_path / "first", losses)
    second = write_run(tmp_path / "second", [*losses, {"step": 2, "bbox/AP": 0.3}])
    third = write_run(tmp_path / "third", [{"step": 2, "bbox/AP": 0.4}])
    draw_curves({"a": first, "b": second, "c": third}, ["total_loss", "bbox/AP"], tmp_path / "x.png")
    panels = lines_of(figures[0])
    (a, *_), (b, *_) = (line for line in panels["total_loss"] if line[1] == "-")
    (b_again, *_), (c, *_) = (line for line in panels["bbox/AP"] if line[1] == "-")
    assert b == b_again and len({a, b, c}) == 3
    assert len({panel.get_xlim() for panel in figures[0].axes if panel.get_visible()}) == 1
    (legend,) = figures[0].legends
    shown = [tuple(handle.get_color()) for handle in legend.legend_handles]
    assert shown == [a, b, c]
    assert [t.get_text().split(":")[0] for t in legend.get_texts()] == ["a", "b", "c"]


def test_validation_loss_is_dashed_beside_its_training_loss_and_the_best_step_is_marked(tmp_path, figures):
    records = [{"step": s, "total_loss": 3.0 - s / 100} for s in (10, 20, 30)]
    records += [
        {"step": s, "val/total_loss": v, "bbox/AP": a} for s, v, a in ((10, 3, 0.1), (20, 2, 0.3), (30, 4, 0.2))
    ]
    run = write_run(tmp_path / "run", records)
    assert draw_curves({"run": run}, curves.DEFAULT_KEYS, tmp_path / "x.png") == ["total_loss", "bbox/AP"]
    panels = lines_of(figures[0])
    assert [(style, x, y) for _, style, x, y in panels["total_loss"][:2]] == [
        ("-", [10, 20, 30], [2.9, 2.8, 2.7]), ("--", [10, 20, 30], [3, 2, 4]),
    ]  # fmt: skip
    for title in ("total_loss", "bbox/AP"):
        assert [line[2] for line in panels[title] if line[1] == ":"] == [[20, 20]]
    assert ("None", [20], [0.3]) in [line[1:] for line in panels["bbox/AP"]]  # the star
    assert "best bbox/AP 0.3 at step 20" in figures[0].legends[0].get_texts()[0].get_text()
    assert draw_curves({"run": run}, ["val/*"], tmp_path / "x.png") == ["val/total_loss"]  # alone it has its panel


def test_the_best_step_is_the_one_that_the_run_has_kept_else_the_first_best_of_its_log(tmp_path):
    rows = [(10, 0.1, 0.2, 5.0), (20, 0.3, 0.1, 4.0), (30, 0.3, 0.4, 4.5)]
    run = write_run(
        tmp_path / "run",
        [{"step": s, "s/segm/AP": a, "bbox/AP": b, "val/total_loss": v, "x/AP50": 1} for s, a, b, v in rows],
    )
    log = read_log(run)
    assert best_of(run, log) == Best("s/segm/AP", 20, 0.3)
    assert best_of(run, {"val/total_loss": log["val/total_loss"]}) == Best("val/total_loss", 20, 4.0)
    assert best_of(run, {"x/AP50": log["x/AP50"]}) is None
    (run / "model-best").mkdir()
    (run / "model-best" / "best.json").write_text('{"metric": "bbox/AP", "score": 0.4, "step": 30}')
    assert best_of(run, log) == Best("bbox/AP", 30, 0.4)
    (run / "model-best" / "best.json").write_text("[]")
    assert best_of(run, log) == Best("s/segm/AP", 20, 0.3)


def test_patterns_choose_keys_in_their_order_each_once():
    keys = ["bbox/AP", "bbox/AP_per_class/dog", "bbox/AP_per_class/[odd]", "total_loss", "val/total_loss"]
    assert matching(keys, ["*per_class/*", "bbox/*", "total_loss"]) == [
        "bbox/AP_per_class/[odd]", "bbox/AP_per_class/dog", "bbox/AP", "total_loss"
    ]  # fmt: skip
    assert matching(keys, ["bbox/AP_per_class/[odd]"]) == ["bbox/AP_per_class/[odd]"]  # a name is no pattern


def test_the_first_values_of_a_loss_do_not_squash_the_others(tmp_path, figures):
    values = [1000.0, *[2.0] * 50, *[1.0] * 49]
    run = write_run(tmp_path / "run", [{"step": s, "total_loss": v} for s, v in enumerate(values)])
    draw_curves({"run": run}, ["total_loss"], tmp_path / "x.png")
    assert figures[0].axes[0].get_ylim() == (0, pytest.approx(2.1))


def test_the_tool_lists_the_keys_of_all_runs_and_names_patterns_that_fit_nothing(tmp_path, capsys):
    a = write_run(tmp_path / "a" / "run", [{"step": 5, "total_loss": 2.0}, {"step": 10, "total_loss": 1.5}])
    b = write_run(tmp_path / "b" / "run", [{"step": 7, "bbox/AP_per_class/dog": 0.25}])
    assert curves.main([str(a), str(b), "--list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["bbox/AP_per_class/dog", str(b), "1", "7", "0.25"], ["total_loss", str(a), "2", "10", "1.5"]]
    out = tmp_path / "out.png"
    assert curves.main([str(a), str(b), "--keys", "*dog", "cat", "--out", str(out)]) == 0
    assert out.exists() and "--keys cat fits nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "says"),
    [(None, "does not exist"), ('{"step": 1, "a": 2}\nnonsense\n', "line 2"), ('{"step": 1, "a": 2}', "they have a")],
)
def test_what_cannot_be_drawn_is_one_line_that_says_why(tmp_path, lines, says):
    run = tmp_path / "run"
    run.mkdir()
    if lines is not None:
        (run / "log.jsonl").write_text(lines)
    with pytest.raises(UserError, match=says) as raised:
        draw_curves({"run": run}, ["total_loss"], tmp_path / "curves.png")
    assert "\n" not in str(raised.value)
