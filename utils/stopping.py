"""Signals that ask the program to stop: they raise an exception if nothing is to be saved, else call a handler.

SIGINT (Ctrl-C), SIGTERM (schedulers) and SIGHUP (a terminal that closed) are treated alike. A signal that was ignored
at the start, e.g. by nohup, stays ignored. Only the main thread can have handlers; in other threads nothing changes.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

__all__ = ["Stopped", "on_stop", "stop_by_exception"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal asked to stop while there was nothing to save."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def _handlers(handler: Callable) -> Iterator[bool]:
    """Sets the handler for the signals while the block runs; yields whether that was possible."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    numbers = [n for n in _SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    old = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield True
    finally:
        for number, before in old.items():
            signal.signal(number, before)


@contextlib.contextmanager
def stop_by_exception() -> Iterator[None]:
    """Within the block a signal raises `Stopped`."""

    def handler(number: int, _frame: object) -> None:
        raise Stopped(number)

    with _handlers(handler):
        yield


@contextlib.contextmanager
def on_stop(handler: Callable[[int], None], at_once: Callable[[], None]) -> Iterator[None]:
    """Within the block a signal calls handler(number) between two Python instructions of the main thread. It also calls
    at_once() immediately from another thread, even while the main thread waits inside TensorFlow."""

    def watch() -> None:
        numbers = {int(n) for n in _SIGNALS}
        while True:
            received = ours.recv(64)
            if not received or 0 in received:  # 0: the block has ended
                return
            if numbers & set(received):
                at_once()

    with _handlers(lambda number, _frame: handler(number)) as possible:
        if not possible:
            yield
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        thread = threading.Thread(target=watch, name="signals", daemon=True)
        thread.start()
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            theirs.send(b"\0")
            thread.join()
            ours.close()
            theirs.close()
