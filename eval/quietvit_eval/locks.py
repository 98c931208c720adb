"""Locks between processes: flock on a file, let go by the system when its holder ends, however it ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system that has none (Lustre without -o flock)


class Lock:
    """An flock on an open file; gone with the process, however it ends."""

    def __init__(self, handle: int) -> None:
        self.handle: int | None = handle

    def share(self) -> None:
        """From exclusive to shared."""
        if self.handle is not None:
            _flock(self.handle, shared=True, wait=True)

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __del__(self) -> None:
        self.close()


def take_lock(path: Path, *, shared: bool, wait: bool) -> Lock | None:
    """A lock on the file, which is made with its folder; None if it is taken and `wait` is False."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder was removed in between
            continue
        lock = Lock(handle)
        if not _flock(handle, shared=shared, wait=wait):
            return None
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        lock.close()  # of an entry that was removed while this process waited


def _flock(handle: int, *, shared: bool, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
