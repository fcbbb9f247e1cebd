"""Downloads that survive interruptions: continued where they stopped, checked by size and sum, retried with patience.

A file is written to <name>.part, with what the server said of it in <name>.part.json, and gets its name when it is
complete and its sum is right. A part is continued only if it is of the same content (If-Range).
"""

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from common import UserError, logger, write_json

__all__ = ["Remote", "Wrong", "check_space", "download", "download_many", "sum_of"]

CHUNK = 1 << 20
PATIENCE = 60.0  # seconds without a byte after which a connection is given up
TRIES = 8  # in a row without a byte of progress
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # HTTP codes of troubles that pass
_SUMS = {32: "md5", 40: "sha1", 64: "sha256"}


class Remote(NamedTuple):
    """A file to download."""

    url: str
    name: str  # relative to the folder
    size: int = 0  # bytes, roughly, for the check of the disk; 0 if not known
    digest: str = ""  # md5, sha1 or sha256 in hex, or the first digits of a sha256; "" where none is published


class Wrong(UserError):
    """What was downloaded is not what was announced."""


def sum_of(path: str | os.PathLike, digest: str) -> str:
    """The file's sum of the kind of `digest`, which its length tells; as many digits as it has."""
    state = hashlib.new(_SUMS.get(len(digest), "sha256"))
    with open(path, "rb") as f:
        while block := f.read(CHUNK):
            state.update(block)
    return state.hexdigest()[: len(digest)]


def check_space(folder: str | os.PathLike, wanted: int, what: str) -> None:
    """Raises UserError if the disk of the folder has fewer than `wanted` bytes left."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise UserError(
            f"{what} needs about {_bytes(wanted)}, but the disk of {folder} has {_bytes(free)} left: make room, or "
            "choose another folder with --output"
        )


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


# ------------------------------------------------------------------------------------------------ one file
def download(remote: Remote, folder: str | os.PathLike, progress: bool = True, pause: float = 1.0) -> Path:
    """The file in the folder, downloaded if it is not there; UserError in one line if it cannot be had.

    pause: seconds before the second try; later ones wait twice as long each, up to two minutes.
    """
    target = Path(folder) / remote.name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, note = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    failures, wrong = 0, 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(remote, part, note, progress)
            if remote.digest and (found := sum_of(part, remote.digest)) != remote.digest:
                raise Wrong(f"{remote.url}: the sum of what came is {found}, published is {remote.digest}")
            break
        except Wrong as e:
            wrong += 1
            for path in (part, note):
                path.unlink(missing_ok=True)
            if wrong == 2:
                raise UserError(
                    f"{e}; it was downloaded twice and removed: try later, or look at the address"
                ) from None
            logger.warning(f"{e}; downloading it again")
        except _Passing as e:
            after = part.stat().st_size if part.exists() else 0
            failures = 0 if after > before else failures + 1
            if failures >= TRIES:
                raise UserError(f"{remote.url}: {e}, {TRIES} times in a row; {_rest(part)}") from None
            wait = e.wait if e.wait is not None else min(120.0, pause * 2**failures) * random.uniform(0.5, 1)
            logger.warning(f"{remote.url}: {e}; trying again in {wait:.0f} s")
            time.sleep(wait)
    os.replace(part, target)
    note.unlink(missing_ok=True)
    return target


def _rest(part: Path) -> str:
    there = part.stat().st_size if part.exists() else 0
    return f"{_bytes(there)} are kept in {part}: the same command continues" if there else "nothing came"


class _Passing(Exception):
    """A trouble that may pass; `wait`: the seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


def _fetch(remote: Remote, part: Path, note: Path, progress: bool) -> None:
    """Adds the rest of the file to `part`."""
    known = _known(note, remote.url)
    start = part.stat().st_size if part.exists() and known else 0
    headers = {"User-Agent": "packrcnn-download", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": known["validator"]}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=PATIENCE)
    except urllib.error.HTTPError as e:
        with e:
            if e.code == 416 and start:  # nothing is left, or the file has changed
                if known.get("size") == start:
                    return
                part.unlink()
                raise _Passing("the file on the server has changed") from None
            if e.code in _AGAIN:
                raise _Passing(f"the server says {e.code} {e.reason}", _retry_after(e.headers)) from None
            raise UserError(f"{remote.url}: the server says {e.code} {e.reason}; look at the address") from None
    except (OSError, http.client.HTTPException) as e:
        raise _Passing(f"no answer ({_reason(e)})") from None
    with reply:
        if reply.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
            if not span or int(span[1]) != start:
                part.unlink(missing_ok=True)
                raise _Passing("the server sent another part than was asked for")
            size = None if span[2] == "*" else int(span[2])
        else:  # a server without ranges, or another content than before
            start, size = 0, _length(reply.headers)
        validator = reply.headers.get("ETag", "")
        if not validator or validator.startswith("W/"):  # weak ones do not compare bytes
            validator = reply.headers.get("Last-Modified", "")
        if validator:
            write_json(note, {"url": remote.url, "validator": validator, "size": size})
        else:
            note.unlink(missing_ok=True)
        check_space(part.parent, (size or 0) - start, remote.name)
        done = _copy(reply, part, start, size, progress, remote.name)
    if size is not None and done != size:
        if done > size:
            part.unlink()
        raise _Passing(f"the connection ended after {_bytes(done)} of {_bytes(size)}")


def _copy(reply: Any, part: Path, start: int, size: int | None, progress: bool, name: str) -> int:
    """Bytes of the part after what came was added."""
    done = start
    every = 0.5 if sys.stderr.isatty() else 30
    with (
        open(part, "r+b" if start else "wb") as f,
        tqdm(total=size, initial=start, desc=name, unit="B", unit_scale=True, disable=not progress,
             mininterval=every, dynamic_ncols=True) as bar,
    ):  # fmt: skip
        f.seek(start)
        try:
            while block := reply.read(CHUNK):
                f.write(block)
                done += len(block)
                bar.update(len(block))
        except (http.client.HTTPException, OSError) as e:
            if isinstance(e, http.client.IncompleteRead):
                f.write(e.partial)
                done += len(e.partial)
            elif getattr(e, "errno", None) in (27, 28, 122):  # too large, no space, quota
                raise UserError(
                    f"{part} cannot be written: {getattr(e, 'strerror', e)}; make room and start again"
                ) from None
            else:
                f.flush()
                raise _Passing(f"the connection broke ({_reason(e)})") from None
    return done


def _known(note: Path, url: str) -> dict[str, Any]:
    """What the server said of the part that is there; {} if it cannot be continued."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(note.read_text())
        if type(content) is dict and content.get("url") == url and type(content.get("validator")) is str:
            return content
    return {}


def _length(headers: Any) -> int | None:
    text = headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _retry_after(headers: Any) -> float | None:
    text = headers.get("Retry-After", "") if headers else ""
    if text.isdecimal():
        return min(float(text), 600.0)
    with contextlib.suppress(TypeError, ValueError):
        return min(600.0, max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()))
    return None


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner or type(error).__name__)


# ------------------------------------------------------------------------------------------------ many small files
def download_many(
    remotes: Sequence[Remote], folder: str | os.PathLike, workers: int = 32, pause: float = 1.0
) -> dict[str, str]:
    """Downloads many small files at once; {name: why it could not be had} of those that are missing on the server.

    Files that are there are not asked for again. Other troubles than a missing file end it.
    """
    todo = [r for r in remotes if not (Path(folder) / r.name).exists()]
    missing: dict[str, str] = {}
    stop = threading.Event()
    every = 0.5 if sys.stderr.isatty() else 30

    def one(remote: Remote) -> None:
        if stop.is_set():
            return
        try:
            download(remote, folder, progress=False, pause=pause)
        except UserError as e:
            if " 404 " not in str(e) and " 403 " not in str(e):
                stop.set()
                raise
            missing[remote.name] = str(e)

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(todo), unit="file", mininterval=every, dynamic_ncols=True) as bar,
    ):
        try:
            for _ in _in_order(pool.map(one, todo), bar.update):
                pass
        except BaseException:
            stop.set()
            raise
    return missing


def _in_order(results: Iterable[None], update: Callable[[int], Any]) -> Iterable[None]:
    for result in results:
        update(1)
        yield result


def file_name_of(url: str) -> str:
    """The last part of an address's path."""
    return os.path.basename(urlsplit(url).path) or "index"
