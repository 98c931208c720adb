"""On PYTHONPATH of a job: every training step first waits, so that a nano run lasts as long as a test needs.

The seconds stand in QUIETVIT_TEST_STEP_S. Waiting costs no CPU and changes no number.
"""

from __future__ import annotations

import os
import time

from quietvit.schedules import Schedules, StepValues

at = Schedules.at


def slow_at(self: Schedules, step: int) -> StepValues:
    time.sleep(float(os.environ["QUIETVIT_TEST_STEP_S"]))
    return at(self, step)


Schedules.at = slow_at  # type: ignore[method-assign]
