"""In which form calls of ``attention`` are traced, while they are traced for MLIR."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Form", "current", "tracing"]


@dataclass(frozen=True)
class Form:
    """How a call becomes torch operations.

    Attributes:
        name: ``"dense"``, whole score matrices, as the reference has them; ``"blockwise"``, one pass over blocks of keys,
            unrolled; ``"opaque"``, one operator that the compiler downstream replaces; ``"declared"``, not computed at all:
            the call is put into ``handed_over`` as it was checked.
        block_size: keys of a block.
    """

    name: str = "dense"
    block_size: int = 128
    handed_over: list[Any] = field(default_factory=list, compare=False)


_current: ContextVar[Form | None] = ContextVar("parallax_compile_mlir_form", default=None)


def current() -> Form | None:
    """The form to trace calls in; None outside of :func:`tracing`."""
    return _current.get()


@contextlib.contextmanager
def tracing(form: Form) -> Iterator[None]:
    """Trace calls in ``form`` within the block."""
    token = _current.set(form)
    try:
        yield
    finally:
        _current.reset(token)
