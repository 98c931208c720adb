"""SIGTERM as Ctrl-C: what is underway saves its state on the way out. Only the standard library is imported here."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def exit_code(stop: KeyboardInterrupt) -> int:
    """128 + the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (stop.signum if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """In this context SIGTERM raises Stopped in the main thread of this process; processes forked from it just end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            os._exit(128 + signum)
        raise Stopped(signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
