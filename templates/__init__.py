"""The kernel texts, one ``*.py.jinja`` for each stage, and their loader. Knows nothing but the files beside it."""

from __future__ import annotations

import functools
from pathlib import Path

_HERE = Path(__file__).parent
_SHARED = {
    "core_solve": ("tiles", "solve_shared", "core_shared", "core_solve_shared"),
    "core": ("tiles", "solve_shared", "core_shared"),
    "scan": ("tiles", "solve_shared", "scan_shared"),
    "decode": ("tiles", "solve_shared", "core_shared", "decode_shared"),
    "cache": ("decode_shared",),
}


@functools.cache
def load(name: str) -> str:
    """The text of stage ``name``: the macros that its family of stages shares, followed by the stage's own template.

    Raises:
        FileNotFoundError: there is no such template.
    """
    shared = next(parts for family, parts in _SHARED.items() if name.startswith(family))
    specialized = ("specialized_shared",) if name.endswith("_specialized") else ()
    return "".join(map(_read, (*shared, *specialized, name)))


def texts() -> list[bytes]:
    """Every template, in a fixed order."""
    return [path.read_bytes() for path in sorted(_HERE.glob("*.jinja"))]


def _read(name: str) -> str:
    return (_HERE / f"{name}.py.jinja").read_text(encoding="utf-8")
