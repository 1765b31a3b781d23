"""The reference: the whole family on dense score matrices, any dtype including float64, differentiable to any order.

This is the oracle for every kernel and what an uncompiled call runs. It imports nothing of the package; the mods it is
given are already functions of whole ``[B, Hq, Lq, Lk]`` score matrices. Equations: FAMILY.md; arXiv 2605.29157 and
arXiv 2510.01450.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .spec import AttentionSpec

DenseMod = Callable[[Tensor], Tensor]
Solve = Callable[[Tensor, Tensor], Tensor]


class ReferenceOutput(NamedTuple):
    """What :func:`attention` returns.

    Attributes:
        out: ``[B, Hq, Lq, Dv]`` in query's dtype.
        lse: ``[B, Hq, Lq]``, natural log; -inf on rows with no allowed key; log of their number at infinite bandwidth.
        probe_mean: ``t``, ``[B, Hq, Lq]``, absolute; 0 on rows with no allowed key.
        value_mean: ``[B, Hq, Lq, Dv]`` in query's dtype.
        iterations, residual: ``[B, Hq, Lq]`` for solved and gradient probes (a direct solve counts as 0 iterations).
    """

    out: Tensor
    lse: Tensor
    probe_mean: Tensor
    value_mean: Tensor
    iterations: Tensor | None = None
    residual: Tensor | None = None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    spec: AttentionSpec,
    score_mod: DenseMod | None = None,
    covariance_mod: DenseMod | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    ridge: Tensor | float | None = None,
    solve: Solve | None = None,
) -> ReferenceOutput:
    """Attention of ``spec``, computed in float32 (float64 for float64 inputs).

    Args:
        query: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]`` with ``Hq`` a multiple of ``Hkv``.
        probe: ``[B, Hq, Lq, D]`` for a learned probe, else None.
        spec: the member; its own mods are not applied here, only those given.
        score_mod, covariance_mod: functions of the scaled scores and of the probe scores, ``[B, Hq, Lq, Lk]``.
        mask: bool, broadcastable to ``[B, Hq, Lq, Lk]``; True allows.
        scale: None is ``1/sqrt(D)``.
        ridge: overrides the spec's; broadcastable to ``[B, Hq, Lq]``.
        solve: in place of ``torch.linalg.solve``, ``(matrix [..., D, D], right [..., D]) -> [..., D]``.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.size(1) // key.size(1)
    queries = query.to(dtype)
    keys, values = (tensor.repeat_interleave(group, dim=1).to(dtype) for tensor in (key, value))
    allowed = torch.ones((), dtype=torch.bool, device=query.device) if mask is None else mask
    allowed = allowed.expand(*query.shape[:3], key.size(2))

    weights, lse = _weights(queries, keys, spec, score_mod, allowed, scale)
    value_mean = weights @ values
    iterations = residual = None
    rho = None if probe is None else probe.to(dtype)
    if spec.probe.kind in ("solved", "gradient"):
        lam = _ridge(spec, ridge, weights, lse)
        matrix, right = _system(queries, keys, weights, lam, spec.intercept)
        if spec.probe.kind == "solved":
            rho = (_solve if solve is None else solve)(matrix, right)
            iterations = torch.zeros(query.shape[:3], dtype=torch.int32, device=query.device)
        else:
            rho = _gradient_steps(matrix, right, lam, spec)
            iterations = torch.full_like(lse, _steps(spec), dtype=torch.int32)
        residual = (right - (matrix @ rho[..., None])[..., 0]).norm(dim=-1).detach()
    if rho is None:
        zeros = torch.zeros_like(lse)
        return ReferenceOutput(value_mean.to(query.dtype), lse, zeros, value_mean.to(query.dtype))

    probe_scores = rho @ keys.mT
    if covariance_mod is not None:
        probe_scores = covariance_mod(probe_scores)
    probe_scores = torch.where(allowed, probe_scores, 0.0)
    probe_mean = (weights * probe_scores).sum(-1)
    signed = 1 + probe_mean[..., None] - probe_scores if spec.intercept else probe_scores
    out = (weights * signed) @ values
    return ReferenceOutput(out.to(query.dtype), lse, probe_mean, value_mean.to(query.dtype), iterations, residual)


def _weights(
    queries: Tensor, keys: Tensor, spec: AttentionSpec, score_mod: DenseMod | None, allowed: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Weights ``p`` (rows with no allowed key: all 0) and their log normaliser."""
    some = allowed.any(-1, keepdim=True)
    if spec.bandwidth.kind == "infinite":
        count = allowed.sum(-1, keepdim=True).to(queries.dtype)
        # The query only gives shapes: connected, so that its gradient is zero rather than missing.
        weights = allowed.to(queries.dtype) / count.clamp(min=1) + queries[..., :0].sum(-1, keepdim=True)
        return weights, count.log()[..., 0]
    scores = (queries @ keys.mT) * (1 / math.sqrt(queries.size(-1)) if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores)
    # Where nothing may be read, nothing is: a NaN behind the mask must reach neither value nor gradient.
    scores = torch.where(allowed, scores, -float("inf"))
    # A score_mod may itself close a row, as a mask would.
    some = some & (scores > -float("inf")).any(-1, keepdim=True)
    safe = torch.where(some, scores, 0.0)
    if scores.size(-1) == 0:
        return safe, scores.new_full(scores.shape[:-1], -float("inf"))
    lse = torch.logsumexp(safe, -1, keepdim=True)
    weights = torch.where(allowed & some, torch.exp(safe - lse), 0.0)
    return weights, torch.where(some, lse, -float("inf"))[..., 0]


def _ridge(spec: AttentionSpec, ridge: Tensor | float | None, weights: Tensor, lse: Tensor) -> Tensor:
    """The ridge on normalised weights, ``[B, Hq, Lq]``."""
    given = spec.probe.ridge if ridge is None else ridge  # type: ignore[union-attr]
    lam = torch.as_tensor(given, dtype=weights.dtype, device=weights.device).expand(weights.shape[:3])
    if spec.probe.ridge_scale == "mean":  # type: ignore[union-attr]
        return lam
    # "sum": the ridge belongs to unnormalised weights, whose sum is e^lse (or the number of keys).
    return lam * torch.exp(-torch.where(lse.isinf(), 0.0, lse))


def _system(queries: Tensor, keys: Tensor, weights: Tensor, lam: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """``M = C + lam I`` and its right-hand side for each row: ``[B, Hq, Lq, D, D]``, ``[B, Hq, Lq, D]``."""
    identity = torch.eye(keys.size(-1), dtype=keys.dtype, device=keys.device)
    if intercept:
        mean = weights @ keys
        centred = keys[:, :, None] - mean[:, :, :, None]
        matrix = centred.mT @ (weights[..., None] * centred)
        right = mean - queries
    else:
        spread = keys[:, :, None]
        matrix = spread.mT @ (weights[..., None] * spread)
        right = queries
    return matrix + lam[..., None, None] * identity, right


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, right[..., None])[..., 0]


def _steps(spec: AttentionSpec) -> int:
    return spec.probe.steps  # type: ignore[union-attr]


def _gradient_steps(matrix: Tensor, right: Tensor, lam: Tensor, spec: AttentionSpec) -> Tensor:
    """``steps`` of ``rho <- rho - eta (M rho - b)`` from zero; ``eta`` defaults to ``1 / (lam + trace C)``."""
    step = spec.probe.step_size  # type: ignore[union-attr]
    if step is None:
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)  # of C + lam I: holds D lam too many
        eta = 1 / (trace - (matrix.size(-1) - 1) * lam)
    else:
        eta = torch.full_like(lam, step)
    rho = torch.zeros_like(right)
    for _ in range(_steps(spec)):
        rho = rho - eta[..., None] * ((matrix @ rho[..., None])[..., 0] - right)
    return rho
