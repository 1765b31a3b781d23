"""Counters of arrivals: int32 zeros on a device, which each kernel that counts in them leaves at zero again.

Kernels that may run at the same time must not count in the same ones. Kernels of one stream run one after the other and share
theirs; whatever is captured into a CUDA graph keeps its own, because a graph is replayed on any stream. All are parts of one
buffer of each device, so that a call allocates nothing; where that is used up, they are made for the call, and filled by it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

_RESERVED = 1 << 21  # counters of a device: 8 MiB
_LEAST = 1 << 10  # counters of a stream
_LINE = 32  # counters in a line of the cache, which two regions do not share


@dataclass
class _Reserve:
    """The counters of one device, and how many of them have an owner."""

    counters: Tensor
    used: int = 0
    of_streams: dict[int, Tensor] = field(default_factory=dict)


_in_code = ContextVar("_in_code", default=True)
_reserves: dict[torch.device, _Reserve] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def no_counters() -> Iterator[None]:
    """Code that is generated meanwhile has no counters: it will run without us."""
    token = _in_code.set(False)
    try:
        yield
    finally:
        _in_code.reset(token)


def has_counters() -> bool:
    """Whether the code that is being generated may have counters."""
    return _in_code.get()


def prepare(device: torch.device) -> None:
    """Allocate the counters of ``device``, where generated code is loaded: a call may find itself in the pool of a graph.

    A process that only generates code has no device.
    """
    if device.type != "cuda" or torch.cuda.is_initialized():
        _reserve(device)


def _reserve(device: torch.device) -> _Reserve:
    with _lock:
        if device not in _reserves:
            _reserves[device] = _Reserve(torch.zeros(_RESERVED, dtype=torch.int32, device=device))
    return _reserves[device]


def counters(device: torch.device, stream: int, count: int) -> Tensor:
    """At least ``count`` zeros for a kernel that is launched now on ``stream``, the handle of the device's current stream."""
    found = _reserves.get(device) or _reserve(device)
    if _capturing(device):
        own = _taken(found, count)
    else:
        own = found.of_streams.get(stream)
        if own is None or own.numel() < count:
            own = _taken(found, max(count, _LEAST))
            if own is not None:
                found.of_streams[stream] = own
    return torch.zeros(count, dtype=torch.int32, device=device) if own is None else own


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _taken(found: _Reserve, count: int) -> Tensor | None:
    """Counters that nobody has yet; None where there are not enough."""
    size = -(-count // _LINE) * _LINE
    with _lock:
        start = found.used
        if start + size > found.counters.numel():
            return None
        found.used += size
    return found.counters[start : start + size]
