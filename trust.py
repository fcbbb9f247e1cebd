"""Decides which settings may import code: loaded files cannot run code by themselves (docs/SAFETY.md).

The settings marked `names_code` in config.py make the program import a module. Their values are used when --config
gives them. A value that comes from a file (a checkpoint, an .npz, a run directory) is used only if --trust-code names
its module.
"""

from collections.abc import Sequence

from common import UserError
from config import ALIASES, SETTINGS, Config

__all__ = ["check_trust", "named_code", "trust_options"]


def named_code(cfg: Config) -> list[tuple[str, str, str]]:
    """(key, data set or "", "module:function") of every function of your own that the settings name."""
    found = []
    for key in (k for k, setting in SETTINGS.items() if setting.names_code):
        value = cfg.get(key)
        if isinstance(value, dict):  # of data sets, whose first entry may be a COCO file instead
            found += [(key, name, spec[0]) for name, spec in value.items() if not spec[0].endswith(".json")]
        elif not (key == "BACKBONE.NAME" and value.startswith("keras:")):
            found.append((key, "", value))
    return [entry for entry in found if ":" in entry[2]]


def check_trust(
    cfg: Config, arguments: Sequence[str], origin: str, trusted: Sequence[str], datasets: Sequence[str] | None = None
) -> None:
    """Raises UserError if a setting names code that neither the KEY=VAL `arguments` give nor `trusted` allows.

    Args:
        cfg: the stored settings changed by the arguments, not frozen. Data sets that are not loaded and name untrusted
            code are removed from it.
        origin: the file with the stored settings.
        trusted: the modules that --trust-code names.
        datasets: names of the data sets that will be loaded; None for all that have settings.
    """
    given = {ALIASES.get(key, key) for key in (argument.partition("=")[0].strip() for argument in arguments)}
    asked = [
        (key, name, text)
        for key, name, text in named_code(cfg)
        if key not in given and text.partition(":")[0] not in trusted
    ]
    unused = [name for _, name, _ in asked if name and datasets is not None and name not in datasets]
    if unused:
        cfg.DATA.DATASETS = {name: spec for name, spec in cfg.DATA.DATASETS.items() if name not in unused}
    refused = [(key, text) for key, name, text in asked if name not in unused or not name]
    if refused:
        modules = list(dict.fromkeys(text.partition(":")[0] for _, text in refused))
        options = " ".join(f"--trust-code {module}" for module in modules)
        key, text = refused[0]
        raise UserError(
            f"{origin} asks for code of the module {' and '.join(modules)} ({key}: {text}), which loaded files do not "
            f"get by themselves: if it is yours or you have read it, add {options}"
        )


def trust_options(cfg: Config) -> str:
    """ " --trust-code MODULE …" with the modules that these settings need when read from a file, or ""."""
    modules = dict.fromkeys(text.partition(":")[0] for _, _, text in named_code(cfg))
    return "".join(f" --trust-code {module}" for module in modules)
