"""Draws losses and scores of training runs over the steps: curves.png from the log.jsonl of run directories.

python tools/curves.py train_log/mine [train_log/other …] [--keys total_loss bbox/AP50 segm/AP50] [--out curves.png]
"""

import import_path

import argparse
import json
import sys
from pathlib import Path

from common import UserError, atomic_write, check_output_file, logger, path_argument

__all__ = ["draw_curves", "read_log"]

DEFAULT_KEYS = ["total_loss", "bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50", "keypoints/AP"]


def read_log(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The run's log.jsonl as {key: (steps, values)}. If a step was logged twice after a resumption, the last is
    used."""
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the log directory of a training run")
    values: dict[str, dict[int, float]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path} line {number} is not a record of a training run") from None
        for key, value in record.items():
            if isinstance(value, (int, float)):
                values.setdefault(key, {})[step] = float(value)
    return {key: tuple(map(list, zip(*sorted(points.items())))) for key, points in values.items()}


def draw_curves(runs: dict[str, Path], keys: list[str], out: Path) -> list[str]:
    """Writes one panel per key with one line per run {name: directory}; returns the keys that were drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {name: read_log(run) for name, run in runs.items()}
    drawn = [key for key in keys if any(key in log for log in logs.values())]
    if not drawn:
        known = sorted({key for log in logs.values() for key in log})
        raise UserError(f"none of {', '.join(keys)} is in the logs; they have {', '.join(known) or 'nothing yet'}")
    figure, panels = pyplot.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 3.2), squeeze=False)
    for panel, key in zip(panels[0], drawn):
        for name, log in logs.items():
            if key in log:
                steps, values = log[key]
                marker = "o" if len(steps) < 20 else None
                panel.plot(steps, values, label=name, linewidth=1.2, marker=marker, markersize=3)
        panel.set_title(key, fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        panel.set_xlim(left=0)
        panel.set_ylim(0, 1 if "/AP" in key or "/AR" in key else None)
    if len(logs) > 1:
        panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    with atomic_write(out, "wb") as f:
        figure.savefig(f, format=out.suffix.lstrip(".") or "png", dpi=110)
    pyplot.close(figure)
    return drawn


def _path(text: str) -> Path:
    return Path(path_argument(text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=_path, help="log directories of training runs")
    parser.add_argument("--keys", nargs="+", default=DEFAULT_KEYS, help="what to draw (default: %(default)s)")
    parser.add_argument("--out", type=_path, default=Path("curves.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args()
    try:
        check_output_file(args.out, "--out")
        names = [run.name for run in args.runs]
        if len(set(names)) < len(names):
            names = [str(run) for run in args.runs]
        drawn = draw_curves(dict(zip(names, args.runs)), args.keys, args.out)
    except UserError as e:
        logger.error(str(e))
        return 2
    logger.info(f"{', '.join(drawn)} of {len(args.runs)} runs are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
