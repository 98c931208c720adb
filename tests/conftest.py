"""Makes tests/reference.py importable from every test folder, keeps tests out of the user's cache folder, and has
Ctrl-C work in them also where a shell started them in the background: it ignores Ctrl-C and bequeaths that."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features and indices of an earlier session must not decide a test."""
    before = os.environ.get("QUIETVIT_CACHE")
    os.environ["QUIETVIT_CACHE"] = str(tmp_path_factory.mktemp("quietvit-cache"))
    yield
    if before is None:
        del os.environ["QUIETVIT_CACHE"]
    else:
        os.environ["QUIETVIT_CACHE"] = before
