"""Draws what training runs have logged over their steps: curves.png from the log.jsonl of run directories.

    python tools/curves.py train_log/mine train_log/other --out curves.png
    python tools/curves.py train_log/mine --keys "*_loss" "bbox/AP_per_class/*"
    python tools/curves.py train_log/mine --list

--keys takes names and patterns of them (*, ?, [abc]); docs/OUTPUTS.md explains all keys. A run has one colour in all
panels. Dashed: the same loss on the validation sets. Dotted: the step of the best scores, with a star at the best.
"""

import import_path

import argparse
import fnmatch
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from common import UserError, atomic_write, check_output_file, errors_in_one_line, logger, path_argument

__all__ = ["Best", "best_of", "draw_curves", "matching", "read_log"]

Log = dict[str, tuple[list[int], list[float]]]

# Without --keys: the loss, the scores that people compare, and what tells how training went.
DEFAULT_KEYS = (
    "total_loss", "*segm/AP", "*bbox/AP", "*keypoints/AP", "*/mAP", "*cityscapes/AP", "*proposals/AR@1000",
    "*segm/AP50", "*bbox/AP50", "learning_rate", "gradient_norm", "speed/images_per_s", "speed/data_wait",
)  # fmt: skip
# Which score tells the best step of a run that has kept none: the first that it has.
BEST_KEYS = ("*segm/AP", "*bbox/AP", "*keypoints/AP", "*/mAP", "*/AP", "*proposals/AR@1000", "*val/total_loss")
MOST_PANELS = 120
VALIDATION = "val/"


class Best(NamedTuple):
    """The best evaluation of a run."""

    metric: str
    step: int
    score: float


def read_log(run: Path) -> Log:
    """The run's log.jsonl as {key: (steps, values)}. If a step was logged twice after a resumption, the last is used;
    a last line that a killed process left unfinished is ignored."""
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the log directory of a training run")
    values: dict[str, dict[int, float]] = {}
    text = path.read_text(errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError):
            if number == len(lines) and not text.endswith("\n"):
                break
            raise UserError(f"{path} line {number} is not a record of a training run") from None
        for key, value in record.items():
            if isinstance(value, (int, float)):
                values.setdefault(key, {})[step] = float(value)
    return {key: tuple(map(list, zip(*sorted(points.items())))) for key, points in values.items()}


def best_of(run: Path, log: Log) -> Best | None:
    """The best evaluation as the run has kept it (model-best), else by the first of BEST_KEYS that its log has; of
    equal ones the first."""
    try:
        kept = json.loads((run / "model-best" / "best.json").read_text())
        return Best(str(kept["metric"]), int(kept["step"]), float(kept["score"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    metric = next(iter(matching(log, BEST_KEYS)), None)
    if metric is None:
        return None
    steps, values = log[metric]
    score = min(values) if _is_loss(metric) else max(values)
    return Best(metric, steps[values.index(score)], score)


def matching(keys: Sequence[str] | dict[str, Any], patterns: Sequence[str]) -> list[str]:
    """The keys that a pattern fits, in the order of the patterns, each once; keys of a pattern sorted."""
    found: dict[str, None] = {}
    for pattern in patterns:
        fitting = [key for key in keys if key == pattern or fnmatch.fnmatchcase(key, pattern)]
        found |= dict.fromkeys(sorted(fitting))
    return list(found)


def draw_curves(runs: dict[str, Path], keys: Sequence[str], out: Path) -> list[str]:
    """Writes one panel per key that fits one of the patterns `keys`, with one line per run {name: directory}; returns
    the keys of the panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {name: read_log(run) for name, run in runs.items()}
    known = sorted({key for log in logs.values() for key in log})
    drawn = _panels(known, keys)
    bests = {name: best_of(runs[name], log) for name, log in logs.items()}
    palette = pyplot.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    colors = {name: palette[n % len(palette)] for n, name in enumerate(runs)}
    columns = min(len(drawn), 4 if len(drawn) > 9 or len(drawn) in (7, 8) else 3)
    rows = -(-len(drawn) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.4 * columns, 3.1 * rows + 0.4), squeeze=False)
    for panel, key in zip(grid.flat, drawn):
        for name, log in logs.items():
            _draw_run(panel, key, log, bests[name], colors[name])
        _dress(panel, key, list(logs.values()))
    for panel in list(grid.flat)[len(drawn) :]:
        panel.set_visible(False)
    _legend(figure, drawn, logs, bests, colors)
    with atomic_write(out, "wb") as f:
        figure.savefig(f, format=out.suffix.lstrip(".") or "png", dpi=110)
    pyplot.close(figure)
    return drawn


def _panels(known: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The keys to draw. A validation loss has no panel of its own where its training loss has one."""
    chosen = matching(known, patterns)
    if not chosen:
        raise UserError(f"none of {', '.join(patterns)} is in the logs; they have {', '.join(known) or 'nothing yet'}")
    if patterns != DEFAULT_KEYS:
        for pattern in patterns:
            if not matching(known, [pattern]):
                logger.warning(f"--keys {pattern} fits nothing in the logs; --list shows what they have")
    drawn = [key for key in chosen if _training_key(key) not in chosen]
    if len(drawn) > MOST_PANELS:
        logger.warning(f"{len(drawn)} keys fit; the first {MOST_PANELS} are drawn: give narrower --keys")
    return drawn[:MOST_PANELS]


def _training_key(key: str) -> str | None:
    """total_loss of val/total_loss or my_set/val/total_loss; None for other keys."""
    found = re.fullmatch(rf"(?:.*/)?{VALIDATION}(.+)", key)
    return found[1] if found else None


def _is_loss(key: str) -> bool:
    return key.endswith("_loss")


def _draw_run(panel: Any, key: str, log: Log, best: Best | None, color: Any) -> None:
    lines = [(key, "-")] + [(k, "--") for k in log if _training_key(k) == key]
    for name, style in lines:
        if name not in log:
            continue
        steps, values = log[name]
        marker = "o" if len(steps) < 20 else None
        panel.plot(steps, values, style, color=color, linewidth=1.3, marker=marker, markersize=3)
        if best is not None and name == best.metric:
            panel.plot([best.step], [best.score], "*", color=color, markersize=13, markeredgecolor="black", zorder=5)
    if best is not None and any(name in log for name, _ in lines):
        panel.axvline(best.step, color=color, linestyle=":", linewidth=1, alpha=0.8)


def _dress(panel: Any, key: str, logs: Any) -> None:
    from matplotlib import ticker

    panel.set_title(key, fontsize=10 if len(key) < 40 else 7)
    panel.set_xlabel("step", fontsize=8)
    panel.tick_params(labelsize=8)
    panel.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    panel.grid(alpha=0.3)
    last = max(steps[-1] for log in logs for steps, _ in log.values())
    panel.set_xlim(0, 1.02 * max(last, 1))  # the same in all panels
    top = None
    if _is_loss(key) or key == "gradient_norm":
        # The first values of a run may be far above all others, which would all look like zero.
        later = [
            v for log in logs for k in log if key in (k, _training_key(k)) for v in log[k][1][len(log[k][1]) // 20 :]
        ]
        top = 1.05 * max(later, default=0) or None
    panel.set_ylim(0, top)


def _legend(
    figure: Any, drawn: Sequence[str], logs: dict[str, Log], bests: dict[str, Best | None], colors: dict
) -> None:
    """One legend for all panels, above them."""
    from matplotlib.lines import Line2D

    handles, names = [], []
    for name in logs:
        best = bests[name]
        text = f"{name}: best {best.metric} {best.score:.4g} at step {best.step}" if best else name
        handles.append(Line2D([], [], color=colors[name], linewidth=2.5))
        names.append(text)
    if any(_training_key(k) in drawn for log in logs.values() for k in log):
        handles.append(Line2D([], [], color="black", linestyle="--"))
        names.append("validation")
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.12 + 0.2 * len(names)) / figure.get_figheight()))
    figure.legend(handles, names, loc="upper left", fontsize=9, frameon=False)


def list_keys(runs: dict[str, Path]) -> str:
    """A table of all keys of the runs with their last values."""
    logs = {name: read_log(run) for name, run in runs.items()}
    rows = []
    for key in sorted({key for log in logs.values() for key in log}):
        for name, log in logs.items():
            if key in log:
                steps, values = log[key]
                rows.append([key, name, len(steps), steps[-1], f"{values[-1]:.6g}"])
    return tabulate(rows, ["key", "run", "values", "last step", "last value"], disable_numparse=True)


def _path(text: str) -> Path:
    return Path(path_argument(text))


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=_path, help="log directories of training runs")
    parser.add_argument(
        "--keys", nargs="+", default=DEFAULT_KEYS, metavar="KEY", help="what to draw: names or patterns"
    )
    parser.add_argument("--list", action="store_true", help="print all keys of the runs instead")
    parser.add_argument("--out", type=_path, default=Path("curves.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    names = [run.name for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    runs = dict(zip(names, args.runs))
    if args.list:
        print(list_keys(runs))
        return 0
    check_output_file(args.out, "--out")
    drawn = draw_curves(runs, args.keys, args.out)
    logger.info(f"{', '.join(drawn)} of {len(args.runs)} runs are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
