"""torch-mlir and IREE: found when they are asked for, named when they are missing, and run within limits."""

from __future__ import annotations

import functools
import importlib.util
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UnsupportedError

__all__ = ["COMPILER", "IMPORTER", "RUNTIME", "Limits", "ToolError", "missing", "require", "run_tool"]

IMPORTER, COMPILER, RUNTIME = "torch-mlir", "iree-base-compiler", "iree-base-runtime"
_MODULES = {IMPORTER: "torch_mlir", COMPILER: "iree.compiler", RUNTIME: "iree.runtime"}
_EXTRA = "pip install 'parallax-compile[mlir]' (wheels exist for CPython 3.10 and newer on x86-64 Linux)"

# The limit is set in the child, before it becomes the tool: a function run between fork and exec may deadlock.
_LIMITED = """
import os, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, ValueError, OSError):
    pass
os.execv(sys.argv[2], sys.argv[2:])
"""


class ToolError(RuntimeError):
    """A tool failed, crashed or ran into a limit; the message is its own, shortened."""


@dataclass(frozen=True)
class Limits:
    """What one run of a tool may take.

    Attributes:
        memory: bytes of address space, where the system enforces them (macOS does not).
        seconds: wall-clock time.
    """

    memory: int = 8 << 30
    seconds: float = 300.0


def missing(*packages: str) -> list[str]:
    """Which of the named distributions cannot be imported."""
    return [name for name in packages if not _has(_MODULES[name])]


def require(*packages: str) -> None:
    """Raise UnsupportedError naming what is not installed, and how to install it."""
    absent = missing(*packages)
    if absent:
        raise UnsupportedError(f"the portable lowering needs {', '.join(absent)}, not installed here: {_EXTRA}.")


@functools.cache
def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def run_tool(name: str, arguments: Sequence[str | Path], limits: Limits) -> None:
    """Run ``torch-mlir-opt``, ``iree-opt`` or ``iree-compile`` in a process of its own.

    Raises:
        ToolError: it reported an error, crashed, or ran into a limit.
    """
    tool = [sys.executable, "-I", "-S", "-c", _LIMITED, str(limits.memory), _tool(name)]
    try:
        done = subprocess.run(
            [*tool, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{name} was stopped after {limits.seconds:g} s") from None
    if done.returncode == 0:
        return
    said = _first_error(done.stderr)
    if done.returncode < 0:
        death = signal.Signals(-done.returncode).name
        raise ToolError(f"{name} crashed ({death}) within {limits.memory >> 20} MiB: {said}")
    raise ToolError(f"{name} failed: {said}")


def _tool(name: str) -> str:
    """The path of a tool inside of its wheel."""
    if name.startswith("torch-mlir"):
        from torch_mlir import ir

        return str(Path(ir.__file__).with_name("_mlir_libs") / name)
    from iree.compiler.tools import binaries

    return str(binaries.find_tool(name))


def _first_error(stderr: str) -> str:
    """The lines that matter: the first error and what follows it, without pages of IR, nor a crash's frames."""
    lines = [line for line in stderr.splitlines() if line.strip() and not re.match(r"\s*#\d+ |\s*\d+\.\s", line)]
    first = next((number for number, line in enumerate(lines) if "error" in line.lower()), 0)
    return "\n".join(line[:300] for line in lines[first : first + 3]) or "it said nothing"
