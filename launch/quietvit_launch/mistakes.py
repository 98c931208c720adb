"""Which errors are the user's to mend: those become one message on stderr. The others keep their traceback.

Only the standard library is imported here.
"""

from __future__ import annotations

import dis
import errno
import os
import re
import sys

_RAISE = dis.opmap["RAISE_VARARGS"]
_PACKAGES = ("quietvit", "quietvit_eval", "quietvit_launch")


def message_for_user(error: BaseException) -> str | None:
    """What to tell the user, or None for a fault of ours.

    The user's are: what quietvit raised by a `raise` of its own, here or in a worker process of torch's DataLoader;
    what the file system answered (missing, read-only, full); too little memory.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        reason = file_system_reason(error)
        return f"{error.filename}: {reason}" if error.filename else reason
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"out of memory: {(text or 'the system has no more').splitlines()[0]}\n"
            "Training: lower train.batch_size, or raise train.accumulate (same batch, less memory). "
            "Evaluation and embedding: a smaller --batch-size or --size; of eval also a smaller --memory"
        )
    if text.startswith("DataLoader worker (pid"):
        return (
            f"{text.splitlines()[0]}\nWith data.workers=0 (of train) or --workers 0 (of eval) the images are read "
            "without workers (slower). "
            "In a container the cause is most often too little shared memory (docker run --shm-size=8g)"
        )
    return text if _raised_by_us(error) else _from_worker(text)


def file_system_reason(error: OSError) -> str:
    """Why a file could not be read or written, and for a full disk what to do."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({reason}): free some space, then repeat the command"
    return reason


def _raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` in quietvit's own code is where the error began.

    An error out of a compiled function called there (a wrong shape, a wrong type) has the same last frame, but its
    instruction is a call: that is a fault of ours.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in _PACKAGES and trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE


_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line \d+, in .+\n    (?P<statement>.*)', re.MULTILINE)
_ERROR = re.compile(r"^[A-Za-z_][\w.]*: ", re.MULTILINE)


def _from_worker(text: str) -> str | None:
    """The message of an error that quietvit raised in a DataLoader worker; None for anything else.

    torch hands such an error on with its whole traceback as its message: "Caught ValueError in DataLoader worker
    process 0.", then what Python would have printed.
    """
    if not text.startswith("Caught ") or "Original Traceback (most recent call last):" not in text:
        return None
    frames = list(_FRAME.finditer(text))
    if not frames:
        return None
    last = frames[-1]
    roots = [os.path.dirname(str(sys.modules[p].__file__)) + os.sep for p in _PACKAGES if p in sys.modules]
    message = _ERROR.search(text, last.end())
    raised = last["statement"].startswith("raise ") and last["file"].startswith(tuple(roots))
    if not raised or message is None:
        return None
    return text[message.end() :].strip()
