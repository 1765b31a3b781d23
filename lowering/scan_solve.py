"""The ridge systems of infinite bandwidth in linear time: MesaNet's probes, with and without intercept.

The matrix of a row is that of the keys before its chunk, which all rows of the chunk share, and of those within it:

    C x = (S x + sum_{j in chunk, j <= i} k_j (k_j.x)) / n - k_mean (k_mean.x) ,   S = sum_{j before} k_j k_j^T

(without intercept the last term is not there), so that a step of conjugate gradients costs the same for every chunk. Two
kernels, after the totals of whole segments (:mod:`.scan_products`): one writes ``S`` at each chunk, in the dtype of the
products and a unit for each chunk; the other solves. The gradient is that of implicit differentiation (FAMILY,
"Gradients"): the same systems again for ``u``, and two products of the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import scan
from .cache_key import CACHE_SALT
from .cpu import conjugate_gradients
from .operator import statistics_dtype
from .plan_scan import CHUNK
from .scan_products import Chunks, chunk_sums, chunked, product, totals, unchunked

# --- what the kernels compute ---------------------------------------------------------------------------------------


def states(
    key: Tensor,
    starts: Tensor | None,
    total: Tensor | None,
    total_first: Tensor | None,
    initial: Tensor | None,
    initial_first: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums before each chunk of :data:`~.plan_scan.CHUNK` rows that its rows of the same run continue.

    Args:
        key: ``[B, H, L, D]``; starts: see :class:`~.scan.Prefix`.
        total, total_first: of :func:`.scan_products.totals`, or None for one segment.
        initial, initial_first: the sums before the sequence, ``[B, H, D, D]`` and ``[B, H, D]``, or None.
        dtype: of the first result.

    Returns:
        ``sum k k^T [B, H, N, D, D]``, each in the square of a unit, of ``[B, H, N]``, that its chunk's keys take too;
        ``sum k [B, H, N, D]``. The last two in the dtype of the statistics.
    """
    length, wide = key.size(2), statistics_dtype(key)
    count = (length + CHUNK - 1) // CHUNK
    chunks = Chunks(length, CHUNK, count, starts, False, key.device)
    keys = chunked(key, key.size(1), CHUNK, count, wide)
    matrix, first, _ = chunk_sums(keys, keys, 1, 1, chunks.kept())
    held, holds_initial = chunks.carried()
    carried = []
    for part, before in ((matrix, initial), (first, initial_first)):
        state = (held.to(wide)[:, None] @ part.flatten(3)).view(part.shape)
        if before is not None:
            ones = (1,) * (before.dim() - 2)
            state = state + holds_initial.to(wide).view(-1, 1, count, *ones) * before[:, :, None]
        carried.append(state)
    units = _units(carried[0].diagonal(dim1=-2, dim2=-1) + keys.square().sum((2, -2)))
    return scaled(carried[0], units, dtype), units, carried[1].contiguous()


LEAST_SQUARE = 2.0**-64
"""Least square of a unit: float32 holds its reciprocal, and that times a sequence's length and a ridge."""


def _units(diagonal: Tensor) -> Tensor:
    """For sums of squares with the diagonals ``[..., D]``, the power of two whose square no entry of theirs passes."""
    return torch.exp2(torch.ceil(0.5 * torch.log2(diagonal.amax(-1).clamp_min(LEAST_SQUARE))))


def scaled(matrix: Tensor, units: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` in the squares of ``units``; a state that was given and is no sum of squares stays within 16 bits too."""
    found = matrix / (units * units).unsqueeze(-1).unsqueeze(-1)
    return (found.clamp(-2.0, 2.0) if dtype.itemsize == 2 else found).to(dtype)


def systems(
    right: Tensor,
    key: Tensor,
    ridge: Tensor,
    inverse: Tensor,
    starts: Tensor | None,
    center: Tensor | None,
    matrix: Tensor,
    units: Tensor,
    first: Tensor,
    own: bool,
    intercept: bool,
    whole: bool,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve ``(C + ridge) x = b`` for each row.

    Args:
        right: ``[B, Hq, L, D]``: ``b``, or the query of the member's own ``b`` (``own``): ``mean key + center - query`` with
            intercept, else ``query``.
        key: ``[B, H, Lk, D]``, less ``center [B, H, D]`` (None is 0).
        ridge: ``[B, Hq, L]``; inverse: ``1 / n``, ``[B or 1, L]``; starts: see :class:`~.scan.Prefix`.
        matrix, units, first: of :func:`states`; one chunk of all keys if ``whole``.
        tolerance, max_iterations: of the solver.

    Returns:
        ``x [B, Hq, L, D]``; ``x.mean key`` (of ``key`` as given; empty without intercept), iterations (int32) and the norm
        of the residual, each ``[B, Hq, L]``.
    """
    heads, length, wide = key.size(1), right.size(2), statistics_dtype(right)
    chunk = length if whole else CHUNK
    count = 1 if whole else (length + chunk - 1) // chunk
    chunks = Chunks(length, chunk, count, starts, False, key.device)
    b = chunked(right, heads, chunk, count, wide)
    lam = chunked(ridge, heads, chunk, count, wide)[..., None]
    scale = chunked(inverse[:, None], 1, chunk, count, wide)[..., None]
    before = (matrix.to(wide) * (units * units)[..., None, None])[:, :, None]
    sees = None if whole else chunks.sees_state()
    seen = torch.ones_like(scale) if sees is None else sees[:, None, None, :, :, None].to(wide)
    mean = seen * first[:, :, None, :, None, :]
    system: tuple[Tensor, ...] = (before, seen, scale)
    if not whole:
        keys = chunked(key, heads, chunk, count, wide)
        keep = chunks.pairs()[:, None, None].to(wide)
        mean = mean + keep @ keys
        system += (keys, keep)
    mean = mean * scale

    def image(
        x: Tensor, lam: Tensor, mean: Tensor, before: Tensor, seen: Tensor, scale: Tensor, *near: Tensor
    ) -> Tensor:
        y = seen * (x @ before)
        if near:
            keys, keep = near
            y = y + (keep * (x @ keys.mT)) @ keys
        y = y * scale + lam * x
        return y - mean * (x * mean).sum(-1, keepdim=True) if intercept else y

    if own and intercept:
        b = mean - b if center is None else mean + center[:, :, None, None, None] - b
    b = torch.where((chunks.position < length)[None, None, None, ..., None], b, 0.0)
    solver = {"tolerance": tolerance, "max_iterations": max_iterations}
    x, residual, used = conjugate_gradients(image, b, lam, solver, (lam, mean.expand(b.shape), *system))

    def rows(tensor: Tensor) -> Tensor:
        return unchunked(tensor, length).contiguous()

    along = rows((x * mean).sum(-1)) if intercept else right.new_empty(0, dtype=wide)
    return rows(x), along, rows(used), rows(residual.norm(dim=-1))


scan_states = torch.library.custom_op("parallax::scan_states", states, mutates_args=())
scan_systems = torch.library.custom_op("parallax::scan_systems", systems, mutates_args=())


@scan_states.register_fake
def _(key: Tensor, starts: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = key.shape
    shape = (batch, heads, (length + CHUNK - 1) // CHUNK, width)
    wide = statistics_dtype(key)
    return (
        key.new_empty((*shape, width), dtype=rest[-1]),
        key.new_empty(shape[:3], dtype=wide),
        key.new_empty(shape, dtype=wide),
    )


@scan_systems.register_fake
def _(right: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, rows, intercept = statistics_dtype(right), right.shape[:3], rest[-4]
    return (
        right.new_empty(right.shape, dtype=wide),
        right.new_empty(rows if intercept else 0, dtype=wide),
        right.new_empty(rows, dtype=torch.int32),
        right.new_empty(rows, dtype=wide),
    )


# --- the operator that autograd sees --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The solve over something that computes the functions above and those of the scan.

    Attributes:
        operands: dtype of the inputs -> dtype of the products.
    """

    scan: scan.Kernels
    states: Callable[..., Any]
    systems: Callable[..., Any]
    operands: Callable[[torch.dtype], torch.dtype]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        ridge: Tensor,
        inverse: Tensor,
        starts: Tensor | None,
        center: Tensor | None,
        matrix: Tensor | None,
        first: Tensor | None,
        intercept: bool,
        whole: bool,
        tolerance: float,
        max_iterations: int,
        cache_salt: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solve each row's own system; arguments and results as in :func:`systems`, but that ``key`` is not centred.

        ``matrix [B, H, D, D]`` and ``first [B, H, D]`` are the state before the sequence, about ``center``.
        """
        keys = self._centred(key, center)
        system = (ridge, inverse, starts, center, *self._states(keys, starts, matrix, first, whole))
        return self.systems(query, keys, *system, True, intercept, whole, tolerance, max_iterations)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        key: Tensor,
        ridge: Tensor,
        inverse: Tensor,
        starts: Tensor | None,
        center: Tensor | None,
        matrix: Tensor | None,
        first: Tensor | None,
        intercept: bool,
        whole: bool,
        tolerance: float,
        max_iterations: int,
        needs: list[bool],
        cache_salt: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The adjoint solution ``u``, and the gradients of keys and initial state; empty where not needed.

        Args:
            grad: of the solution ``x``; mean: ``x.mean key`` of the forward; needs: whether key and state need a gradient.
        """
        keys = self._centred(key, center)
        system = (ridge, inverse, starts, None, *self._states(keys, starts, matrix, first, whole))
        u, along, _, _ = self.systems(grad, keys, *system, False, intercept, whole, tolerance, max_iterations)
        wide = statistics_dtype(key)
        dkey, dmatrix, dfirst = (key.new_empty(0, dtype=wide) for _ in range(3))
        if not any(needs):
            return u, dkey, dmatrix, dfirst
        # Phi = u.mean key - Cov(k.u, k.x), or -sum (k.u)(k.x) / n: the member of the scan whose values are the keys.
        key_level, value_level = (along * inverse.unsqueeze(1), 1.0 + mean) if intercept else (None, None)
        tf32 = keys.dtype.itemsize == 2
        sums = self.scan.totals_of(x, u, key_level, value_level, starts, key.size(1), True, whole, inverse, tf32)
        none, need_state = (None, None, None), needs[1]
        switches = (intercept, False, need_state, whole, wide)
        as_value, _, dmatrix, _, second = self.scan.product(
            keys, x, u, inverse, starts, value_level, *sums, *none, "value", *switches
        )
        as_key, _, _, dfirst, _ = self.scan.product(
            keys, u, x, inverse, starts, key_level, *sums, *none, "key", *switches
        )
        dkey = as_value + as_key if intercept else -(as_value + as_key)
        if need_state:
            dmatrix, dfirst = -dmatrix, dfirst + second
        return u, dkey.to(key.dtype), dmatrix, dfirst

    def _centred(self, key: Tensor, center: Tensor | None) -> Tensor:
        # As they are, keys need no other dtype: their products are exact, and the systems take them in a unit.
        return key if center is None else (key.to(center.dtype) - center.unsqueeze(2)).to(self.operands(key.dtype))

    def _states(
        self, keys: Tensor, starts: Tensor | None, matrix: Tensor | None, first: Tensor | None, whole: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.operands(keys.dtype)
        found = self.scan.totals_of(keys, keys, None, None, starts, keys.size(1), False, whole)
        if not whole:
            return self.states(keys, starts, found[0], found[1], matrix, first, dtype)
        assert found[0] is not None
        assert found[1] is not None
        whole_matrix, whole_first = found[0].sum(2, keepdim=True), found[1].sum(2, keepdim=True)
        if matrix is not None and first is not None:
            whole_matrix, whole_first = whole_matrix + matrix.unsqueeze(2), whole_first + first.unsqueeze(2)
        units = _units(whole_matrix.diagonal(dim1=-2, dim2=-1))
        return scaled(whole_matrix, units, dtype), units, whole_first


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


PLAIN = Kernels(scan.Kernels(totals, product, lambda *sizes: 1), states, systems, _wide)
scan_solve = torch.library.custom_op("parallax::scan_solve", PLAIN.forward, mutates_args=())
scan_solve_backward = torch.library.custom_op("parallax::scan_solve_backward", PLAIN.backward, mutates_args=())


@scan_solve.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import register_lowerings

    register_lowerings()  # whoever traces a call comes here
    return scan_systems(query, *rest[:5], None, None, None, True, *rest[-5:-1])


@scan_solve_backward.register_fake
def _(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, key, _, _, _, _, matrix, first = rest[:9]
    wide = statistics_dtype(grad)
    need_key, need_state = rest[-2]
    empty = [grad.new_empty(0, dtype=wide) for _ in range(3)]
    if need_key or need_state:
        empty[0] = key.new_empty(key.shape)
    if need_state and matrix is not None:
        empty[1:] = [grad.new_empty(state.shape, dtype=wide) for state in (matrix, first)]
    return (grad.new_empty(grad.shape, dtype=wide), *empty)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    query, *tensors = inputs[:8]
    ctx.query_dtype, ctx.switches = query.dtype, inputs[8:]
    ctx.save_for_backward(*output[:2], *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    if grad is None:
        return (None,) * 13
    x, mean, *tensors = ctx.saved_tensors
    *switches, salt = ctx.switches
    needs = [ctx.needs_input_grad[1], any(ctx.needs_input_grad[6:8])]
    u, dkey, dmatrix, dfirst = scan_solve_backward(grad, x, mean, *tensors, *switches, needs, salt)
    dquery = (-u if ctx.switches[0] else u).to(ctx.query_dtype) if ctx.needs_input_grad[0] else None
    dridge = -(u * x).sum(-1) if ctx.needs_input_grad[2] else None
    state = (dmatrix, dfirst) if needs[1] else (None, None)
    return (dquery, dkey if needs[0] else None, dridge, None, None, None, *state, *(None,) * 5)


scan_solve.register_autograd(_differentiate, setup_context=_setup)


def solve(
    query: Tensor,
    key: Tensor,
    ridge: Tensor,
    prefix: scan.Prefix,
    intercept: bool,
    initial: scan.State | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The solved probe of each row ``[B, Hq, Lq, D]``, iterations and the norm of the residual ``[B, Hq, Lq]``; differentiable.

    Args:
        query: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``; ridge: ``[B, Hq, Lq]`` on normalised weights.
        prefix: which keys each row sees; initial: sums over the keys before.
    """
    wide = statistics_dtype(key)
    count = scan.counts(prefix, query.size(2), key, initial)
    # What is rounded gets smaller, and the covariance does not see it: as in scan.attention.
    center = key.detach()[:, :, :CHUNK].to(wide).mean(2) if intercept else None
    matrix = first = None
    if initial is not None:
        matrix, first = initial.key_key, initial.key_sum
        assert matrix is not None
        assert first is not None
        if center is not None:
            before = initial.count.to(wide)[:, None, None]
            cross = center[..., None] * first[:, :, None]
            matrix = matrix - cross - cross.mT + before[..., None] * center[..., None] * center[:, :, None]
            first = first - before * center
    x, _, iterations, residual = scan_solve(
        query, key, ridge, 1.0 / count, prefix.starts, center, matrix, first,
        intercept, prefix.whole, tolerance, max_iterations, CACHE_SALT,
    )  # fmt: skip
    return x, iterations, residual
