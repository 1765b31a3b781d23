"""A call of ``attention`` as plain torch code that torch-mlir imports: dense, or blockwise.

Dense is the reference itself, with a solver that can be imported. Blockwise is one pass over blocks of keys with running row
statistics, unrolled, whose gradients are the family's own formulas over the same blocks (FAMILY, "Streaming" and
"Gradients"), so that no graph holds a whole score matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, InputTypeError
from ...reference import ReferenceOutput
from ...reference import attention as reference_attention
from ...spec import AttentionSpec
from ..torch_compat_operator import result_problem, vectorize_mod
from . import solver

__all__ = ["Declared", "blockwise", "dense"]

Mod = Callable[..., Tensor]


class Declared(NamedTuple):
    """A checked call, with the mods of spec and call composed and every mask in one ``mask_mod``.

    Attributes:
        query: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]``; probe: like query, or None.
        ridge: the call's, broadcastable to ``[B, Hq, Lq]``; None is the spec's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    probe: Tensor | None
    spec: AttentionSpec
    score_mod: Mod | None
    covariance_mod: Mod | None
    mask_mod: Mod | None
    scale: float | None
    ridge: Tensor | float | None


def _lifted(name: str, mod: Mod | None) -> Mod | None:
    """A mod over scores and index vectors, its result checked."""
    if mod is None:
        return None
    is_mask = name == "mask_mod"
    vectorized = vectorize_mod(mod, kind="mask" if is_mask else "score")

    def run(*arguments: Tensor) -> Tensor:
        result = vectorized(*arguments)
        problem = result_problem(result, is_mask=is_mask, axes=4)
        if problem is not None:
            raise InputTypeError(f"{name} {problem}")
        return result if is_mask else result.to(arguments[0].dtype)

    return run


def _row_indices(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows = (torch.arange(n, dtype=torch.int32, device=query.device) for n in query.shape[:3])
    return batch, heads, rows


# --- dense ----------------------------------------------------------------------------------------------------------


def dense(call: Declared) -> ReferenceOutput:
    """The reference on whole score matrices ``[B, Hq, Lq, Lk]``."""
    index = (*_row_indices(call.query), torch.arange(call.key.size(2), dtype=torch.int32, device=call.query.device))

    def over_scores(name: str, mod: Mod | None) -> Callable[[Tensor], Tensor] | None:
        run = _lifted(name, mod)
        return None if run is None else lambda scores: run(scores, *index)

    mask = _lifted("mask_mod", call.mask_mod)
    return reference_attention(
        call.query,
        call.key,
        call.value,
        call.probe,
        spec=call.spec,
        score_mod=over_scores("score_mod", call.score_mod),
        covariance_mod=over_scores("covariance_mod", call.covariance_mod),
        mask=None if mask is None else mask(*index),
        scale=call.scale,
        ridge=call.ridge,
        solve=solver.solve,
    )


# --- blockwise ------------------------------------------------------------------------------------------------------


def blockwise(call: Declared, block_size: int) -> Tensor:
    """``out [B, Hq, Lq, Dv]`` by one pass over blocks of ``block_size`` keys for each product with the weights.

    Raises:
        InputError: the number of keys is not known, so that the blocks cannot be unrolled.
    """
    if not isinstance(call.key.size(2), int):
        raise InputError(
            "the blockwise form unrolls the blocks of keys, so the key length must be static. "
            'Use form="dense", or form="streaming" for a loop.'
        )
    dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query, key, value = (tensor.to(dtype) for tensor in (call.query, call.key, call.value))
    probe = None if call.probe is None else call.probe.to(dtype)
    spec = call.spec
    setting = _Setting(
        block_size=block_size,
        scale=1 / math.sqrt(query.size(3)) if call.scale is None else call.scale,
        uniform=spec.bandwidth.kind == "infinite",
        intercept=spec.intercept,
        score_mod=_lifted("score_mod", call.score_mod),
        covariance_mod=None,
        mask_mod=_lifted("mask_mod", call.mask_mod),
    )
    if spec.probe.kind in ("solved", "gradient"):
        probe = _found_probe(query, key, call, setting)
    setting = setting._replace(covariance_mod=_lifted("covariance_mod", call.covariance_mod))
    return _core(query, key, value, probe, setting)[0].to(call.query.dtype)


class _Setting(NamedTuple):
    """What the core depends on beside its tensors; mods are over blocks of scores."""

    block_size: int
    scale: float
    uniform: bool
    intercept: bool
    score_mod: Mod | None
    covariance_mod: Mod | None
    mask_mod: Mod | None


def _core(query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, setting: _Setting) -> tuple[Tensor, Tensor]:
    """``out`` and the LSE ``[B, Hq, Lq]``, both differentiable."""
    out, lse, _, _ = _Core.apply(query, key, value, probe, setting)
    return out, lse


def _blocks(key: Tensor, size: int) -> list[slice]:
    length = key.size(2)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor.repeat_interleave(query.size(1) // tensor.size(1), dim=1)


def _scores(
    query: Tensor, probe: Tensor | None, keys: Tensor, first: int, setting: _Setting
) -> tuple[Tensor, Tensor | None]:
    """``s1, s2 [B, Hq, Lq, N]`` of one block of keys ``[B, Hkv, N, D]``; not allowed: s1 -inf, s2 0."""
    index = (*_row_indices(query), first + torch.arange(keys.size(2), dtype=torch.int32, device=keys.device))
    across = _per_query_head(keys, query).mT
    s1 = query.new_zeros((*query.shape[:3], keys.size(2))) if setting.uniform else (query @ across) * setting.scale
    if setting.score_mod is not None:
        s1 = setting.score_mod(s1, *index)
    s2 = None if probe is None else probe @ across
    if s2 is not None and setting.covariance_mod is not None:
        s2 = setting.covariance_mod(s2, *index)
    if setting.mask_mod is not None:
        keep = setting.mask_mod(*index)
        s1 = torch.where(keep, s1, -float("inf"))
        s2 = None if s2 is None else torch.where(keep, s2, 0.0)
    return s1, s2


class _Core(torch.autograd.Function):
    """One pass over the keys, and one more for the gradients: ``(out, lse, probe mean, value mean)``."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, setting: _Setting
    ) -> tuple[Tensor, ...]:
        rows = (*query.shape[:3], 1)
        largest = query.new_full(rows, -float("inf"))
        d1, d2 = query.new_zeros(rows), query.new_zeros(rows)
        o1 = query.new_zeros((*query.shape[:3], value.size(3)))
        o2 = torch.zeros_like(o1)
        for block in _blocks(key, setting.block_size):
            s1, s2 = _scores(query, probe, key[:, :, block], block.start, setting)
            values = _per_query_head(value[:, :, block], query)
            risen = torch.maximum(largest, s1.amax(-1, keepdim=True))
            # A row that has met no key yet stays at -inf, from which nothing may be subtracted.
            level = torch.where(risen == -float("inf"), 0.0, risen)
            decay, weights = torch.exp(largest - level), torch.exp(s1 - level)
            d1 = decay * d1 + weights.sum(-1, keepdim=True)
            o1 = decay * o1 + weights @ values
            if s2 is not None:
                weighted = weights * s2
                d2 = decay * d2 + weighted.sum(-1, keepdim=True)
                o2 = decay * o2 + weighted @ values
            largest = risen
        empty = d1 == 0
        total = torch.where(empty, 1.0, d1)
        mean, value_mean = d2 / total, o1 / total
        out = value_mean.clone()  # each output is a tensor of its own
        if probe is not None:
            out = value_mean * (1 + mean) - o2 / total if setting.intercept else o2 / total
        lse = torch.where(empty, -float("inf"), largest + total.log())
        return out, lse[..., 0], mean[..., 0], value_mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.setting = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        query, key, value, probe, out, lse, mean, value_mean = ctx.saved_tensors
        setting: _Setting = ctx.setting
        lse, mean, grad_lse = lse[..., None], mean[..., None], grad_lse[..., None]
        level = torch.where(lse == -float("inf"), float("inf"), lse)  # rows without a key weigh nothing
        tau = (grad_out * out).sum(-1, keepdim=True)
        beta = (grad_out * value_mean).sum(-1, keepdim=True)
        grad_query = torch.zeros_like(query)
        grad_probe = None if probe is None else torch.zeros_like(probe)
        grad_keys, grad_values = [], []
        for block in _blocks(key, setting.block_size):
            keys, values = key[:, :, block], value[:, :, block]
            with torch.enable_grad():
                of: list[Any] = [None if x is None else x.detach().requires_grad_() for x in (query, probe, keys)]
                s1, s2 = _scores(of[0], of[1], of[2], block.start, setting)
            weights = torch.exp(s1.detach() - level)
            along = grad_out @ _per_query_head(values, query).mT
            if s2 is None:
                signed, ds = weights, [along - tau]
            elif setting.intercept:
                below, above = mean - s2.detach(), along - beta
                signed, ds = weights * (1 + below), [along - tau + below * above, -above]
            else:
                signed, ds = weights * s2.detach(), [s2.detach() * along - tau, along]
            ds[0] = ds[0] + grad_lse
            found = _pulled([s1, s2], [weights * part for part in ds], of)
            grad_query = grad_query + found[0]
            grad_probe = None if grad_probe is None else grad_probe + found[1]
            grad_keys.append(found[2])
            grouped = (signed.mT @ grad_out).unflatten(1, (key.size(1), query.size(1) // key.size(1)))
            grad_values.append(grouped.sum(2))
        return grad_query, torch.cat(grad_keys, 2), torch.cat(grad_values, 2), grad_probe, None


def _pulled(results: Sequence[Tensor | None], grads: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of the results with respect to the inputs; zeros where there is no way from one to the other."""
    pairs = [(x, g) for x, g in zip(results, grads, strict=False) if x is not None and x.requires_grad]
    given = [x for x in inputs if x is not None]
    if pairs:
        outputs, weights = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, given, weights, materialize_grads=True))
    else:
        found = iter(torch.zeros_like(x) for x in given)
    return [torch.zeros(()) if x is None else next(found) for x in inputs]


# --- probes in front of the core ------------------------------------------------------------------------------------


def _found_probe(query: Tensor, key: Tensor, call: Declared, setting: _Setting) -> Tensor:
    """The solved or gradient probe over the core alone, whose product with the keys in the values' place is ``M x``."""
    kind: Any = call.spec.probe
    ridge = kind.ridge if call.ridge is None else call.ridge
    lam = ridge.to(query.dtype) if isinstance(ridge, Tensor) else query.new_full((), ridge)
    lam = lam.expand(query.shape[:3])
    if kind.ridge_scale == "sum":
        lse = _core(query, key, key[..., :1], None, setting)[1]
        lam = lam * torch.exp(-torch.where(lse == -float("inf"), 0.0, lse))

    def error(x: Tensor | None) -> Tensor:
        """``b - M x``; None is 0."""
        if setting.intercept:
            rest = _core(query, key, key, x, setting)[0] - query
        else:
            rest = query if x is None else query - _core(query, key, key, x, setting)[0]
        return rest if x is None else rest - lam[..., None] * x

    if kind.kind == "solved":
        matrix = _covariance(query.detach(), key.detach(), setting)
        identity = torch.eye(key.size(3), dtype=key.dtype, device=key.device)
        inverse = solver.inverse(matrix + lam.detach()[..., None, None] * identity)
        return solver.refined(inverse, error(None), error)
    step = kind.step_size
    eta = 1.0 / (lam + _trace(query, key, setting)) if step is None else torch.full_like(lam, step)
    x = eta[..., None] * error(None)
    for _ in range(kind.steps - 1):
        x = x + eta[..., None] * error(x)
    return x


def _centred(key: Tensor, setting: _Setting) -> Tensor:
    """Keys about their mean, which a covariance does not see and whose square would drown the rest."""
    return key - key.detach().mean(2, keepdim=True) if setting.intercept else key


def _covariance(query: Tensor, key: Tensor, setting: _Setting) -> Tensor:
    """``Cov_p(k, k)`` with intercept, ``sum_j p_j k_j k_j^T`` without: ``[B, Hq, Lq, D, D]``."""
    width = key.size(3)
    centred = _centred(key, setting)
    squares = (centred[..., :, None] * centred[..., None, :]).flatten(3)
    moments = _core_over(query, key, torch.cat([squares, centred], 3), setting)
    matrix = moments[..., : width * width].unflatten(3, (width, width))
    if not setting.intercept:
        return matrix
    mean = moments[..., width * width :]
    return matrix - mean[..., :, None] * mean[..., None, :]


def _trace(query: Tensor, key: Tensor, setting: _Setting) -> Tensor:
    """The trace of :func:`_covariance`, ``[B, Hq, Lq]``."""
    centred = _centred(key, setting)
    moments = _core_over(query, key, torch.cat([centred.square().sum(-1, keepdim=True), centred], 3), setting)
    trace = moments[..., 0]
    return trace - moments[..., 1:].square().sum(-1) if setting.intercept else trace


def _core_over(query: Tensor, key: Tensor, value: Tensor, setting: _Setting) -> Tensor:
    """Weighted means of ``value``: the core without a probe."""
    return _core(query, key, value, None, setting._replace(intercept=True))[0]
