"""`python -m quietvit_launch.early -u -m MODULE ARGS`: run a module with the signals of a scheduler held back.

Slurm may warn of the end of the time, or of a preemption, while Python still imports: there the signal would kill the
process. Held back it waits until `quietvit_launch.worker.run_rank` can take it. Only the standard library is used.
"""

from __future__ import annotations

import runpy
import signal
import sys

HELD = (signal.SIGUSR2, signal.SIGTERM)


def main() -> None:
    """Hold the signals back, then be `python` for the rest of the command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    words = [word for word in sys.argv[1:] if word != "-u"]
    if len(words) < 2 or words[0] != "-m":
        raise SystemExit("usage: python -m quietvit_launch.early -m MODULE ARGS")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log is read while it is written
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
