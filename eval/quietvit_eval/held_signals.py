"""Ctrl-C and SIGTERM wait for the end of a step, so that a state is saved between two steps and not within one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_signals() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM when the block has ended; the second one of a kind at once. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        handler = handlers[signal.Signals(signum)]
        if signum in came and callable(handler):
            handler(signum, frame)
        came.append(signum)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for signum in came:
        signal.raise_signal(signum)
