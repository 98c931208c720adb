"""Where and with what a run was made: kept in the run folder and in result cards."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch


def hardware(device: torch.device) -> str:
    """One line: the GPU's name, or the CPU's model and number of cores in use."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    return f"{_cpu_model()}, {torch.get_num_threads()} threads, {psutil.virtual_memory().total / 1024**3:.0f} GiB"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="ignore").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The commit of the checkout that this code runs from, "+changes" if it was edited; None outside a checkout."""
    here = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=5, check=True)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0].stdout.strip()[:12] + ("+changes" if run[1].stdout.strip() else "")


def environment(device: torch.device) -> dict[str, object]:
    """Versions, hardware and command line, as JSON-able values."""
    packages = {}
    for name in ("quietvit", "torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "xformers"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git": git_revision(),
        "device": str(device),
        "hardware": hardware(device),
        "command": sys.argv,
    }
