"""The warp-specialised forwards that are seldom the default: the scores first, the products with the values in flight."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

from parallax_compile.lowering import candidates


def overlapped(wanted: bool = True) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``WARP_SPECIALIZED`` takes those. Inductor's cache does not know it: give a graph its own length."""
    table = candidates._SPECIALIZED_TABLE
    first = {key: tuple(sorted(rows, key=lambda row: not row[2])) for key, rows in table.items()}
    return mock.patch.object(candidates, "_SPECIALIZED_TABLE", first if wanted else table)
