"""Infinite bandwidth in linear time: when the mask is a causal prefix, or none, a row's sums over its keys are a running state.

Every allowed key weighs the same, so that the core and its gradients are four products of one form,

    y_i = sum_j w_ij V_j   with   w_ij = level_i + level_j -+ X_i.K_j ,   j over the keys of row i (or the rows of key i),

and a product needs of the past only ``matrix = sum_j K_j V_j^T``, ``first = sum_j K_j`` and ``second = sum_j level_j V_j``:

    ===========  ======  =========  =====  ===========  =====================================
    role         X       K          V      direction    level
    ===========  ======  =========  =====  ===========  =====================================
    out          probe   key        value  forward      row: 1 + t, t the row's mean of X.K
    probe        grad    value      key    forward      row: the mean of X.K (+ g_t / n)
    value        key     probe      grad   backward     key: 1 + t
    key          value   grad       probe  backward     key: what role "probe" found
    ===========  ======  =========  =====  ===========  =====================================

with ``grad = g / n`` (``n`` keys in the row) and the sign minus; without intercept the sign is plus and there are no levels but
``g_t / n``. The state of roles "probe" and "key" is the transpose of that of "out" and "value", so that a direction has one.

:func:`attention` is what the rest of the package calls. Under it are two operators that autograd sees, ``parallax::scan`` and
``parallax::scan_backward``, and two that the kernels implement, ``parallax::scan_totals`` (states of whole segments of the
sequence, in parallel) and ``parallax::scan_product`` (each segment chunk by chunk, the state in registers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache_key import CACHE_SALT
from .dense import in_layout_of
from .operator import empty_in_layout_of, statistics_dtype

CHUNK = 64
"""Rows that a kernel takes at once, at most; segments are whole numbers of them."""
_CPU_CHUNK = 128
MOST_SEGMENTS = 16
_PROGRAMS = 1024


class Prefix(NamedTuple):
    """The keys of each row: ``[start, row]``, or all of them.

    Attributes:
        whole: every row sees every key.
        starts: first key of each row, int32 ``[B or 1, L]``, never decreasing, each the start of its own run; None is 0.
    """

    whole: bool
    starts: Tensor | None = None


class State(NamedTuple):
    """Sums over the keys that a row has seen, in the dtype of the statistics. What a member does not use is None.

    Attributes:
        count: number of keys, ``[B]``.
        key_value: ``sum_j k_j v_j^T``, ``[B, Hkv, D, Dv]``.
        key_sum: ``sum_j k_j``, ``[B, Hkv, D]``.
        value_sum: ``sum_j v_j``, ``[B, Hkv, Dv]``.
        key_key: ``sum_j k_j k_j^T``, ``[B, Hkv, D, D]``; solved and gradient probes.
    """

    count: Tensor  # type: ignore[assignment]  # the tuple's method of the same name is not needed
    key_value: Tensor | None = None
    key_sum: Tensor | None = None
    value_sum: Tensor | None = None
    key_key: Tensor | None = None


@dataclass(frozen=True)
class Role:
    """Which of the four products a call computes; see the module's table."""

    backward: bool
    transposed: bool


ROLES = {
    "out": Role(backward=False, transposed=False),
    "probe": Role(backward=False, transposed=True),
    "value": Role(backward=True, transposed=False),
    "key": Role(backward=True, transposed=True),
}

Sums = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_SUMS: Sums = (None, None, None)


def segment_count(batch: Any, heads: Any, length: Any) -> int:
    """Into how many segments the sequence is cut, so that the device has enough to do. A constant of the kernels."""
    if not all(isinstance(size, int) for size in (batch, heads, length)):
        return MOST_SEGMENTS // 2
    most = min(MOST_SEGMENTS, -(-length // (4 * CHUNK)))
    return max(1, min(most, -(-_PROGRAMS // max(1, 2 * batch * heads))))


# --- the two operators of the kernels, in plain torch ---------------------------------------------------------------


class _Chunks:
    """Where the chunks of a sequence lie, and what of it each row and each chunk's state may see."""

    def __init__(self, length: Any, chunk: Any, count: Any, starts: Tensor | None, backward: bool, device: Any) -> None:
        self.length, self.backward = length, backward
        self.position = torch.arange(count * chunk, device=device).view(count, chunk)
        self.chunk = chunk
        self.first = self.position[:, 0]
        self.after = self.first + chunk
        self.starts = starts
        index = torch.arange(count, device=device)
        self.later = index[:, None] < index if backward else index[:, None] > index

    def start_of(self, position: Tensor) -> Tensor:
        """``[Bs, ...]``: start of the run of a position (of the last one, past the end)."""
        assert self.starts is not None
        return self.starts[:, position.clamp(0, self.length - 1)]

    def pairs(self) -> Tensor:
        """Pairs of one chunk, ``[Bs or 1, N, C, C]``: rows of the product's side by rows of the other."""
        row, column = self.position[:, :, None], self.position[:, None, :]
        if self.backward:
            keep = (column >= row)[None]
            return keep if self.starts is None else keep & (self.start_of(self.position)[:, :, None, :] <= row)
        keep = (column <= row)[None]
        return keep if self.starts is None else keep & (column >= self.start_of(self.position)[..., None])

    def sees_state(self) -> Tensor | None:
        """Rows that see the state at their chunk's edge, ``[Bs, N, C]``; None is all."""
        if self.starts is None:
            return None
        if self.backward:
            return self.start_of(self.after)[..., None] <= self.position
        return self.start_of(self.position) < self.first.clamp(min=1)[:, None]

    def kept(self) -> Tensor | None:
        """Rows of a chunk that its state keeps, ``[Bs, N, C]``: those of the run that leaves it; None is all."""
        if self.starts is None:
            return None
        if self.backward:
            return self.start_of(self.position) <= self.first[:, None]
        return self.position >= self.start_of(self._end(self.after))[..., None]

    def carried(self) -> tuple[Tensor, Tensor]:
        """Which chunks' sums the state at each chunk's edge holds, ``[., N, N]``; whether the initial one, ``[., N]``."""
        if self.starts is None:
            return self.later[None], torch.ones_like(self.later[None, :, 0])
        if self.backward:
            held = self.later & (self.start_of(self.first)[:, None, :] <= self.after[:, None])
            return held, self.start_of(self.after + self.length) <= self.after
        start = self.start_of(self._end(self.first))
        return self.later & (start[..., None] <= self.after - 1), start == 0

    def final(self) -> tuple[Tensor, Tensor]:
        """The same for the state at the far end, ``[Bs or 1, N]`` and ``[., 1]``."""
        one = torch.ones_like(self.first, dtype=torch.bool)[None]
        if self.starts is None:
            return one, one[:, :1]
        if self.backward:
            zero = torch.zeros_like(self.first)
            return self.start_of(self.first) <= 0, self.start_of(zero + self.length)[:, :1] <= 0
        start = self.start_of(self.first + self.length)
        return start <= self.after - 1, start[:, :1] == 0

    def _end(self, after: Tensor) -> Tensor:
        """Last position before ``after``."""
        return after.clamp(max=self.length) - 1


def _chunked(tensor: Tensor, heads: int, chunk: Any, count: Any, dtype: torch.dtype) -> Tensor:
    """``[B, H, L, ...]`` as ``[B, heads, H / heads, N, C, ...]`` of ``dtype``, filled up with zeros."""
    missing = count * chunk - tensor.size(2)
    filler = tensor.new_zeros((*tensor.shape[:2], missing, *tensor.shape[3:]))
    padded = torch.cat([tensor, filler], 2).to(dtype)
    return padded.unflatten(2, (count, chunk)).unflatten(1, (heads, tensor.size(1) // heads))


def _masked(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """``[B, H, G, N, C, ...]`` where ``keep [Bs, N, C]``, 0 elsewhere."""
    if keep is None:
        return tensor
    keep = keep[:, None, None]
    return torch.where(keep[..., None] if tensor.dim() == 6 else keep, tensor, 0.0)


def _chunk_sums(
    key: Tensor, value: Tensor, first: Any, second: Any, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``matrix, first, second`` of each chunk, summed over the heads of a group; the levels are tensors or 1."""
    value, key = _masked(value, keep), _masked(key, keep)
    matrix = (key.mT @ value).sum(2)

    def weigh(tensor: Tensor, level: Any) -> Tensor:
        return (tensor * (level if isinstance(level, int) else level[..., None])).sum((2, -2))

    return matrix, weigh(key, first), weigh(value, second)


def totals(
    key: Tensor,
    value: Tensor,
    key_level: Tensor | None,
    value_level: Tensor | None,
    starts: Tensor | None,
    heads: int,
    segments: int,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of each segment.

    Args:
        key: K ``[B, H, L, D]``; value: V ``[B, H, L, Dv]``; their ``H / heads`` heads of a group share a state.
        key_level, value_level: ``[B, H, L]``, weights of K in ``first`` and of V in ``second``; None is 1, backward 0.
        starts: see :class:`Prefix`.
        segments: how many; of ``ceil(ceil(L / CHUNK) / segments)`` chunks each, the last ones possibly empty.
        backward: whether the state runs from the end.

    Returns:
        ``matrix [B, heads, segments, D, Dv]``, ``first [B, heads, segments, D]``, ``second [B, heads, segments, Dv]`` in the
        dtype of the statistics.
    """
    dtype, length = statistics_dtype(key), key.size(2)
    rows = ((length + CHUNK - 1) // CHUNK + segments - 1) // segments * CHUNK
    chunks = _Chunks(length, rows, segments, starts, backward, key.device)
    parts = [_chunked(tensor, heads, rows, segments, dtype) for tensor in (key, value)]
    levels: list[Any] = [
        int(not backward) if level is None else _chunked(level, heads, rows, segments, dtype)
        for level in (key_level, value_level)
    ]
    return _chunk_sums(parts[0], parts[1], levels[0], levels[1], chunks.kept())


def product(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    inverse: Tensor,
    starts: Tensor | None,
    level: Tensor | None,
    matrix: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    initial_matrix: Tensor | None,
    initial_first: Tensor | None,
    initial_second: Tensor | None,
    role: str,
    intercept: bool,
    moment: bool,
    save_state: bool,
    whole: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One of the four products; see the module's table.

    Args:
        x: X ``[B, Hx, L, D]``; key: K ``[B, H, Lk, D]``; value: V ``[B, H, Lk, Dv]``. Forward ``Hx`` is a multiple of ``H``;
            backward ``H`` is one of ``Hx``, and the heads of a group are summed.
        inverse: ``1 / n`` of each row, ``[B or 1, L]``.
        starts: see :class:`Prefix`.
        level: the level of each row (roles "out", "probe": beside the mean; else of the rows of K, V), ``[B, H., L]`` or None.
        matrix, first, second: of :func:`totals`, or None for one segment; in the order of "out" and "value" for all roles.
        initial_*: the state before the sequence, ``[B, H, D, Dv]``, ``[B, H, D]``, ``[B, H, Dv]``, or None.
        role: a key of :data:`ROLES`; intercept: whether the levels and the minus are there.
        moment: whether the mean of X.K over each row's keys is wanted (roles "out" and "probe"; with intercept it is anyway).
        save_state: whether the state at the far end is wanted.
        whole: every row sees everything: the totals.
        dtype: of the result.

    Returns:
        ``y [B, Hx, L, Dv]``, the moment ``[B, Hx, L]`` (with ``level`` and the mean in role "probe"), and the final state;
        what was not asked for is empty.
    """
    backward, transposed = ROLES[role].backward, ROLES[role].transposed
    wide, length = statistics_dtype(key), x.size(2)
    heads = min(x.size(1), key.size(1))
    chunk = length if whole else _CPU_CHUNK
    count = 1 if whole else (length + chunk - 1) // chunk
    chunks = _Chunks(length, chunk, count, starts, backward, key.device)
    xs = _chunked(x, heads, chunk, count, wide)

    def flip(sums: Any) -> Any:
        return (sums[0] if sums[0] is None else sums[0].mT, sums[2], sums[1]) if transposed else tuple(sums)

    initial = flip((initial_matrix, initial_first, initial_second))
    if whole:
        assert matrix is not None
        states = [total.sum(2, keepdim=True) for total in flip((matrix, first, second))]
        states = [s if i is None else s + i[:, :, None] for s, i in zip(states, initial, strict=True)]
        final = [state[:, :, 0] for state in states]
    else:
        ks, vs = (_chunked(tensor, heads, chunk, count, wide) for tensor in (key, value))
        column = _chunked(level, heads, chunk, count, wide) if backward and level is not None else None
        sums = _chunk_sums(ks, vs, 1, int(not backward) if column is None else column, chunks.kept())
        held, holds_initial = chunks.carried()
        states, final = [], []
        last, last_initial = chunks.final()
        for part, before in zip(sums, initial, strict=True):
            flat = part.flatten(3)
            carried = (held.to(wide)[:, None] @ flat).view(part.shape)
            end = (last.to(wide)[:, None, None] @ flat)[:, :, 0].view(part[:, :, 0].shape)
            if before is not None:
                ones = (1,) * (before.dim() - 2)
                carried = carried + holds_initial.to(wide).view(-1, 1, count, *ones) * before[:, :, None]
                end = end + last_initial.to(wide).view(-1, 1, *ones) * before
            states.append(carried)
            final.append(end)
    matrices, firsts, seconds = (state[:, :, None] for state in states)
    sees = None if whole else chunks.sees_state()
    sees = None if sees is None else sees[:, None, None].to(wide)

    def seen(tensor: Tensor) -> Tensor:
        return tensor if sees is None else tensor * (sees if tensor.dim() == 5 else sees[..., None])

    sign = -1.0 if intercept else 1.0
    y = seen(sign * (xs @ matrices))
    scores = None if whole else torch.where(chunks.pairs()[:, None, None], xs @ ks.mT, 0.0)
    keep = None if whole else chunks.pairs()[:, None, None].to(wide)
    found = x.new_empty(0, dtype=wide)
    weights = None if scores is None else sign * scores
    if backward:
        if level is not None or initial_matrix is not None:
            y = y + seen(seconds[..., None, :].expand_as(y[:, :, :1]))
        if not whole and column is not None:
            assert weights is not None
            assert keep is not None
            weights = weights + keep * column[..., None, :]
    else:
        given = 0.0 if level is None else _chunked(level, heads, chunk, count, wide)
        scale = _chunked(inverse[:, None], 1, chunk, count, wide)
        if intercept or moment:
            mean = seen((xs @ firsts[..., None])[..., 0])
            mean = (mean if scores is None else mean + scores.sum(-1)) * scale
            found = mean + given if role == "probe" else mean
            found = found.flatten(3)[..., :length].flatten(1, 2)
        total = given + ((mean + (1.0 if role == "out" else 0.0)) if intercept else 0.0)
        if isinstance(total, Tensor):
            y = y + seen(total[..., None] * seconds[..., None, :])
            weights = None if weights is None or keep is None else weights + keep * total[..., None]
    if weights is not None:
        within = weights @ vs
        y = y + (within.sum(2, keepdim=True) if backward else within)
    if role == "out":
        y = y * scale[..., None]
    y = y.flatten(3, 4)[:, :, :, :length].flatten(1, 2).to(dtype)
    ends = [state.clone() for state in flip(final)] if save_state else [x.new_empty(0, dtype=wide) for _ in range(3)]
    return in_layout_of(x, y), found.contiguous(), ends[0].contiguous(), ends[1], ends[2]


# --- the two operators that autograd sees ---------------------------------------------------------------------------


class Kernels(NamedTuple):
    """What computes :func:`totals` and :func:`product`, and in how many segments."""

    totals: Callable[..., Any]
    product: Callable[..., Any]
    segments: Callable[[Any, Any, Any], int]


PLAIN = Kernels(totals, product, lambda *sizes: 1)


def forward(
    query: Tensor,
    probe: Tensor,
    key: Tensor,
    value: Tensor,
    inverse: Tensor,
    starts: Tensor | None,
    matrix: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    intercept: bool,
    moment: bool,
    save_state: bool,
    whole: bool,
    cache_salt: str,
    *,
    kernels: Kernels = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention with uniform weights.

    Args:
        query: ``[B, Hq, Lq, D]``, which is not read: what it has is a gradient, of zeros.
        probe: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]``.
        inverse: ``1 / n`` of each row, ``[B or 1, Lq]``; starts: see :class:`Prefix`.
        matrix, first, second: the state before the sequence, all of them or none.
        intercept, moment, save_state, whole: see :func:`product`.
        cache_salt: not used here; see :data:`~.cache_key.CACHE_SALT`.

    Returns:
        ``out [B, Hq, Lq, Dv]`` in key's dtype, ``t [B, Hq, Lq]``, and the state after the sequence; what was not asked for is
        empty.
    """
    sums = _totals_of(kernels, key, value, None, None, starts, key.size(1), False, whole)
    switches = ("out", intercept, moment, save_state, whole, key.dtype)
    return kernels.product(probe, key, value, inverse, starts, None, *sums, matrix, first, second, *switches)


def _totals_of(
    kernels: Kernels,
    key: Tensor,
    value: Tensor,
    key_level: Tensor | None,
    value_level: Tensor | None,
    starts: Tensor | None,
    heads: int,
    backward: bool,
    whole: bool,
) -> Sums:
    segments = kernels.segments(key.size(0), heads, key.size(2))
    if segments == 1 and not whole:
        return NO_SUMS
    return kernels.totals(key, value, key_level, value_level, starts, heads, segments, backward)


def backward(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    grad_matrix: Tensor | None,
    grad_first: Tensor | None,
    grad_second: Tensor | None,
    probe: Tensor,
    key: Tensor,
    value: Tensor,
    inverse: Tensor,
    starts: Tensor | None,
    mean: Tensor,
    matrix: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    intercept: bool,
    whole: bool,
    needs: list[bool],
    cache_salt: str,
    *,
    kernels: Kernels = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`forward` for probe, key, value and the initial state; empty where not needed.

    Args:
        grad_*: of the results of :func:`forward`; None is 0. Those of the state come together.
        mean: ``t`` of the forward; needs: whether probe, key, value and the initial state need one; the others as there.
    """
    need_probe, need_key, need_value, need_state = needs
    # A float16 number would lose its bits divided by the number of keys.
    low = torch.float32 if grad_out.dtype == torch.float16 else grad_out.dtype
    inverse_of_rows = inverse.unsqueeze(1)
    grad = (grad_out * inverse_of_rows.unsqueeze(-1)).to(low)
    level = None if grad_mean is None else grad_mean * inverse_of_rows
    heads, wide = key.size(1), statistics_dtype(key)
    dprobe, dkey, dvalue, dmatrix, dfirst, dsecond = _no_gradients(probe, wide)
    key_level, value_level = level, 1.0 + mean if intercept else None

    if need_probe or (intercept and (need_key or need_state)):
        sums = _totals_of(kernels, key, value, None, None, starts, heads, False, whole)
        dprobe, level_found, *_ = kernels.product(
            grad, value, key, inverse, starts, level, *sums, matrix, first, second,
            "probe", intercept, False, False, whole, probe.dtype,
        )  # fmt: skip
        key_level = level_found if intercept else level
    if not (need_key or need_value or need_state):
        return dprobe, dkey, dvalue, dmatrix, dfirst, dsecond
    final: Sums = NO_SUMS
    if grad_matrix is not None:
        final = (-grad_matrix if intercept else grad_matrix, grad_first, grad_second)
    sums = _totals_of(kernels, probe, grad, key_level, value_level, starts, heads, True, whole)
    if need_value or need_state:
        dvalue, _, dmatrix, _, dsecond = kernels.product(
            key, probe, grad, inverse, starts, value_level, *sums, *final,
            "value", intercept, False, need_state, whole, value.dtype,
        )  # fmt: skip
        dmatrix = -dmatrix if intercept else dmatrix
    if need_key or need_state:
        dkey, _, _, dfirst, _ = kernels.product(
            value, grad, probe, inverse, starts, key_level, *sums, *final,
            "key", intercept, False, need_state, whole, key.dtype,
        )  # fmt: skip
    return dprobe, dkey, dvalue, dmatrix, dfirst, dsecond


def _no_gradients(like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [like.new_empty(0, dtype=dtype) for _ in range(6)]


@torch.library.custom_op("parallax::scan_totals", mutates_args=())
def scan_totals(
    key: Tensor,
    value: Tensor,
    key_level: Tensor | None,
    value_level: Tensor | None,
    starts: Tensor | None,
    heads: int,
    segments: int,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`totals`."""
    return totals(key, value, key_level, value_level, starts, heads, segments, backward)


@scan_totals.register_fake
def _(key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, heads, segments, _ = rest
    shape, dtype = (key.size(0), heads, segments), statistics_dtype(key)
    width, value_width = key.size(3), value.size(3)
    return (
        key.new_empty((*shape, width, value_width), dtype=dtype),
        key.new_empty((*shape, width), dtype=dtype),
        key.new_empty((*shape, value_width), dtype=dtype),
    )


@torch.library.custom_op("parallax::scan_product", mutates_args=())
def scan_product(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    inverse: Tensor,
    starts: Tensor | None,
    level: Tensor | None,
    matrix: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    initial_matrix: Tensor | None,
    initial_first: Tensor | None,
    initial_second: Tensor | None,
    role: str,
    intercept: bool,
    moment: bool,
    save_state: bool,
    whole: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`product`."""
    sums = (matrix, first, second, initial_matrix, initial_first, initial_second)
    return product(x, key, value, inverse, starts, level, *sums, role, intercept, moment, save_state, whole, dtype)


def has_moment(role: str, intercept: bool, moment: bool) -> bool:
    """Whether a product returns the mean of X.K."""
    return not ROLES[role].backward and (intercept or moment)


@scan_product.register_fake
def _(x: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    role, intercept, moment, save_state, _, dtype = rest[-6:]
    wide = statistics_dtype(key)
    found = x.new_empty(x.shape[:3] if has_moment(role, intercept, moment) else 0, dtype=wide)
    states = tuple(x.new_empty(0, dtype=wide) for _ in range(3))
    if save_state:
        heads = min(x.size(1), key.size(1))
        width, value_width = (value, key) if ROLES[role].transposed else (key, value)
        shape = (x.size(0), heads, width.size(3), value_width.size(3))
        sizes = (shape, shape[:3], (*shape[:2], shape[3]))
        states = tuple(x.new_empty(size, dtype=wide) for size in sizes)
    return (empty_in_layout_of(x.to(dtype), value.size(3)), found, *states)  # type: ignore[return-value]


@torch.library.custom_op("parallax::scan", mutates_args=())
def scan(
    query: Tensor,
    probe: Tensor,
    key: Tensor,
    value: Tensor,
    inverse: Tensor,
    starts: Tensor | None,
    matrix: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    intercept: bool,
    moment: bool,
    save_state: bool,
    whole: bool,
    cache_salt: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward`."""
    switches = (intercept, moment, save_state, whole, cache_salt)
    return forward(query, probe, key, value, inverse, starts, matrix, first, second, *switches)


@scan.register_fake
def _(
    query: Tensor, probe: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from . import register_lowerings

    register_lowerings()  # whoever traces a call comes here
    intercept, moment, save_state, whole, _ = rest[-5:]
    return scan_product(
        probe, key, value, rest[0], None, None, *(None,) * 6, "out", intercept, moment, save_state, whole, key.dtype
    )


@torch.library.custom_op("parallax::scan_backward", mutates_args=())
def scan_backward(
    grad_out: Tensor,
    grad_mean: Tensor | None,
    grad_matrix: Tensor | None,
    grad_first: Tensor | None,
    grad_second: Tensor | None,
    probe: Tensor,
    key: Tensor,
    value: Tensor,
    inverse: Tensor,
    starts: Tensor | None,
    mean: Tensor,
    matrix: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    intercept: bool,
    whole: bool,
    needs: list[bool],
    cache_salt: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`backward`."""
    grads = (grad_out, grad_mean, grad_matrix, grad_first, grad_second)
    switches = (intercept, whole, needs, cache_salt)
    return backward(*grads, probe, key, value, inverse, starts, mean, matrix, first, second, *switches)


@scan_backward.register_fake
def _(grad_out: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    probe, key, value, matrix = rest[4], rest[5], rest[6], rest[10]
    intercept, _, needs, _ = rest[-4:]
    need_probe, need_key, need_value, need_state = needs
    wide = statistics_dtype(key)
    found = _no_gradients(probe, wide)
    if need_probe or (intercept and (need_key or need_state)):
        found[0] = empty_in_layout_of(probe, probe.size(3))
    if need_key or need_state:
        found[1] = empty_in_layout_of(key, key.size(3))
    if need_value or need_state:
        found[2] = empty_in_layout_of(value, value.size(3))
    if need_state and matrix is not None:
        found[3:] = [probe.new_empty(state.shape, dtype=wide) for state in rest[10:13]]
    return tuple(found)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, *tensors, ctx.intercept, _, _, ctx.whole, ctx.cache_salt = inputs
    ctx.query = (query.shape, query.dtype)
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple:
    probe, key, value, inverse, starts, *initial, mean = ctx.saved_tensors
    grad_out, grad_mean, *grad_state = grads
    if grad_out is None:
        grad_out = key.new_zeros((*probe.shape[:3], value.size(3)))
    if any(grad is not None for grad in grad_state):
        shapes = [
            (*key.shape[:2], key.size(3), value.size(3)),
            (*key.shape[:2], key.size(3)),
            (*key.shape[:2], value.size(3)),
        ]
        grad_state = [
            probe.new_zeros(shape, dtype=statistics_dtype(key)) if grad is None else grad
            for grad, shape in zip(grad_state, shapes, strict=True)
        ]
    needs = [*ctx.needs_input_grad[1:4], initial[0] is not None and any(ctx.needs_input_grad[6:9])]
    found = scan_backward(
        grad_out, grad_mean, *grad_state, probe, key, value, inverse, starts, mean, *initial,
        ctx.intercept, ctx.whole, needs, ctx.cache_salt,
    )  # fmt: skip
    found = tuple(grad if need else None for grad, need in zip(found, [*needs[:3], *needs[3:] * 3], strict=True))
    dquery = None
    if ctx.needs_input_grad[0]:
        shape, dtype = ctx.query
        dquery = probe.new_zeros(shape, dtype=dtype)
    return (dquery, *found[:3], None, None, *found[3:], *(None,) * 5)


scan.register_autograd(_differentiate, setup_context=_setup)


# --- attention ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Output ``[B, Hq, Lq, Dv]``; ``t`` and LSE ``[B, Hq, Lq]`` (``t`` empty where not asked for); final state."""

    out: Tensor
    mean: Tensor
    lse: Tensor
    state: State | None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None,
    prefix: Prefix,
    intercept: bool,
    *,
    moment: bool = False,
    initial: State | None = None,
    save_state: bool = False,
) -> Result:
    """A member of infinite bandwidth whose probe is zero (None), learned or found; differentiable.

    Args:
        query: ``[B, Hq, Lq, D]``, of which only the shape is used; its gradient is zeros.
        key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]``; probe: ``[B, Hq, Lq, D]`` or None.
        prefix: which keys each row sees, ``Lq = Lk`` unless whole.
        moment: whether ``t`` is wanted.
        initial: sums over the keys before these, which rows of the first run see too.
        save_state: whether the sums that end with the last key are wanted.
    """
    wide = statistics_dtype(key)
    count = _counts(prefix, query.size(2), key, initial)
    lse = count.log()[:, None].expand(query.shape[:3]).contiguous()
    zero = probe is None
    if zero:
        # The value average has no product: keys and a probe of one column of zeros stand for those that it does not read.
        key, probe = (value.new_zeros((*tensor.shape[:3], 1)) for tensor in (key, query))
        intercept = True
        if initial is not None:
            assert initial.value_sum is not None
            none = [initial.value_sum.new_zeros((*value.shape[:2], *width)) for width in ((1, value.size(3)), (1,))]
            initial = initial._replace(key_value=none[0], key_sum=none[1])
    # The covariance does not see a shift of the keys, and what is rounded gets smaller: FAMILY, "Centre the probe score".
    center = key.detach()[:, :, :CHUNK].to(wide).mean(2, keepdim=True) if intercept and not zero else None
    centred = key if center is None else (key.to(wide) - center).to(key.dtype)
    sums: Sums = NO_SUMS if initial is None else (initial.key_value, initial.key_sum, initial.value_sum)
    if center is not None and initial is not None:
        assert initial.key_value is not None
        assert initial.key_sum is not None
        assert initial.value_sum is not None
        before = initial.count.to(wide)[:, None, None]
        moved = initial.key_value - center.mT * initial.value_sum[:, :, None]
        sums = (moved, initial.key_sum - before * center[:, :, 0], initial.value_sum)
    switches = (intercept, moment, save_state, prefix.whole, CACHE_SALT)
    out, mean, matrix, first, second = scan(query, probe, centred, value, 1.0 / count, prefix.starts, *sums, *switches)
    if center is not None and moment and probe is not None:
        group = probe.size(1) // key.size(1)
        mean = mean + (probe.to(wide) * center.repeat_interleave(group, 1)).sum(-1)
    if not save_state:
        return Result(out, mean, lse, None)
    after = count[:, -1].expand(key.size(0))
    if center is not None:
        matrix = matrix + center.mT * second[:, :, None]
        first = first + after[:, None, None] * center[:, :, 0]
    state = State(after, value_sum=second) if zero else State(after, matrix, first, second)
    return Result(out, mean, lse, state)


def final_products(key: Tensor, prefix: Prefix, initial: State | None) -> Tensor:
    """``sum_j k_j k_j^T`` over the keys that the state after the last one holds, ``[B, Hkv, D, D]``."""
    keys = key.to(statistics_dtype(key))
    left = keys
    if prefix.starts is not None:
        kept = torch.arange(key.size(2), device=key.device) >= prefix.starts[:, -1:]
        left = torch.where(kept[:, None, :, None], keys, 0.0)
    found = left.mT @ keys
    if initial is None or initial.key_key is None:
        return found
    if prefix.starts is None:
        return found + initial.key_key
    return found + torch.where(prefix.starts[:, -1] == 0, 1.0, 0.0)[:, None, None, None] * initial.key_key


def _counts(prefix: Prefix, length: Any, key: Tensor, initial: State | None) -> Tensor:
    """Keys of each row, ``[B or 1, Lq]``."""
    wide = statistics_dtype(key)
    before = None if initial is None else initial.count.to(wide)[:, None]
    if prefix.whole:
        count = torch.full((1, length), key.size(2), dtype=wide, device=key.device)
        return count if before is None else count + before
    position = torch.arange(length, device=key.device)[None]
    if prefix.starts is None:
        count = (position + 1).to(wide)
        return count if before is None else count + before
    count = (position + 1 - prefix.starts).to(wide)
    return count if before is None else count + torch.where(prefix.starts == 0, before, 0.0)
