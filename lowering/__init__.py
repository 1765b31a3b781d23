"""From the declared call to kernels: the operator, the plan, and the Inductor lowerings. Not a public interface."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def register_lowerings() -> None:
    """Give Inductor our lowerings. Deferred to the first trace, because importing Inductor takes seconds."""
    # Inductor knows torch's own operators with subgraphs by name and warns of every other, once for each call.
    warnings.filterwarnings("ignore", message="Please add support for subgraph args to function parallax_attention")
    from . import inductor, inductor_decode, inductor_scan  # noqa: F401  (they register on import)
    from .torch_compat_backward import follow_partitions

    follow_partitions()
