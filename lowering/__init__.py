"""From the declared call to kernels: the operator, the plan, and the Inductor lowerings. Not a public interface."""

from __future__ import annotations

import functools


@functools.cache
def register_lowerings() -> None:
    """Give Inductor our lowerings. Deferred to the first trace, because importing Inductor takes seconds."""
    from . import inductor  # noqa: F401  (registers on import)
