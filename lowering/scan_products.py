"""The products of the scan, in plain torch: what its kernels compute, and what runs on a CPU.

Every allowed key weighs the same, so that the core and its gradients are four products of one form,

    y_i = sum_j w_ij V_j   with   w_ij = level_i + level_j -+ X_i.K_j ,   j over the keys of row i (or the rows of key i),

and a product needs of the past only ``matrix = sum_j K_j V_j^T``, ``first = sum_j K_j`` and ``second = sum_j level_j V_j``:

    ===========  ======  =========  =====  ===========  ==========================================
    role         X       K          V      direction    level
    ===========  ======  =========  =====  ===========  ==========================================
    out          probe   key        value  forward      row: 1 + t, t the row's mean of X.K
    probe        grad    value      key    forward      row: the mean of X.K (+ g_t)
    value        key     probe      grad   backward     key: 1 + t
    key          value   grad       probe  backward     key: what role "probe" found, over n
    ===========  ======  =========  =====  ===========  ==========================================

with the sign minus; without intercept the sign is plus and there are no levels but ``g_t``. The rows of roles "out" and "probe"
are divided by ``n``, the keys in the row, and so is the gradient in the two others. The state of roles "probe" and "key" is
the transpose of that of "out" and "value", so that a direction has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dense import in_layout_of
from .operator import empty_in_layout_of, statistics_dtype
from .plan_scan import CHUNK
from .torch_compat_inlining import in_memory

_CPU_CHUNK = 128


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


class Chunks:
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


def chunked(tensor: Tensor, heads: int, chunk: Any, count: Any, dtype: torch.dtype) -> Tensor:
    """``[B, H, L, ...]`` as ``[B, heads, H / heads, N, C, ...]`` of ``dtype``, filled up with zeros."""
    missing = count * chunk - tensor.size(2)
    filler = tensor.new_zeros((*tensor.shape[:2], missing, *tensor.shape[3:]))
    padded = torch.cat([tensor, filler], 2).to(dtype)
    return padded.unflatten(2, (count, chunk)).unflatten(1, (heads, tensor.size(1) // heads))


def unchunked(tensor: Tensor, length: Any) -> Tensor:
    """``[B, heads, G, N, C, ...]`` as ``[B, heads * G, length, ...]``, without the rows that fill up the last chunk."""
    return in_memory(tensor.flatten(3, 4))[:, :, :, :length].flatten(1, 2)


def _masked(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """``[B, H, G, N, C, ...]`` where ``keep [Bs, N, C]``, 0 elsewhere."""
    if keep is None:
        return tensor
    keep = keep[:, None, None]
    return torch.where(keep[..., None] if tensor.dim() == 6 else keep, tensor, 0.0)


def chunk_sums(
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
    weight: Tensor | None,
    starts: Tensor | None,
    heads: int,
    segments: int,
    last: bool,
    backward: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of each segment.

    Args:
        key: K ``[B, H, L, D]``; value: V ``[B, H, L, Dv]``; their ``H / heads`` heads of a group share a state.
        key_level, value_level: ``[B, H, L]``, weights of K in ``first`` and of V in ``second``; None is 1, backward 0.
        weight: ``[B or 1, L]``, by which the rows of V are multiplied first; None is 1.
        starts: see :class:`Prefix`.
        segments: how many; of ``ceil(ceil(L / CHUNK) / segments)`` chunks each, the last ones possibly empty.
        last: whether the segment with which the sums end is wanted too, which none continues.
        backward: whether the state runs from the end.
        tf32: whether float32 stands for 16-bit inputs here, so that a kernel may multiply it as TF32.

    Returns:
        ``matrix [B, heads, S, D, Dv]``, ``first [B, heads, S, D]``, ``second [B, heads, S, Dv]`` in the dtype of the
        statistics, ``S = segments - (not last)``, in the order of the sequence.
    """
    dtype, length = statistics_dtype(key), key.size(2)
    rows = ((length + CHUNK - 1) // CHUNK + segments - 1) // segments * CHUNK
    chunks = Chunks(length, rows, segments, starts, backward, key.device)
    parts = [chunked(tensor, heads, rows, segments, dtype) for tensor in (key, _weighed(value, weight))]
    levels: list[Any] = [
        int(not backward) if level is None else chunked(level, heads, rows, segments, dtype)
        for level in (key_level, value_level)
    ]
    found = chunk_sums(parts[0], parts[1], levels[0], levels[1], chunks.kept())
    first, many = int(backward and not last), segments - int(not last)
    return tuple(part[:, :, first : first + many].contiguous() for part in found)  # type: ignore[return-value]


def _weighed(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """``[B, H, L, D]`` with its rows times their weight, ``[B or 1, L]``."""
    return tensor if weight is None else tensor * weight[:, None, :, None]


def product(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    inverse: Tensor | None,
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
        inverse: ``1 / n`` of each row, ``[B or 1, L]``; None (roles "value", "key") where the gradient is divided already.
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
        ``y [B, Hx, L, Dv]``, the moment ``[B, Hx, L]`` (in role "probe" with ``level``, and over ``n``), and the final state;
        what was not asked for is empty.
    """
    backward, transposed = ROLES[role].backward, ROLES[role].transposed
    wide, length = statistics_dtype(key), x.size(2)
    if backward:
        key, value = (_weighed(key, inverse), value) if transposed else (key, _weighed(value, inverse))
    heads = min(x.size(1), key.size(1))
    chunk = length if whole else _CPU_CHUNK
    count = 1 if whole else (length + chunk - 1) // chunk
    chunks = Chunks(length, chunk, count, starts, backward, key.device)
    xs = chunked(x, heads, chunk, count, wide)

    def flip(sums: Any) -> Any:
        return (sums[0] if sums[0] is None else sums[0].mT, sums[2], sums[1]) if transposed else tuple(sums)

    initial = flip((initial_matrix, initial_first, initial_second))
    if whole:
        assert matrix is not None
        states = [total.sum(2, keepdim=True) for total in flip((matrix, first, second))]
        states = [s if i is None else s + i[:, :, None] for s, i in zip(states, initial, strict=True)]
        final = [state[:, :, 0] for state in states]
    else:
        ks, vs = (chunked(tensor, heads, chunk, count, wide) for tensor in (key, value))
        column = chunked(level, heads, chunk, count, wide) if backward and level is not None else None
        sums = chunk_sums(ks, vs, 1, int(not backward) if column is None else column, chunks.kept())
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
        assert inverse is not None
        given = 0.0 if level is None else chunked(level, heads, chunk, count, wide)
        scale = chunked(inverse[:, None], 1, chunk, count, wide)
        if intercept or moment:
            mean = seen((xs @ firsts[..., None])[..., 0])
            mean = (mean if scores is None else mean + scores.sum(-1)) * scale
            found = (mean + given) * scale if transposed else mean
            found = unchunked(found, length)
        total = given + ((mean + (1.0 if role == "out" else 0.0)) if intercept else 0.0)
        if isinstance(total, Tensor):
            y = y + seen(total[..., None] * seconds[..., None, :])
            weights = None if weights is None or keep is None else weights + keep * total[..., None]
    if weights is not None:
        within = weights @ vs
        y = y + (within.sum(2, keepdim=True) if backward else within)
    if not backward:
        y = y * scale[..., None]
    y = unchunked(y, length).to(dtype)
    ends = [state.clone() for state in flip(final)] if save_state else [x.new_empty(0, dtype=wide) for _ in range(3)]
    return in_layout_of(x, y), found.contiguous(), ends[0].contiguous(), ends[1], ends[2]


def has_moment(role: str, intercept: bool, moment: bool) -> bool:
    """Whether a product returns the mean of X.K."""
    return not ROLES[role].backward and (intercept or moment)


scan_totals = torch.library.custom_op("parallax::scan_totals", totals, mutates_args=())
scan_product = torch.library.custom_op("parallax::scan_product", product, mutates_args=())


@scan_totals.register_fake
def _(key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads, segments, last = rest[4:7]
    shape, dtype = (key.size(0), heads, segments - int(not last)), statistics_dtype(key)
    width, value_width = key.size(3), value.size(3)
    return (
        key.new_empty((*shape, width, value_width), dtype=dtype),
        key.new_empty((*shape, width), dtype=dtype),
        key.new_empty((*shape, value_width), dtype=dtype),
    )


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
