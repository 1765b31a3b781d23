"""What every result is recorded with."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import parallax_compile as plx


def commit() -> str:
    """What PARALLAX_COMMIT says, for a copy of the tree whose git is not the tree's; else this tree's commit."""
    if told := os.environ.get("PARALLAX_COMMIT"):
        return told
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here, check=False)
    return found.stdout.strip() or "unknown"


def environment(device: str) -> dict[str, Any]:
    """Device, versions, commit, date, command."""
    import triton

    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": sys.version.split()[0],
        "parallax_compile": plx.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
