"""metrics.jsonl holds each step once, whatever was killed when."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from quietvit.train.metrics import MetricsLog, read_metrics
from quietvit.train.progress import Progress, duration
from quietvit.train.signals import StopRequest


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        log.write(1, {"loss/dino": 1.5, "broken": float("nan")})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss/dino": 1.5, "broken": None}


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, resume_step=0, tensorboard=False) as log:
        for step in range(1, 8):
            log.write(step, {"x": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "x":')  # killed while writing
    with MetricsLog(tmp_path, resume_step=5, tensorboard=False) as log:
        log.write(6, {"x": 60})
    assert [(r["step"], r["x"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        *((s, s) for s in range(1, 6)),
        (6, 60),
    ]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, resume_step=0) as log:
        log.write(3, {"loss/dino": 1.5, "note": "text stays in the JSON"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/dino")] == [(3, 1.5)]


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (185, "3:05 min"), (7800, "2:10 h"), (3.5 * 86400, "3.5 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_first_step_is_shown_at_once_in_a_log_file() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=200), steps=100, start=0, images_per_step=32) as progress:
        progress.update(1, {"dino": 5.5}, wait_share=0.25, images_per_s=64.0)
        progress.update(2, {"dino": 5.4}, wait_share=0.25, images_per_s=64.0)
    assert out.getvalue() == "step 1/100  dino 5.500  64.0 images/s  data wait 25%  ETA 50 s\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_ask_for_a_stop_and_are_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.name == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
