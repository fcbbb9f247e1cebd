"""A run directory has one owner: the process that trains in it.

The owner holds an operating system lock on a file in the directory, which is released when the process ends for any
reason. On some network file systems such locks do not work between machines. So the owner also touches the file every
few seconds, and a file that is no longer touched is taken over after a short wait. Nobody has to clean up by hand.
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
    """The ownership of a run directory, from the constructor to `release`; a UserError names another owner."""

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
                    locks_work = False  # the file system has no locks
                if not self._is_still(file):  # its owner removed it after it was opened here
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
        """Raises UserError if the owner named in the file seems to be still running."""
        if not owner:
            return
        if owner.get("host") == socket.gethostname():
            alive = _start(owner.get("process")) is not None and _start(owner["process"]) == owner.get("start")
            # The lock was free, so no other process of this machine owns it.
            if alive and not locks_work and owner["process"] != os.getpid():
                raise self._refusal(owner)
            return
        logger.warning(
            f"{self._path.parent} was last used by {_name(owner)}: waiting {PATIENCE_SECONDS:.0f} s for a sign of life"
        )
        # Only changes of the time stamp are used, because the clocks of machines differ.
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
        """Ends the ownership; removes the directory if it was created for it and is still empty."""
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
    """Start time of a process of this machine, in ticks since boot; None if there is no such process."""
    try:
        return int(Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, TypeError, IndexError):
        return None
