"""A real Slurm of two virtual nodes on this machine, for the whole session."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slurm-up.sh")
DAEMONS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Sets SLURM_CONF and what jobs need; everything is stopped at the end. Skips where nothing may be installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in DAEMONS if shutil.which(name, path=path) is None]
    if missing and (os.environ.get("SLURM_UP_INSTALL") == "0" or os.geteuid() != 0 or not shutil.which("apt-get")):
        pytest.skip(f"no Slurm: {', '.join(missing)} not installed, and only root may install on Debian or Ubuntu")
    folder = tempfile.mkdtemp(prefix="quietvit-slurm-")  # short: Unix sockets take paths of 80 characters
    settings = {"SLURM_UP_CPUS": "2", "SLURM_UP_GPUS": "0"}
    up = subprocess.run(
        [SCRIPT, "up", folder], env=os.environ | settings, stdout=subprocess.PIPE, text=True, timeout=600
    )
    assert up.returncode == 0, f"logs: {folder}/log"
    lines = [line.removeprefix("export ").partition("=") for line in up.stdout.splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        for key, _, value in lines:
            patch.setenv(key, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("QUIETVIT_CACHE", f"{folder}/cache")
        yield
        subprocess.run([SCRIPT, "down", folder], check=True, timeout=120)
    shutil.rmtree(folder)
