"""A run over several processes that cannot go on ends soon, and says which rank is missing and where it was last seen.

Every rank notes the step and the place in it. A thread of its own writes the newest note into the process group's
store once a second, with a beat by which the others know that the process lives, and reads those of the others:

    no rank has come further for `timeout` seconds   the ranks that are behind are named, every process ends
    a rank said why it ended, or its beats stopped   the others end too, also where their collective would wait on
    a collective broke off                           the error names the rank that was lost instead of the connection
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch

from quietvit import dist

PLACES = ("start", "health", "data", "teacher", "student", "step", "checkpoint", "end")  # in the order of a step
BEAT_S = 1.0  # between two notes in the store (ours: 256 ranks are 256 small writes a second)
LOOK_S = 5.0  # between two readings of all notes (ours)
SILENCE_S = 40.0  # a process without a beat for so long is gone (ours: the others then end within a minute)
GRACE_S = 10.0  # from a rank's last word until those end that still wait for it (ours)
EXIT_LOST = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, resumes
# How gloo, NCCL and the store say that a peer is not there any more.
BROKEN = re.compile(r"connection (closed|reset|refused|was)|broken pipe|gloo|nccl|timed ?out", re.IGNORECASE)

_numbers = itertools.count()


class LostRankError(RuntimeError):
    """Other ranks are gone; the message names them, where they were, and what they said."""


@dataclass
class Note:
    """What a rank tells the others. `said` is its last word: None while it runs, empty after a good end."""

    beat: int = 0
    step: int = 0
    place: str = PLACES[0]
    said: str | None = None

    @property
    def where(self) -> str:
        return f"step {self.step} ({self.place})"


class Watch:
    """Context round a run. With one process it notes places and does nothing else.

    Args:
        timeout: seconds without a new place on this rank, that is, without a finished step, before the run ends.
        end: what ends the process when its main thread is stuck; it gets the sentence.
    """

    def __init__(self, timeout: float, *, end: Callable[[str], None] | None = None) -> None:
        self._timeout = timeout
        self._end = _leave if end is None else end
        self._own = Note()
        self._moved = time.monotonic()
        self._seen: dict[int, tuple[Note | None, float]] = {}  # note of a rank, and when its beat was new
        self._done = threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None

    def at(self, place: str, step: int | None = None) -> None:
        """Note that this rank has come to a place of a step (counted from 1). Costs nothing: memory only."""
        if step is not None:
            self._own.step = step
        self._own.place = place
        self._moved = time.monotonic()

    def __enter__(self) -> Watch:
        if dist.is_distributed():
            # The runs of one group get keys of their own, and the thread a connection of its own.
            c10d: Any = torch.distributed.distributed_c10d
            self._store = c10d.PrefixStore(f"quietvit/watch/{next(_numbers)}", c10d._get_default_store().clone())
            now = time.monotonic()
            self._seen = {rank: (None, now) for rank in range(dist.world_size()) if rank != dist.rank()}
            self._thread = threading.Thread(target=self._watch, name="quietvit-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread is None:
            return
        try:
            self._own.said = "" if error is None else f"{type(error).__name__}: {_first_line(error)}"
            lost = self._lost() if error is not None and _is_broken_connection(error) else None
            if lost is not None:
                self._own.said = lost
                raise LostRankError(lost) from None
        finally:
            self._done.set()
            self._thread.join(LOOK_S)
            self._beat()

    def _watch(self) -> None:
        """What the thread does."""
        looked, told = time.monotonic(), None
        self._beat()
        while not self._done.wait(BEAT_S):
            now = time.monotonic()
            if not self._beat():
                return self._end(
                    f"rank {dist.rank()}: stopped at {self._own.where}: the store of the process group is gone, and "
                    f"with it rank 0 or the launcher{_AGAIN}"
                )
            if now - self._moved > self._timeout:
                self._look()
                return self._end(self._stuck())
            elif now - looked >= LOOK_S:
                looked = now
                self._look()
                gone = self._gone(SILENCE_S)
                told = (told or now) if gone else None
                if told is not None and (self._silent(SILENCE_S) or now - told >= GRACE_S):
                    return self._end(self._sentence(gone))

    def _beat(self) -> bool:
        """Write the own note. False when the store is gone."""
        self._own.beat += 1
        try:
            self._store.set(str(dist.rank()), json.dumps(asdict(self._own)))
        except RuntimeError:
            return False
        return True

    def _look(self) -> None:
        """Read the notes of the others."""
        now = time.monotonic()
        try:
            for rank, (old, _) in self._seen.items():
                if not self._store.check([str(rank)]):
                    continue
                note = Note(**json.loads(self._store.get(str(rank))))
                if old is None or note.beat != old.beat:
                    self._seen[rank] = (note, now)
        except RuntimeError:
            return  # the store is gone: the next beat says so

    def _silent(self, seconds: float) -> list[int]:
        """Ranks that began and are not heard of any more, without a last word."""
        now = time.monotonic()
        return [r for r, (n, new) in self._seen.items() if n is not None and n.said is None and now - new > seconds]

    def _gone(self, seconds: float) -> list[int]:
        """Those, and the ranks that said why they ended."""
        return sorted([*self._silent(seconds), *(r for r, (n, _) in self._seen.items() if n is not None and n.said)])

    def _lost(self) -> str | None:
        """A collective broke off: who is gone? Asks for some beats, in which those that live are heard of.

        None if all are there.
        """
        began = time.monotonic()
        gone: list[int] = []
        while not gone and time.monotonic() - began < 6 * BEAT_S:
            time.sleep(BEAT_S / 4)
            self._look()
            gone = self._gone(SILENCE_S)
        gone = gone or self._gone(5 * BEAT_S)
        return self._sentence(gone) if gone else None

    def _sentence(self, gone: list[int]) -> str:
        told = []
        for rank in gone:
            note = self._seen[rank][0]
            assert note is not None
            told.append(f"rank {rank} at {note.where}" + (f", which said: {note.said}" if note.said else ""))
        return f"rank {dist.rank()}: stopped at {self._own.where}: lost {'; '.join(told)}{_AGAIN}"

    def _stuck(self) -> str:
        """The sentence of a run that does not come further: who is behind, and where the others wait."""
        notes = {dist.rank(): self._own} | {r: n for r, (n, _) in self._seen.items() if n is not None}
        absent = [r for r, (n, _) in self._seen.items() if n is None]
        silent = self._silent(3 * BEAT_S)  # all have just been read: who lives was heard of
        order = {r: (n.step, PLACES.index(n.place)) for r, n in notes.items()}
        least = min(order.values())
        behind = sorted(absent + silent) or [r for r in sorted(notes) if order[r] == least]
        how = dict.fromkeys(absent, "has not begun") | {r: f"was last heard of at {notes[r].where}" for r in silent}
        named = ", ".join(f"rank {r} {how[r] if r in how else f'is at {notes[r].where}'}" for r in behind)
        waiting = sorted({notes[r].where for r in notes if r not in behind})
        wait = f"; the others wait for it at {', '.join(waiting)}" if waiting else "; no rank is ahead of the others"
        return f"rank {dist.rank()}: no step was finished for {self._timeout:g} s: {named}{wait}{_AGAIN}"


_AGAIN = ". The same command resumes from the newest checkpoint"


def _leave(sentence: str) -> None:
    """End the process at once: its main thread waits in a collective that nothing interrupts."""
    print(sentence, file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective broke off, here or in what the error arose from."""
    chain: BaseException | None = error
    while chain is not None:
        of_torch = isinstance(chain, torch.distributed.DistError)
        if of_torch or (type(chain) is RuntimeError and BROKEN.search(str(chain))):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
