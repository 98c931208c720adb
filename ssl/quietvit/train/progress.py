"""The line one looks at while it trains."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_EVERY_S = 10.0  # in a log file a line this often says enough


def duration(seconds: float) -> str:
    """Seconds as people write them: 42 s, 3:05 min, 2:10 h, 3.5 d."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    if seconds < 2 * 86400:
        return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"
    return f"{seconds / 86400:.1f} d"


class Progress:
    """A live line on a terminal; on anything else a plain line at the first step and then every ten seconds."""

    def __init__(self, console: Console, *, steps: int, start: int, images_per_step: int) -> None:
        self.console = console
        self.steps = steps
        self.start = start
        self.images_per_step = images_per_step
        self._began = time.monotonic()
        self._printed = float("-inf")
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None

    def update(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        wait_share: float,
        images_per_s: float,
        notes: Sequence[str] = (),
    ) -> None:
        """Show the state after `step` steps are done, with `notes` after the values."""
        left = (self.steps - step) * self.images_per_step / max(images_per_s, 1e-9)
        parts = [*(f"{k} {v:.3f}" for k, v in values.items()), *notes]
        line = (
            f"step {step}/{self.steps}  {'  '.join(parts)}  {images_per_s:.1f} images/s  "
            f"data wait {wait_share:.0%}  ETA {duration(left)}"
        )
        now = time.monotonic()
        if self._live is not None:
            self._live.update(Text(line, overflow="fold"))
        elif now - self._printed >= PLAIN_EVERY_S or step == self.steps:
            self._printed = now
            self.console.print(line, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Print a line that stays, above the live one."""
        self.console.print(message, highlight=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
