"""Jobs for the test of ``benchmarks/together.py``: a module of its own, which their processes import without torch."""

from __future__ import annotations

import os
import time
from typing import Any


def run(job: str, alone: Any) -> Any:
    """``times`` gives when its timed part began and ended; the others fail in their ways."""
    if job == "raises":
        raise ValueError("no")
    if job == "dies":
        os._exit(3)
    with alone():
        begun = time.monotonic()
        time.sleep(0.2)
        return begun, time.monotonic()
