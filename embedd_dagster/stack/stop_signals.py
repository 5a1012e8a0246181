"""Signals that ask a program to stop, heard by a thread instead of a signal handler.

Python runs a handler in the main thread, between any two of its instructions. A handler that sets a `threading.Event` while
the main thread is inside that event's own `wait()` waits for a lock that its own thread holds: the program hangs for good.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self


def _nothing() -> None:
    return None


class StopSignals:
    """While it is open, the first of SIGINT, SIGTERM and SIGHUP sets `asked`, and each later one `hurry`.

    SIGHUP is left alone where it is ignored, as under nohup. Open it in the main thread.
    """

    def __init__(
        self, asked: threading.Event, hurry: threading.Event, *, on_first: Callable[[], None] = _nothing
    ) -> None:
        """`on_first` is called from another thread, right after the first signal."""
        self._asked = asked
        self._hurry = hurry
        self._on_first = on_first
        self._handled = [signal.SIGINT, signal.SIGTERM]
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_descriptor = -1

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            self._handled.append(signal.SIGHUP)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # Python wants it so: a handler must not block
        self._thread = threading.Thread(target=self._listen, name="embedd-signals", daemon=True)
        self._thread.start()
        self._previous_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in self._handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while received := self._reader.recv(64):
            for number in received:  # a byte a signal, of every signal that has a handler in Python
                if number in self._handled:
                    self._hear()

    def _hear(self) -> None:
        if self._asked.is_set():
            self._hurry.set()
            return
        self._asked.set()
        self._on_first()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Python writes a signal's number to the wake-up socket only where a handler is set."""
