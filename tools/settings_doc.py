#!/usr/bin/env python3
"""Writes docs/SETTINGS.md, the table of all settings, from config.py.

python tools/settings_doc.py
"""

import import_path

from pathlib import Path

from common import atomic_write
from config import PREDICTION_RELATIONS, RELATIONS, SETTINGS, TRAINING_RELATIONS
from config_names import ALIASES, TENSORPACK

__all__ = ["DOCUMENT", "document"]

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/SETTINGS.md"

_TITLES = {
    "": "Mode",
    "DATA": "Data",
    "PREPROC": "Image sizes and augmentation",
    "BACKBONE": "Backbone",
    "TRAIN": "Training",
    "RPN": "Region proposals and anchors",
    "FRCNN": "Boxes and classes",
    "FPN": "Feature pyramid",
    "MRCNN": "Masks",
    "KRCNN": "Keypoints",
    "CASCADE": "Cascade",
    "TEST": "Evaluation and prediction",
}

_INTRODUCTION = """\
# Settings

Written by `python tools/settings_doc.py` from config.py; change it there.

Give settings as `--config KEY=VALUE …`. A value is a Python literal (`0.01`, `[640,800]`, `True`, `None`), otherwise a
text. Quote a value with spaces or quotes of its own: `"DATA.TRAIN=['mine','yours']"`. An unknown key or a value that is
not allowed stops the program in one line, before anything is loaded. `./train.py --print-config` prints the settings
that a command would use. A run stores its settings beside its checkpoints; `--resume`, `--load`, `--predict` and
`--evaluate` read them from there, and `--config` wins.

`--config @FILE` reads settings from a file as `--print-config` writes it, with a `KEY=VALUE` on each line and comments
after #, or from the settings.json of a run, or from a run directory. Words and files are mixed, and later ones win:
`--config @mine.txt @train_log/old TRAIN.SEED=7`. `--recipe r50-fpn` gives the settings of a known model before all of
them ([recipes](RECIPES.md)); its schedule is followed on 50,000 images or more, others get one that fits them.
"""

_COMING_FROM_TENSORPACK = """
## Coming from tensorpack's example

Its keys are the keys here, and the command lines of its documents work. What differs:

- The defaults are those of its version of 2018: C4 and the 2x schedule. Its newer versions start from FPN and 1x, so
  write `MODE_FPN` and `TRAIN.LR_SCHEDULE` where a command relies on them.
- Other defaults: `DATA.TRAIN` and `DATA.VAL` are COCO 2017; `RPN.CROWD_OVERLAP_THRESH` is off, as in its newer versions
  (0.7 in 2018); `TEST.RESULT_SCORE_THRESH_VIS` is 0.5 (0.3 in 2018); `DATA.NUM_WORKERS` is 2 (10 there).
- `DATA.CLASS_NAMES` holds the foreground classes only, without "BG" in front, and chooses among those of the data.
- A value is read as a Python literal and never executed. `None` and `'None'` both switch a norm off.
- A GPU may take several images (`TRAIN.BATCH_SIZE_PER_GPU`), and any number of GPUs will do: the schedule is scaled to
  the total batch.

| its setting | here |
|---|---|
"""


def document() -> str:
    """The text of docs/SETTINGS.md."""
    parts = [_INTRODUCTION]
    for group, title in _TITLES.items():
        parts.append(f"\n## {title}\n\n| setting | default | values | meaning |\n|---|---|---|---|\n")
        for key, setting in SETTINGS.items():
            if key.rpartition(".")[0] != group:
                continue
            needs = [f"It {sentence}." for k, _, sentence in RELATIONS if k == key]
            needs += [f"In training it {sentence}." for k, _, sentence in TRAINING_RELATIONS if k == key]
            needs += [f"In prediction it {sentence}." for k, _, sentence in PREDICTION_RELATIONS if k == key]
            meaning = _cell(" ".join([setting.about, *needs]))
            parts.append(f"| `{key}` | `{_cell(setting.default)}` | {_cell(setting.allowed.says)} | {meaning} |\n")
    parts.append("\n## Other spellings\n\n")
    parts += [f"- `{alias}` is `{key}`.\n" for alias, key in ALIASES.items()]
    parts.append(_COMING_FROM_TENSORPACK)
    parts += [f"| `{key}` | {hint} |\n" for key, hint in TENSORPACK.items()]
    return "".join(parts)


def _cell(content: object) -> str:
    return ('""' if content == "" else str(content)).replace("|", "\\|")


if __name__ == "__main__":
    with atomic_write(DOCUMENT) as f:
        f.write(document())
    print(f"wrote {DOCUMENT}")
