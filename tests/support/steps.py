"""What a step of a Hopper kernel spills, read off its SASS by ``benchmarks/schedule.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from schedule import innermost


def spills_in_a_step(compiled: Any) -> tuple[int, int]:
    """How many values the innermost loop with products writes to local memory, and how many it reads there.

    What it only reads was put there before it, as an address is; a kernel short of registers does both.
    """
    from triton.tools.disasm import get_sass

    step = [each.operation for each in innermost(get_sass(compiled.asm["cubin"]))]
    return tuple(sum(operation.startswith(name) for operation in step) for name in ("STL", "LDL"))  # type: ignore[return-value]
