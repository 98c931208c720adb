"""Makes tests/reference.py importable from every test folder, and keeps tests out of the user's cache folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
