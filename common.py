"""Used by all of PackRCNN: errors for users, atomic writes, logging, and facts about the machine."""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from termcolor import colored

__all__ = [
    "UserError", "errors_in_one_line",
    "logger", "atomic_write", "write_json", "without_nan", "read_json", "read_text", "decode_text",
    "installed_gpus", "visible_gpus", "git_revision", "project_version", "describe_error", "import_function",
    "check_output_folder", "check_output_file",
    "new_process_code", "path_argument",
]  # fmt: skip


class UserError(Exception):
    """An error that the user can fix. The message is one line that names the file, image id, key or flag, and the fix.
    Exit code 2."""


class _Formatter(logging.Formatter):
    COLORS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}

    def format(self, record: logging.LogRecord) -> str:
        stamp = colored(self.formatTime(record, "%H:%M:%S"), "green")
        level = record.levelname
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{stamp} {text}" if level == "INFO" else f"{stamp} {colored(level, self.COLORS.get(level))} {text}"


class _Handler(logging.Handler):
    """Writes to the current sys.stderr, which tests and progress bars replace. A closed stream or a broken pipe is
    ignored."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                print(self.format(record), file=sys.stderr, flush=True)


def _make_logger() -> logging.Logger:
    log = logging.getLogger("packrcnn")
    if not log.handlers:
        handler = _Handler()
        handler.setFormatter(_Formatter())
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log


logger = _make_logger()


def errors_in_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """For the `main` of a program: a UserError becomes its one line and exit code 2."""

    @functools.wraps(main)
    def run(*arguments: Any, **options: Any) -> int:
        try:
            return main(*arguments, **options)
        except UserError as e:
            logger.error(str(e))
            return 2

    return run


def _open_closed_streams() -> None:
    """Opens /dev/null in place of standard streams that were closed at start.

    Otherwise the next opened files would get file descriptors 0 to 2, and TensorFlow would write messages into them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


_open_closed_streams()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w", durable: bool = True) -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` and renames it over `path` when the block ends without an error.

    A reader sees the old content or the new one, never a part; an error leaves the old file as it was.
    durable: it also outlasts a power cut at once, which takes as long as the disk does; not worth it for a thousand
    pictures that can be drawn again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode) as f:
            yield f
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output_folder(folder: str | os.PathLike, flag: str) -> None:
    """Raises UserError, naming the flag, if files cannot be written into the folder, which need not exist yet.

    Called before expensive work. Writes and removes a test file in the folder, or in its nearest existing parent.
    """
    place = Path(folder)
    while True:
        try:
            os.lstat(place)
            break
        except (FileNotFoundError, NotADirectoryError):
            place = place.parent
        except OSError as e:
            raise UserError(f"{flag} {folder}: {e.strerror}") from None
    try:
        if not place.is_dir():
            raise UserError(f"{flag} {folder}: {place} is a file, not a folder")
        with tempfile.TemporaryFile(dir=place) as f:
            f.write(bytes(4096))
            f.flush()
    except OSError as e:
        raise UserError(f"{flag} {folder}: nothing can be written into {place} ({e.strerror})") from None


def check_output_file(path: str | os.PathLike, flag: str) -> None:
    """Raises UserError, naming the flag, if the file cannot be written; see `check_output_folder`."""
    if Path(path).is_dir():
        raise UserError(f"{flag} {path} is a folder; give the name of a file in it")
    check_output_folder(Path(path).parent, f"{flag} {path}: folder")


def write_json(path: str | os.PathLike, content: Any, indent: int | None = None) -> None:
    with atomic_write(path) as f:
        json.dump(content, f, indent=indent)


def without_nan(content: Any) -> Any:
    """`content` with None in place of NaN and infinite floats, which JSON cannot represent."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def decode_text(content: Any, what: str) -> str:
    """The text of a file's bytes, UTF-8 or UTF-16 with a byte order mark; `what` is named in the error."""
    start = bytes(content[:3])
    encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return str(content, encoding)
    except UnicodeDecodeError as e:
        raise UserError(f"{what} is not UTF-8 text: {e.reason} at byte {e.start}") from None


def read_text(path: str | os.PathLike, what: str, read: Callable[[Any], Any] = Path.read_bytes) -> str:
    """The text of a file; `what` ("image list") is named in the error of a missing or broken one. `read` gives the
    file's bytes (utils.archives.read_file: those of a file that may lie in an archive)."""
    try:
        content = read(Path(path))
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as e:
        raise UserError(f"{what} {path} cannot be read: {e.strerror}") from None
    return decode_text(content, f"{what} {path}")


def read_json(path: str | os.PathLike, what: str, read: Callable[[Any], Any] = Path.read_bytes) -> Any:
    """The parsed file; `what` ("annotation file", "results file") is named in the error of a missing or broken one.
    `read` as in `read_text`."""
    text = read_text(path, what, read)
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{what} {path} is nested too deeply") from None
    except ValueError as e:  # also a number of more digits than Python reads
        raise UserError(f"{what} {path} is not valid JSON: {e}") from None


_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU, where the driver is loaded


def installed_gpus() -> int:
    """The number of this machine's NVIDIA GPUs."""
    return len(list(_NVIDIA_GPUS.iterdir())) if _NVIDIA_GPUS.is_dir() else 0


def visible_gpus() -> int:
    """The number of this machine's NVIDIA GPUs that CUDA_VISIBLE_DEVICES allows, found without TensorFlow. TensorFlow
    may be unable to use them; `utils.tf_v1.gpu_count` gives the number that it can use."""
    installed = installed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    count = 0
    for device in visible.split(","):
        name = device.strip()
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < installed)):
            break  # CUDA ignores what follows the first device that does not exist
        count += 1
    return min(count, installed)


def path_argument(text: str) -> str:
    """Type of argparse's options and arguments that name a file or folder: expands "~", refuses an empty value."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path must not be empty")
    return os.path.expanduser(text)


def git_revision() -> str:
    """Commit of the source directory, with "+" for uncommitted changes; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists():  # installed, maybe inside of somebody else's checkout
        return "unknown"
    try:
        sha = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
        return sha or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def describe_error(error: BaseException) -> str:
    """One line: the error's type, its message, and the innermost source line outside installed packages, e.g.
    "TypeError: … (own_head.py:12)"."""
    message = str(error).strip().split("\n")[0][:200]
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = list(traceback.extract_tb(error.__traceback__))
    frames = [f for f in frames if "site-packages" not in f.filename] or frames
    if isinstance(error, SyntaxError) or not frames:  # its message already names the place
        return text
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"


def import_function(name: str, setting: str) -> Callable:
    """The function that "module:function" names; `setting` (KEY=value) opens the UserError where there is none."""
    module, _, function = name.partition(":")
    where = f"setting {setting}"
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        hint = "give module:function; the module must be importable from the working directory"
        missing = getattr(e, "name", None)
        if __package__ and missing and (Path(__file__).parent / f"{missing}.py").exists():
            hint = f"the installed package has it as {__package__}.{missing}, which works in a checkout too"
        raise UserError(f"{where}: {e}; {hint}") from None
    except Exception as e:  # a module may raise any exception
        raise UserError(f"{where}: importing {module} raised {describe_error(e)}") from None
    if not callable(found):
        raise UserError(f"{where}: {function} of {module} is not a function, its type is {type(found).__name__}")
    return found


def new_process_code(module: str, call: str) -> str:
    """What `python -c` runs to call a function of one of the project's modules, which is found as in this process."""
    own = [] if __package__ else [str(Path(__file__).parent)]
    return f"import importlib, sys; sys.path[:] = {[*own, *sys.path]!r}; importlib.import_module({module!r}).{call}"


def project_version() -> str:
    """The version that pyproject.toml gives, or that of the installed package."""
    with contextlib.suppress(OSError):
        text = (Path(__file__).resolve().parent / "pyproject.toml").read_text()
        match = re.search(r'^version = "(.*)"', text, re.M)
        if match:
            return match.group(1)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("packrcnn")
    return "unknown"
