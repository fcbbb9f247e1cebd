"""Settings from files: `--config @FILE` of KEY=VAL lines, or the settings.json of a run.

A file of lines has one KEY=VAL in each, as `--print-config` writes them. Empty lines and comments, which start with #,
are ignored. Settings from files do not make the program import code (trust.py).
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from common import UserError
from config import ALIASES, default_config
from config_check import parse_literal, shown
from config_recipes import recipe_settings
from trust import check_trust
from utils.checkpoint import read_description

__all__ = ["settings_words"]

_MAX_SIZE = 8 << 20  # bytes of a file of settings


def settings_words(words: Sequence[str], trusted: Sequence[str] = (), recipe: str | None = None) -> list[str]:
    """The words of --config with each @FILE replaced by its KEY=VAL, after those of a recipe. Later ones win.

    trusted: modules that settings in files may name; others are refused unless a later word replaces the setting.
    """
    found = [recipe_settings(recipe)] if recipe else []
    for n, word in enumerate(words):
        if not word.startswith("@"):
            found.append([word])
            continue
        path = Path(os.path.expanduser(word[1:]))
        inside = _read(path, word)
        later = {_key(other) for other in words[n + 1 :] if not other.startswith("@")}
        used = [setting for setting in inside if _key(setting) not in later]
        check_trust(default_config().update_args(used), [], str(path), trusted)
        found.append(inside)
    return [word for group in found for word in group]


def _key(word: str) -> str:
    key = word.partition("=")[0].strip()
    return ALIASES.get(key, key)


def _read(path: Path, word: str) -> list[str]:
    """The settings of a file as KEY=VAL."""
    if path.is_dir():
        path = path / "settings.json"
    if len(word) < 2 or not path.exists():
        raise UserError(
            f"--config {shown(word)[1:-1]}: there is no such file; @FILE is a file of KEY=VAL lines, or the "
            "settings.json of a run"
        )
    if not path.is_file():
        raise UserError(f"--config {word}: this is no regular file (a pipe or device); write the settings into a file")
    if path.stat().st_size > _MAX_SIZE:
        raise UserError(
            f"--config {word}: {path.stat().st_size >> 20} MB are no settings; give a file of KEY=VAL lines"
        )
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"--config {word}: this is not a text; give a file of KEY=VAL lines or the settings.json of a run"
        ) from None
    except OSError as e:
        raise UserError(f"--config {word}: {e.strerror or e}") from None
    if text.lstrip()[:1] == "{":
        return _of_run(path)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if setting := _setting_of_line(line, f"{path}, line {number}"):
            found.append(setting)
    return found


def _of_run(path: Path) -> list[str]:
    stored = read_description(path).get("settings")
    if not stored:
        raise UserError(f"--config @{path}: it has no settings; give the settings.json of a run")
    cfg = default_config().update_from_dict(stored, str(path))
    return [f"{key}={cfg.get(key)!r}" for key in dict.fromkeys(ALIASES.get(k, k) for k in stored)]


def _setting_of_line(line: str, origin: str) -> str:
    """KEY=VAL, checked; "" for a line without one."""
    line = _without_comment(line).strip()
    if len(line) > 1 and line[0] in "'\"" and line[-1] == line[0]:  # quoted as for a shell
        line = line[1:-1].strip()
    if not line:
        return ""
    value = line.partition("=")[2]
    if parse_literal(value.strip()) == value.strip() and re.search(r"\s[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*=", value):
        raise UserError(f"{origin}: {shown(line)} must be one setting; give each its own line")
    key, equals, value = line.partition("=")
    setting = f"{key.strip()}{equals}{value.strip()}"
    default_config().update_args([setting], origin)
    return setting


def _without_comment(line: str) -> str:
    """The line up to a # that begins it or follows a space, outside quotes."""
    quote = ""
    for n, sign in enumerate(line):
        before = line[n - 1 : n]
        if quote:
            if sign == quote and before != "\\":
                quote = ""
        elif sign in "'\"" and before in ("", "=", "[", "(", "{", ",", ":", " "):
            quote = sign
        elif sign == "#" and (not before or before.isspace()):
            return line[:n]
    return line
