"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 ask for a stop; the loop saves after the step it is in and leaves."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context in which a signal sets `signum`; the first one counts. A second Ctrl-C stops at once, without saving.

    Inside another StopRequest it takes over what that one has been asked: launchers open one before torch is imported,
    so that a signal that comes before the loop is not lost.
    """

    SIGNALS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, n))

    def __init__(self) -> None:
        self.signum: int | None = None
        self._old: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.signum).name if self.signum is not None else ""

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
            outer = getattr(self._old[number], "__self__", None)
            if isinstance(outer, StopRequest):
                self.signum = self.signum or outer.signum
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
