"""What a setting is: a default, the values it takes and an explanation. config.py lists all of them with these words.

`Setting(default, allowed, about)`. `allowed` says in words which values a key takes, and reads one: it returns the
value in the form that the program works with, or raises ValueError. The functions here make them: `whole(1)`,
`number(0, 1)`, `one_of("a", "b")`, `optional(whole(1))`, `list_of(number(above=0), count=4)`, …
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

from common import UserError

__all__ = [
    "Allowed", "Setting", "either", "flag", "function_or", "list_of", "nearest", "number", "one_of", "optional",
    "parse_literal", "read_value", "text", "whole",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a setting takes. `says` completes the sentence "must be …"."""

    says: str
    read: Callable[[Any], Any]  # value -> the value in canonical form; ValueError if it is not allowed
    choices: tuple = ()  # where there are only these


@dataclasses.dataclass(frozen=True)
class Setting:
    default: Any
    allowed: Allowed
    about: str


# ------------------------------------------------------------------------------------------------------ kinds of values
def _read_flag(value: Any) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError


flag = Allowed("True or False", _read_flag, (True, False))


def text(says: str = "text") -> Allowed:
    """A string that is not empty; `says` tells what it names."""

    def read(value: Any) -> str:
        if isinstance(value, str) and value.strip():
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
    """What one of the two takes; values of the first come first."""

    def read(value: Any) -> Any:
        try:
            return first.read(value)
        except ValueError:
            return second.read(value)

    return Allowed(says or f"{first.says}, or {second.says}", read, first.choices)


def optional(allowed: Allowed) -> Allowed:
    """None, or what `allowed` takes."""
    return either(one_of(None), allowed, f"{allowed.says}, or None")


def function_or(allowed: Allowed, says: str = "") -> Allowed:
    """What `allowed` takes, or `module:function`, which names a function of the user's own."""

    def read(value: Any) -> str:
        module, _, function = value.partition(":") if isinstance(value, str) else ("", "", "")
        if module and function:
            return value
        raise ValueError

    return either(allowed, Allowed("", read), says or f"{allowed.says}, or module:function, a function of your own")


def list_of(allowed: Allowed, count: int | None = None, least: int = 1, says: str = "") -> Allowed:
    """A list of `count` values, or of `least` or more, each of them as `allowed` says."""

    def read(value: Any) -> list:
        if not isinstance(value, list) or (len(value) != count if count is not None else len(value) < least):
            raise ValueError
        return [allowed.read(v) for v in value]

    length = "a list of values" if count is None else f"a list of {count} values"
    return Allowed(says or f"{length}, each {allowed.says}", read)


# ------------------------------------------------------------------------------------------------------ reading a value
def parse_literal(given: str) -> Any:
    """The Python literal that a text is, otherwise the text itself. Nothing is executed."""
    try:
        return ast.literal_eval(given)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return given


def read_value(key: str, setting: Setting, value: Any, origin: str) -> Any:
    """The value in canonical form; UserError that says what the key takes and what was probably meant."""
    value = _plain(value)
    try:
        return setting.allowed.read(value)
    except (ValueError, TypeError):
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
        wants = f"{origin}: {key}={shown} must be {setting.allowed.says}"
        raise UserError(wants + _meant(setting.allowed, value)) from None


def _meant(allowed: Allowed, value: Any) -> str:
    """A hint at the allowed value that was probably meant: without quotes, as a list, spelled rightly."""
    guesses: list[Any] = [[value]]
    if isinstance(value, str):
        other_spellings = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        guesses = [_plain(parse_literal(value)), other_spellings.get(value.lower(), value), value.strip(), *guesses]
        guesses += [None] if value.lower() in ("none", "null") else []
        guesses += nearest(value, [c for c in allowed.choices if isinstance(c, str)])
    for guess in guesses:
        try:
            return f" (did you mean {allowed.read(guess)}?)"
        except (ValueError, TypeError):
            continue
    return ""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """The known word that looks most like `word`, case aside, as a list of one; [] where none does."""
    by_lower = {k.lower(): k for k in known}
    return [by_lower[k] for k in difflib.get_close_matches(word.lower(), by_lower, 1, cutoff)]


def _plain(value: Any) -> Any:
    """Tuples as lists, recursively, so that a setting survives JSON unchanged."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value
