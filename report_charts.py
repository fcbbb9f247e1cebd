"""The charts of an evaluation report as PNG files, for slides and texts; the page draws its own."""

import io
import math
from pathlib import Path
from typing import Any

from common import atomic_write

__all__ = ["write_charts"]


def write_charts(content: dict[str, Any], out: Path) -> None:
    """Writes charts/curves.png, calibration.png and errors.png from the content of report.json."""
    from matplotlib.figure import Figure

    models = content["models"]
    curves, calibration, errors = (Figure(figsize=(6, 4.5), layout="constrained") for _ in range(3))
    axes = curves.subplots()
    for m in models:
        axes.plot([k / 100 for k in range(101)], m["curves"]["mean"] or [math.nan] * 101, label=_plain(m["name"]))
    axes.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1), title="IoU 0.5")
    axes.legend()
    axes = calibration.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--")
    for m in models:
        filled = [b for b in m["calibration"]["bins"] if b["count"]]
        axes.plot([b["score"] for b in filled], [b["right"] for b in filled], "o-", label=_plain(m["name"]))
    axes.set(xlabel="score", ylabel="share that is right (IoU 0.5)", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    axes = errors.subplots()
    kinds = [k for k in models[0]["errors"]["cost"] if not k.startswith("false")]
    width = 0.8 / len(models)
    for n, m in enumerate(models):
        costs = [m["errors"]["cost"][k] or 0 for k in kinds]
        axes.bar([k + n * width for k in range(len(kinds))], costs, width, label=_plain(m["name"]))
    axes.set_xticks([k + (len(models) - 1) * width / 2 for k in range(len(kinds))], kinds)
    axes.set(ylabel="AP at IoU 0.5 lost")
    axes.legend()
    for name, figure in (("curves", curves), ("calibration", calibration), ("errors", errors)):
        memory = io.BytesIO()
        figure.savefig(memory, format="png", dpi=120)
        with atomic_write(out / "charts" / f"{name}.png", "wb") as f:
            f.write(memory.getvalue())


def _plain(name: str) -> str:
    """A name that Matplotlib takes for text: no mathematics between dollar signs, and never hidden."""
    return "\u200b" + name.replace("$", r"\$")
