"""A step of the scan: a few new positions of each sequence against the sums of all before, which take them in.

For decoding at infinite bandwidth with a learned probe (:mod:`parallax_compile.recurrent`). Compiled for a GPU it is one
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import empty_in_layout_of, statistics_dtype


def read(matrix: Tensor, first: Tensor, second: Tensor, count: Tensor, probe: Tensor, intercept: bool) -> Tensor:
    """``out [B, Hq, Dv]`` of one row with the probe ``[B, Hq, D]``, whose keys are those of the sums (FAMILY)."""
    group = probe.size(1) // matrix.size(1)
    inverse = 1.0 / count[:, None, None]
    moved = (probe[..., None] * of_query_heads(matrix, group)).sum(-2) * inverse
    if not intercept:
        return moved
    level = (probe * of_query_heads(first, group)).sum(-1, keepdim=True) * inverse
    return of_query_heads(second, group) * inverse * (1 + level) - moved


def of_query_heads(part: Tensor, group: int) -> Tensor:
    """A part of the sums ``[B, Hkv, ...]`` for the query heads that share a key head, ``[B, Hq, ...]``."""
    return part.repeat_interleave(group, 1) if group > 1 else part


def _step(
    matrix: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor,
    intercept: bool,
    cache_salt: str,
) -> Tensor:
    """:data:`scan_step` in plain torch."""
    wide = statistics_dtype(key)
    sums, rows = (matrix.clone(), first.clone(), second.clone()), []
    for i in range(key.size(2)):
        k, v = key[:, :, i].to(wide), value[:, :, i].to(wide)
        sums = (sums[0] + k[..., :, None] * v[..., None, :], sums[1] + k, sums[2] + v)
        rows.append(read(*sums, count + (i + 1), probe[:, :, i].to(wide), intercept))
    for held, grown in zip((matrix, first, second), sums, strict=True):
        held.copy_(grown)
    out = empty_in_layout_of(probe, value.size(3))
    return out.copy_(torch.stack(rows, 2))


scan_step = torch.library.custom_op("parallax::scan_step", _step, mutates_args=("matrix", "first", "second"))
"""Take new positions into the sums, in place, and read each with its probe.

Args:
    matrix: ``sum_j k_j v_j^T [B, Hkv, D, Dv]``; first: ``sum_j k_j [B, Hkv, D]``; second: ``sum_j v_j [B, Hkv, Dv]``;
    count: keys so far, ``[B]``, which is not changed.
    key, value, probe: ``[B, H, L, width]``.
    intercept: affine estimate, or linear.
    cache_salt: not used here; see :data:`~.cache_key.CACHE_SALT`.

Returns:
    ``out [B, Hq, L, Dv]`` in key's dtype.
"""


@scan_step.register_fake
def _(
    matrix: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor,
    *rest: object,
) -> Tensor:
    from . import register_lowerings

    register_lowerings()  # whoever traces a call comes here
    return empty_in_layout_of(probe, value.size(3))
