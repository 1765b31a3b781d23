"""The choices of a scan: whether a call's sums run along the sequence, and how the sequence is cut."""

from __future__ import annotations

from typing import Any

CHUNK = 64
"""Rows that a kernel of a scan takes at once, at most; segments are whole numbers of them."""

# A program of a scan adds up the segments before its own, so that they are few; and each is several chunks of rows.
_MOST_SEGMENTS = 16
_LEAST_SEGMENT = 256
_SCAN_PROGRAMS = 1024


def chunked_scan(uniform: bool, covariance_mod: bool) -> bool:
    """Whether a call's sums may run along the sequence, in linear time, where its mask is a causal prefix or none.

    At infinite bandwidth they may, unless a covariance_mod stands between the probe's products and the sum: it has no state.
    """
    return uniform and not covariance_mod


def scan_segments(batch: Any, heads: Any, length: Any) -> int:
    """Into how many segments a scan cuts the sequence, so that the device has enough to do: a constant of its kernels."""
    if not all(isinstance(size, int) for size in (batch, heads, length)):
        return _MOST_SEGMENTS // 2
    most = min(_MOST_SEGMENTS, -(-length // _LEAST_SEGMENT))
    return max(1, min(most, -(-_SCAN_PROGRAMS // max(1, 2 * batch * heads))))
