"""Oracles and error budgets for kernel tests.

``low_precision`` is an independent computation that shares nothing with the package: plain torch operations with operands
and products in the tested dtype, gradients by autograd. A kernel passes when its error against float64 is within twice
that computation's error plus the dtype's rounding band.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|`` in float64 over the finite entries; inf when the non-finite ones differ."""
    got, want = got.double(), want.double()
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite) or not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    norm = want[finite].norm()
    difference = (got[finite] - want[finite]).norm()
    return float(difference if norm == 0 else difference / norm)


def low_precision(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None = None,
    *,
    intercept: bool = True,
    score: Callable[..., Tensor] | None = None,
    covariance: Callable[..., Tensor] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The member by its definition, products in the inputs' dtype, softmax in float32 (float64 for float64)."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    batch, heads, rows, columns = query.size(0), query.size(1), query.size(2), key.size(2)
    index = (
        torch.arange(batch, device=query.device)[:, None, None, None],
        torch.arange(heads, device=query.device)[:, None, None],
        torch.arange(rows, device=query.device)[:, None],
        torch.arange(columns, device=query.device),
    )
    scores = (query @ key.mT).to(wide) * (query.size(-1) ** -0.5 if scale is None else scale)
    if score is not None:
        scores = score(scores, *index)
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=query.device)
    mask = mask.expand(scores.shape)
    empty = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(empty, 0.0, scores.masked_fill(~mask, -float("inf"))), -1)
    weights = torch.where(mask, weights, 0.0)
    if probe is None:
        return weights.to(value.dtype) @ value
    probes = (probe @ key.mT).to(wide)
    if covariance is not None:
        probes = covariance(probes, *index)
    probes = torch.where(mask, probes, 0.0)
    if not intercept:
        return (weights * probes).to(value.dtype) @ value
    mean = (weights * probes).sum(-1, keepdim=True)
    return (weights * (1 + mean - probes)).to(value.dtype) @ value


def jvp_oracle(query: Tensor, key: Tensor, value: Tensor, probe: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Parallax without a formula of its own: ``f(q) - d/de f(q + e r / scale)`` with ``f`` plain softmax attention."""
    group = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

    def softmax_attention(q: Tensor) -> Tensor:
        scores = q @ key.mT * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -float("inf"))
        return torch.softmax(scores, -1) @ value

    out, tangent = torch.func.jvp(softmax_attention, (query,), (probe / scale,))
    return out - tangent


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], captured: Sequence[Tensor] = (), seed: int = 1
) -> list[Tensor]:
    """Output and gradients of ``(out * w).sum()`` with respect to every input that requires one, then the captured."""
    out = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    wanted = [tensor for tensor in (*inputs, *captured) if tensor is not None and tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, weights)]


def budget(low_precision_error: float, dtype: torch.dtype) -> float:
    """Twice the error of an independent computation in the dtype, and twice the dtype's rounding."""
    return 2.0 * (low_precision_error + ROUNDING[dtype])


def leaves(inputs: Sequence[Tensor | None], dtype: torch.dtype, requires_grad: bool = True) -> list[Any]:
    """Copies of ``inputs`` in ``dtype``, of the same memory layout, as leaves of a new graph."""
    return [
        None if tensor is None else tensor.detach().to(dtype, copy=True).requires_grad_(requires_grad)
        for tensor in inputs
    ]
