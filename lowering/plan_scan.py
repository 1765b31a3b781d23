"""The choices of a scan: whether a call's sums run along the sequence, and how the sequence is cut."""

from __future__ import annotations

from typing import Any

CHUNK = 64
"""Rows that a kernel of a scan takes at once, at most; segments are whole numbers of them."""

# A program of a scan adds up the segments before its own, so that they are few, each several chunks of rows, and no more
# programs than an H100 or H200 holds at once: two a multiprocessor.
_MOST_SEGMENTS = 16
_LEAST_SEGMENT = 256
_SCAN_PROGRAMS = 264
_PROGRAM_COLUMNS = 64


def chunked_scan(uniform: bool, covariance_mod: bool) -> bool:
    """Whether a call's sums may run along the sequence, in linear time, where its mask is a causal prefix or none.

    At infinite bandwidth they may, unless a covariance_mod stands between the probe's products and the sum: it has no state.
    """
    return uniform and not covariance_mod


def scan_segments(batch: Any, heads: Any, length: Any, width: Any) -> int:
    """Into how many segments a scan cuts the sequence, so that the device has enough to do: a constant of its kernels.

    Args:
        batch, heads, length: of a product's rows, perhaps symbols.
        width: of its values, of whose columns each program takes some.
    """
    if not all(isinstance(size, int) for size in (batch, heads, length, width)):
        return _MOST_SEGMENTS // 2
    most = min(_MOST_SEGMENTS, -(-length // _LEAST_SEGMENT))
    programs = max(1, batch * heads) * -(-width // _PROGRAM_COLUMNS)
    return max(1, min(most, _SCAN_PROGRAMS // programs))
