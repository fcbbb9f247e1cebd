"""The form of a setting: a default, the allowed values and an explanation. config.py lists all settings in this form.

`Setting(default, allowed, about)`: `allowed` describes in words which values a key takes, and reads a value: it returns
it in the form that the program uses, or raises ValueError. The functions here make such objects: `whole(1)`,
`number(0, 1)`, `one_of("a", "b")`, `optional(whole(1))`, `list_of(number(above=0), count=4)`, …
"""

import ast
import copy
import dataclasses
import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from common import UserError
from utils.efficientnet_lite import NETWORKS as LITE

__all__ = [
    "Allowed", "Setting", "anchors", "automatic", "backbone", "class_names", "datasets", "edges", "either", "exactly",
    "flag", "function_or", "list_of", "metric", "names", "nearest", "number", "one_of", "optional", "pairs",
    "parse_literal", "pattern", "pixels", "read_value", "schedule", "shown", "span", "steps", "targets", "text",
    "whole",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a setting may have. `says` completes the sentence "must be …"."""

    says: str
    read: Callable[[Any], Any]  # value -> the value in canonical form; ValueError if it is not allowed
    choices: tuple = ()  # the only values, if the setting has a fixed set


@dataclasses.dataclass(frozen=True)
class Setting:
    default: Any
    allowed: Allowed
    about: str
    names_code: bool = False  # a value may name a module that is imported (trust.py)


# ------------------------------------------------------------------------------------------------------ kinds of values
def _read_flag(value: Any) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError


flag = Allowed("True or False", _read_flag, (True, False))


def text(says: str = "text") -> Allowed:
    """A string that is not empty; `says` describes it."""

    def read(value: Any) -> str:
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value
        raise ValueError

    return Allowed(says, read)


def _limits(what: str, low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    if low is not None and high is not None:
        return f"{what} from {low} to {high}"
    if low is not None:
        return f"{what} from {low} to below {below}" if below is not None else f"{what}, {low} or more"
    if above is not None:
        end = f", at most {high}" if high is not None else f" and below {below}" if below is not None else ""
        return f"{what} above {above}{end}"
    return what


def _within(value: float, low: float | None, high: float | None, above: float | None, below: float | None) -> bool:
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def number(
    low: float | None = None, high: float | None = None, *, above: float | None = None, below: float | None = None
) -> Allowed:
    """A finite number within limits, read as float."""

    def read(value: Any) -> float:
        if type(value) in (int, float) and math.isfinite(value) and _within(value, low, high, above, below):
            return float(value)
        raise ValueError

    return Allowed(_limits("a number", low, high, above, below), read)


def whole(low: int | None = None, high: int | None = None, what: str = "a whole number") -> Allowed:
    """A whole number within limits; 4.0 is 4."""

    def read(value: Any) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is int and _within(value, low, high, None, None):
            return value
        raise ValueError

    return Allowed(_limits(what, low, high, None, None), read)


def one_of(*choices: Any) -> Allowed:
    def read(value: Any) -> Any:
        if value == "None" and None in choices:
            return None
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise ValueError

    return Allowed(f"one of {', '.join(map(str, choices))}", read, choices)


def either(first: Allowed, second: Allowed, says: str = "") -> Allowed:
    """Values allowed by either of the two; the first is tried first."""

    def read(value: Any) -> Any:
        try:
            return first.read(value)
        except ValueError:
            return second.read(value)

    return Allowed(says or f"{first.says}, or {second.says}", read, first.choices)


def optional(allowed: Allowed) -> Allowed:
    """None, or a value that `allowed` accepts."""
    return either(one_of(None), allowed, f"{allowed.says}, or None")


def automatic(allowed: Allowed) -> Allowed:
    """ "auto", which fits the run, or a value that `allowed` accepts."""
    return either(one_of("auto"), allowed, f"auto, or {allowed.says}")


def function_or(allowed: Allowed, says: str = "") -> Allowed:
    """A value that `allowed` accepts, or `module:function`, which names a function of the user."""

    def read(value: Any) -> str:
        module, _, function = value.partition(":") if isinstance(value, str) else ("", "", "")
        if module and function:
            return value
        raise ValueError

    return either(allowed, Allowed("", read), says or f"{allowed.says}, or module:function, a function of your own")


def list_of(allowed: Allowed, count: int | None = None, least: int = 1, says: str = "") -> Allowed:
    """A list of `count` values, or of at least `least`, each accepted by `allowed`."""

    def read(value: Any) -> list:
        if not isinstance(value, list) or (len(value) != count if count is not None else len(value) < least):
            raise ValueError
        return [allowed.read(v) for v in value]

    length = "a list of values" if count is None else f"a list of {count} values"
    return Allowed(says or f"{length}, each {allowed.says}", read)


# ----------------------------------------------------------------------------------------- values of single settings
# Iterations of the "1x" schedule at a total batch of 8 images (Detectron: 90k iterations of 16 images).
_COCO_SCHEDULE_1X = [120000, 160000, 180000]


def _read_names(value: Any) -> list[str]:
    names = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError
    if isinstance(value, str) and value[:1] in ("[", "("):
        raise ValueError("; put quotes around a list of names: \"KEY=['a','b']\"")
    return names


def _read_datasets(value: Any) -> dict[str, list[str]]:
    if not isinstance(value, dict):
        raise ValueError
    for entry in value.values():
        texts = isinstance(entry, list) and all(isinstance(e, str) for e in entry)
        # A list that starts with a word instead of a file name is a data set in another format.
        options = texts and all("=" in e for e in entry[2:])
        if not (texts and len(entry) >= 2 and (options or not entry[0].endswith(".json"))):
            raise ValueError
    return value


def _read_pairs(value: Any) -> list[list[int | str]]:
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        raise ValueError
    if not all(type(k) in (int, str) for pair in value for k in pair):
        raise ValueError
    return value


def _read_edges(value: Any) -> list[int]:
    edges = [value] if type(value) in (int, float) else value
    edges = list_of(pixels).read(edges)
    if len(edges) == 2 and edges[0] > edges[1]:
        raise ValueError
    return edges * 2 if len(edges) == 1 else edges


def _read_schedule(value: Any) -> list[int] | str:
    if isinstance(value, str) and value.partition(":")[0] == "auto":
        if not re.fullmatch("auto(:[1-9]x)?", value):
            raise ValueError
        return "auto" if value == "auto:2x" else value
    if isinstance(value, str):
        if not re.fullmatch("[1-9]x", value):
            raise ValueError
        factor = int(value[0])
        last = _COCO_SCHEDULE_1X[-1] * factor
        # Long schedules spend the extra time at the first rate (He et al., Rethinking ImageNet Pre-training, 2018).
        return [v * factor for v in _COCO_SCHEDULE_1X] if factor <= 2 else [last - 120000, last - 40000, last]
    milestones = list_of(steps).read(value)
    if milestones != sorted(set(milestones)):
        raise ValueError
    return milestones


def _read_box(value: Any) -> list[float]:
    box = list_of(number(-16384, 16384), 4).read(value)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError
    return box


def _read_pattern(value: Any) -> str:
    pattern = text().read(value)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f" ({e})") from None
    return pattern


def _read_backbone(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    kind, colon, name = value.partition(":")
    if colon and all(kind.split(".")) and name:
        mistyped = kind != "keras" and "." not in kind and nearest(kind, ["keras"], 0.7)
        if mistyped and importlib.util.find_spec(kind) is None:
            raise ValueError(f" (did you mean keras:{name}?)")
        return value
    if re.match(r"(?i)res-?net|r\d+$", kind):
        if value == "resnet":
            return value
        raise ValueError(" (did you mean resnet? BACKBONE.RESNET_NUM_BLOCK sets its depth, [3,4,23,3] for ResNet-101)")
    if value in LITE:
        return value
    if lite := re.search(r"(?i)lite[-_]?([0-4])", value):
        raise ValueError(f" (did you mean efficientnet_lite{lite[1]}?)")
    name = name or re.sub(r"(?i)^(tf\.|tf_)?keras(\.applications)?\.|^keras$", "", kind) or "EfficientNetB0"
    raise ValueError(f" (did you mean keras:{name}?)")


def exactly(only: Any) -> Allowed:
    """A value that the network determines: it is recorded in files, and no other value is allowed."""

    def read(value: Any) -> Any:
        if value != only:
            raise ValueError
        return copy.deepcopy(only)

    return Allowed(f"{only}, which follows from the network", read)


def span(most: float) -> Allowed:
    """[lo, hi] with 0 < lo <= hi <= most, or []."""

    def read(value: Any) -> list[float]:
        if value in (None, []):
            return []
        low, high = list_of(number(above=0, high=most), 2).read(value)
        if low > high:
            raise ValueError
        return [low, high]

    return Allowed(f"[lo, hi] with 0 < lo <= hi <= {most}, or [] for none", read)


def _read_metric(value: Any) -> str:
    name = text().read(value).strip()
    if name.removeprefix("-") in ("val_loss", "val/total_loss") or re.search(r"(^|/)val/\S*loss$", name):
        if not name.startswith("-"):
            raise ValueError(f"; a loss is better when it is smaller: -{name}")
        return "-val/total_loss" if name == "-val_loss" else name
    if not name.removeprefix("-"):
        raise ValueError
    return name


def _read_targets(value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError
    return {_read_metric(name): number().read(wanted) for name, wanted in value.items()}


pixels = whole(16, 16384, "a whole number of pixels")
steps = whole(1, 10**9)
names = Allowed("the name of a data set, or a list of names", _read_names)
class_names = Allowed("a list of names of foreground classes", _read_names)
datasets = Allowed("{name: ['annotations.json', 'image folder']} or {name: [format, path, …]}", _read_datasets)
edges = Allowed("pixels from 16 to 16384: a number, [lo, hi] with lo <= hi, or a longer list", _read_edges)
pairs = Allowed("a list of pairs of keypoints, by name or number from 0; or []", _read_pairs)
schedule = Allowed(
    "auto, auto:1x to auto:9x, 1x to 9x, or a list of increasing iterations like [120000,160000,180000]", _read_schedule
)
metric = Allowed("the name of a metric as in log.jsonl, with - before it if smaller is better", _read_metric)
targets = Allowed("{metric: number}, e.g. {'bbox/AP': 0.377}; {} for none", _read_targets)
pattern = Allowed("a regular expression", _read_pattern)
backbone = Allowed("resnet, efficientnet_lite0 to 4, keras:NETWORK or module:function", _read_backbone)
anchors = Allowed(
    "a list for each level of anchors [x1,y1,x2,y2] with x1 < x2 and y1 < y2; [] for none",
    list_of(list_of(Allowed("", _read_box)), least=0).read,
)


# ------------------------------------------------------------------------------------------------------ reading a value
_BAD = (ValueError, TypeError, OverflowError)


def parse_literal(given: str) -> Any:
    """The text read as a Python literal, or the text itself if it is not one. Nothing is executed."""
    try:
        return ast.literal_eval(given)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return given


def read_value(key: str, setting: Setting, value: Any, origin: str) -> Any:
    """The value in canonical form. A UserError says what the key takes and what was probably meant."""
    value = _plain(value)
    try:
        return setting.allowed.read(value)
    except _BAD as e:
        hint = str(e) if type(e) is ValueError else ""
        wants = f"{origin}: {key}={shown(value)} must be {setting.allowed.says}"
        raise UserError(wants + (hint or _meant(setting.allowed, value))) from None


def shown(value: Any) -> str:
    """A value as text for a message of one line."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print numbers of more than 4300 digits
        return "(a very large number)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _meant(allowed: Allowed, value: Any) -> str:
    """A hint at the allowed value that was probably meant, e.g. with quotes removed, as a list, or spelled
    correctly."""
    guesses: list[Any] = [[value]]
    if isinstance(value, str):
        other_spellings = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        guesses = [_plain(parse_literal(value)), other_spellings.get(value.lower(), value), value.strip(), *guesses]
        guesses += [None] if value.lower() in ("none", "null") else []
        guesses += nearest(value, [c for c in allowed.choices if isinstance(c, str)])
    for guess in guesses:
        try:
            return f" (did you mean {allowed.read(guess)}?)"
        except _BAD:
            continue
    return ""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5, count: int = 1) -> list[str]:
    """At most `count` known words that look most like `word`, ignoring case and underscores; [] if none is similar."""
    plain = {k.lower().replace("_", ""): k for k in known}
    return [plain[k] for k in difflib.get_close_matches(word.lower().replace("_", ""), plain, count, cutoff)]


def _plain(value: Any) -> Any:
    """Tuples as lists, recursively, so that a setting survives JSON unchanged."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value
