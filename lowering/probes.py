"""Probes that a stage computes in front of the core: solved and gradient (FAMILY, "The solved probe").

Gradient probes are written over the core itself. Its own output with the keys in the values' place is the matrix-vector product
of the rows' systems: with intercept ``core(value=key, probe=x) = mean key - C x``, without ``core(value=key, probe=x) = S x``.
That the core is differentiable gives them their gradient, through the steps. Solved probes have operators of their own:
:mod:`.solve`, and :mod:`.scan_solve` where the sums run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import scan, scan_solve
from .operator import attention_forward, statistics_dtype
from .solve import attention_solve

Mod = Callable[..., Any]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Relative error of the solution, in the norm of ``M``, at which the iteration of a tile of rows stops."""
MAX_ITERATIONS_PER_WIDTH = 4


class Weights(NamedTuple):
    """What the weights ``p`` of the core depend on beside queries and keys.

    Attributes:
        prefix: the keys of each row, where their weights are uniform and the sums run (:mod:`.scan`); else None.
        initial: with ``prefix``, the sums over the keys before.
    """

    score_mod: Mod
    block_mask: tuple
    scale: float
    kernel_options: dict[str, Any]
    prefix: scan.Prefix | None = None
    initial: scan.State | None = None


class ProbeStage(NamedTuple):
    """A probe ``[B, Hq, Lq, D]`` in the dtype of the statistics, and how it was found, ``[B, Hq, Lq]`` each."""

    probe: Tensor
    iterations: Tensor
    residual: Tensor


class Solution(NamedTuple):
    """A solved probe, and what its stage makes with it: the output (empty without values), LSE and ``t``, ``[B, Hq, Lq]``."""

    stage: ProbeStage
    out: Tensor
    lse: Tensor
    mean: Tensor


def _identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


def _core(query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, weights: Weights, intercept: bool) -> Any:
    """``out`` and LSE of the core."""
    if weights.prefix is not None:
        initial = None
        if weights.initial is not None:  # the products here have the keys in the values' place
            state = weights.initial
            initial = scan.State(state.count, state.key_key, state.key_sum, state.key_sum)
        found = scan.attention(query, key, value, probe, weights.prefix, intercept, initial=initial)
        return found.out, found.lse
    out, _, lse, _ = attention_forward(
        query,
        key,
        value,
        probe,
        weights.score_mod,
        _identity,
        weights.block_mask,
        weights.scale,
        intercept,
        False,
        weights.kernel_options,
    )
    return out, lse


def _error(query: Tensor, key: Tensor, x: Tensor | None, lam: Tensor, weights: Weights, intercept: bool) -> Tensor:
    """``b - M x``, differentiable in everything; ``x`` None is 0."""
    dtype = statistics_dtype(query)
    if intercept:
        # mean key - C x, of which b takes the query
        moved, _ = _core(query, key, key, x, weights, True)
        error = moved.to(dtype) - query.to(dtype)
    else:
        error = query.to(dtype)
        if x is not None:
            moved, _ = _core(query, key, key, x, weights, False)
            error = error - moved.to(dtype)
    return error if x is None else error - lam[..., None] * x


def ridge_of_rows(query: Tensor, key: Tensor, ridge: Tensor | float, ridge_scale: str, weights: Weights) -> Tensor:
    """The ridge on normalised weights, ``[B, Hq, Lq]``."""
    rows, dtype = query.shape[:3], statistics_dtype(query)
    if isinstance(ridge, Tensor):
        lam = ridge.to(dtype).expand(rows)
    else:
        lam = torch.full(rows, ridge, dtype=dtype, device=query.device)
    if ridge_scale == "mean":
        return lam
    # "sum": the ridge belongs to unnormalised weights, whose sum is e^lse (or the number of keys).
    _, lse = _core(query, key, key, None, weights, True)
    return lam * torch.exp(-torch.where(lse.isinf(), 0.0, lse))


def solved(
    query: Tensor, key: Tensor, value: Tensor | None, lam: Tensor, weights: Weights, intercept: bool, most: int | None
) -> Solution:
    """The probe that solves each row's ridge regression, and the output with it; gradients by implicit differentiation.

    Args:
        value: ``[B, Hkv, Lk, Dv]``; None where the output is made elsewhere.
        most: steps at most, or None.
    """
    most = MAX_ITERATIONS_PER_WIDTH * query.size(3) if most is None else most
    solver = {**weights.kernel_options, "tolerance": TOLERANCE[query.dtype], "max_iterations": most}
    score_mod, block_mask, scale = weights[:3]
    x, out, lse, mean, iterations, residual = attention_solve(
        query, key, value, lam, None, None, None, None, score_mod, block_mask, scale, intercept, solver
    )
    return Solution(ProbeStage(x, iterations, residual), out, lse, mean)


def summed(query: Tensor, key: Tensor, lam: Tensor, weights: Weights, intercept: bool, most: int | None) -> ProbeStage:
    """The probe of :func:`solved` where the weights are uniform and the sums run along the sequence."""
    assert weights.prefix is not None
    most = MAX_ITERATIONS_PER_WIDTH * query.size(3) if most is None else most
    where = (weights.prefix, intercept, weights.initial)
    return ProbeStage(*scan_solve.solve(query, key, lam, *where, TOLERANCE[query.dtype], most))


def gradient(
    query: Tensor, key: Tensor, lam: Tensor, weights: Weights, intercept: bool, steps: int, step_size: float | None
) -> ProbeStage:
    """``steps`` of ``x <- x + eta (b - M x)`` from 0; ``eta`` is ``1 / (ridge + trace C)`` for each row, or given."""
    error = _error(query, key, None, lam, weights, intercept)
    eta = 1.0 / (lam + _trace(query, key, weights, intercept)) if step_size is None else torch.full_like(lam, step_size)
    x = eta[..., None] * error
    for _ in range(steps - 1):
        x = x + eta[..., None] * _error(query, key, x, lam, weights, intercept)
    with torch.no_grad():
        residual = _error(query, key, x.detach(), lam, weights, intercept).norm(dim=-1)
    return ProbeStage(x, torch.full_like(lam, steps, dtype=torch.int32), residual)


def _trace(query: Tensor, key: Tensor, weights: Weights, intercept: bool) -> Tensor:
    """``trace C = sum_j p_j |k_j|^2``, less ``|mean key|^2`` with intercept."""
    dtype = statistics_dtype(query)
    # About a mean of all keys, because the trace does not see it and its square would drown the rest.
    center = key.detach().mean(2, keepdim=True) if intercept else None
    centred = key if center is None else key - center
    squares, _ = _core(query, key, centred.square().sum(-1, keepdim=True), None, _moved(weights, center, True), True)
    if center is None:
        return squares.squeeze(-1).to(dtype)
    mean, _ = _core(query, key, centred, None, _moved(weights, center, False), True)
    return squares.squeeze(-1).to(dtype) - mean.to(dtype).square().sum(-1)


def _moved(weights: Weights, center: Tensor | None, squares: bool) -> Weights:
    """``weights`` whose state before the keys holds the sum of ``k - center``, or of its squares, in the keys' place."""
    state = weights.initial
    if state is None:
        return weights
    assert state.key_sum is not None
    assert state.key_key is not None
    total = state.key_sum
    if squares:
        total = state.key_key.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    if center is not None:
        shift, count = center[:, :, 0].to(total.dtype), state.count.to(total.dtype)[:, None, None]
        if squares:
            total = total + (shift * (count * shift - 2 * state.key_sum)).sum(-1, keepdim=True)
        else:
            total = total - count * shift
    return weights._replace(initial=state._replace(key_sum=total))
