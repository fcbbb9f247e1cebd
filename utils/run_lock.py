"""A run directory has one owner: the process that trains in it.

The owner holds a lock of the operating system on a file in the directory, which ends with the process however it ends.
Where such locks do not reach other machines (some network file systems), the file itself tells: the owner touches it
every few seconds, and one that nobody touches any more is taken over after a short wait. Nothing is cleaned by hand.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from common import UserError, logger

__all__ = ["LOCK_NAME", "RunLock"]

LOCK_NAME = ".owner"
TOUCH_SECONDS = 5.0  # how often an owner shows that it is alive
PATIENCE_SECONDS = 20.0  # how long an owner on another machine may be silent


class RunLock:
    """The ownership of a run directory, from the constructor to `release`; UserError names an owner that is there."""

    def __init__(self, folder: str | os.PathLike):
        self._path = Path(folder) / LOCK_NAME
        self._created = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._take()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="run lock", daemon=True)
        self._thread.start()

    def _take(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                owner = _read(file)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locks_work = True
                except OSError as e:
                    if e.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
                        raise self._refusal(_read(file)) from None
                    locks_work = False  # of a file system without locks
                if not self._is_still(file):  # its owner removed it between our opening and locking it
                    os.close(file)
                    continue
                self._check(owner, file, locks_work)
                content = json.dumps(
                    {"host": socket.gethostname(), "process": os.getpid(), "start": _start(os.getpid())}
                )
                os.truncate(file, 0)
                os.pwrite(file, content.encode(), 0)
                return file
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(file)
                raise

    def _check(self, owner: dict[str, Any], file: int, locks_work: bool) -> None:
        """Refuses if the owner that the file names still lives, as far as can be seen from here."""
        if not owner:
            return
        if owner.get("host") == socket.gethostname():
            alive = _start(owner.get("process")) is not None and _start(owner["process"]) == owner.get("start")
            # A lock that was free here cannot belong to another process of this machine.
            if alive and not locks_work and owner["process"] != os.getpid():
                raise self._refusal(owner)
            return
        logger.warning(
            f"{self._path.parent} was last used by {_name(owner)}: waiting {PATIENCE_SECONDS:.0f} s for a sign of life"
        )
        # Only changes are looked at: clocks of machines differ.
        before, deadline = os.fstat(file).st_mtime_ns, time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(0.5, PATIENCE_SECONDS / 4))
            now = os.stat(self._path).st_mtime_ns
            if now != before:
                raise self._refusal(owner)

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"{self._path.parent} is in use by {_name(owner)}: wait for it, stop it, or choose another --logdir"
        )

    def _is_still(self, file: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        return False

    def _touch(self) -> None:
        while not self._stop.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def release(self) -> None:
        """Ends the ownership; a directory that was made for it and stayed empty is removed."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_still(self._file):
                os.unlink(self._path)
        os.close(self._file)
        if self._created:
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()


def _read(file: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(file, 10_000, 0) or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown machine')}"


def _start(process: Any) -> int | None:
    """When a process of this machine started, in ticks since the machine did; None if there is none of this number."""
    try:
        return int(Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, TypeError, IndexError):
        return None
