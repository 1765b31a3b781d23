"""The operator's mathematics on whole score matrices: what runs under backends that do not lower it ("aot_eager").

This is the operator with explicit gradients, to check the formulas and the plumbing by themselves; the mathematics of
the family, differentiated by autograd, is :mod:`parallax_compile.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputTypeError
from .torch_compat_operator import result_problem, vectorize_mod

Mod = Callable[..., Any]


def _indices(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    sizes = (query.size(0), query.size(1), query.size(2), key.size(2))
    return tuple(torch.arange(size, device=query.device, dtype=torch.int) for size in sizes)


def _dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """Key or value heads repeated for the query heads that share them, in the accumulation dtype."""
    return tensor.repeat_interleave(query.size(1) // tensor.size(1), dim=1).to(_dtype(query))


def _modified(name: str, mod: Mod, raw: Tensor, index: tuple[Tensor, ...], captured: tuple) -> Tensor:
    modified = vectorize_mod(mod, n_buffers=len(captured))(raw, *index, *captured)
    # Checked when Dynamo traces the mod too; a call that it gave up on comes here unchecked.
    problem = result_problem(modified, is_mask=False, axes=raw.dim())
    if problem is not None:
        raise InputTypeError(f"{name} {problem}")
    return modified.to(raw.dtype)


def _scores(
    query: Tensor,
    key: Tensor,
    probe: Tensor | None,
    mods: tuple[Mod, Mod],
    block_mask: tuple,
    scale: float,
    buffers: tuple[tuple, tuple, tuple],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``raw1, raw2, s1, s2, keep``, each ``[B, Hq, Lq, Lk]``; masked scores are -inf and masked probe scores 0."""
    index = _indices(query, key)
    keys = _per_query_head(key, query).mT
    raw1 = (query.to(keys.dtype) @ keys) * scale
    raw2 = probe.to(keys.dtype) @ keys if probe is not None else torch.zeros_like(raw1)
    s1 = _modified("score_mod", mods[0], raw1, index, buffers[0])
    s2 = raw2
    if probe is not None:
        s2 = _modified("covariance_mod", mods[1], raw2, index, buffers[1])
    keep = vectorize_mod(block_mask[-1], n_buffers=len(buffers[2]), kind="mask")(*index, *buffers[2])
    keep = allowed_pairs(block_mask, keep, query.size(2), key.size(2))
    return raw1, raw2, torch.where(keep, s1, -float("inf")), torch.where(keep, s2, 0.0), keep


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None,
    score_mod: Mod,
    covariance_mod: Mod,
    block_mask: tuple,
    scale: float,
    intercept: bool,
    save_value_mean: bool,
    kernel_options: dict[str, Any],
    score_mod_buffers: tuple = (),
    covariance_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The core on dense scores.

    Args:
        query, probe: ``[B, Hq, Lq, D]``; ``probe`` is None for the zero probe.
        key: ``[B, Hkv, Lk, D]``; value: ``[B, Hkv, Lk, Dv]``.
        score_mod, covariance_mod: mods over 0-dim tensors, applied to ``scale * q.k`` and ``r.k``.
        block_mask: fields of :class:`~.operator.BlockMaskOperands`.
        intercept: whether ``out = value mean - covariance`` (True) or the uncentred sum (False).
        save_value_mean: whether the backward will need the value mean.
        *_buffers: the tensors captured by each mod.

    Returns:
        ``out [B, Hq, Lq, Dv]`` in query's dtype, ``value_mean`` like ``out`` (or empty), and ``lse`` (natural log) and
        ``probe_mean``, each ``[B, Hq, Lq]`` float32 (float64 for float64 inputs).
    """
    buffers = (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)
    _, _, s1, s2, _ = _scores(query, key, probe, (score_mod, covariance_mod), block_mask, scale, buffers)
    lse = s1.logsumexp(-1)
    weights = torch.exp(s1 - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    probe_mean = (weights * s2).sum(-1)
    values = _per_query_head(value, query)
    signed = weights
    if probe is not None:
        signed = weights * (1 + probe_mean[..., None] - s2) if intercept else weights * s2
    out = (signed @ values).to(query.dtype)
    value_mean = (weights @ values).to(query.dtype) if save_value_mean else query.new_empty(0)
    return in_layout_of(query, out), in_layout_of(query, value_mean) if save_value_mean else value_mean, lse, probe_mean


def solve(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    ridge: Tensor,
    grad_out: Tensor | None,
    probe: Tensor | None,
    grad_mean: Tensor | None,
    right: Tensor | None,
    score_mod: Mod,
    block_mask: tuple,
    scale: float,
    intercept: bool,
    solver: dict[str, Any],
    score_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows' ridge systems ``M x = b`` on dense scores, by a direct solve (0 iterations).

    Without ``probe`` (forward) ``b`` is the member's own: ``mean key - query`` with intercept, else ``query``. With it, the
    solution found then, the call is the adjoint: ``b`` is the gradient of the solution, the sum of what is given.

    Args:
        query: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``.
        value: ``[B, Hkv, Lk, Dv]``, or None where the output is made elsewhere (of a covariance_mod).
        ridge: ``[B, Hq, Lq]``, positive, on normalised weights.
        grad_out, grad_mean: adjoint: gradients of the output (with ``value``) and of ``t``; None is 0.
        probe: adjoint: the solution, ``[B, Hq, Lq, D]`` in the dtype of the statistics.
        right: adjoint: a gradient of the solution from elsewhere; None is 0.
        score_mod, block_mask, scale, intercept, *_buffers: as in :func:`forward`.
        solver: ``tolerance`` and ``max_iterations``, beside the user's kernel options.

    Returns:
        ``x [B, Hq, Lq, D]``; the output ``[B, Hq, Lq, Dv]`` (forward with ``value``, else empty); two row terms ``[B, Hq,
        Lq]``, forward LSE and ``t = x.mean key``, adjoint ``beta`` and ``offset`` of :mod:`.solve` but for the gradients of LSE
        and ``t``; iterations (int32) and the norm of ``b - M x``. All but the output in the dtype of the statistics.
    """
    buffers = (score_mod_buffers, (), mask_mod_buffers)
    _, _, s1, _, _ = _scores(query, key, None, (score_mod, score_mod), block_mask, scale, buffers)
    lse = s1.logsumexp(-1)
    weights = torch.exp(s1 - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    keys, queries = _per_query_head(key, query), query.to(weights.dtype)
    mean = weights @ keys
    centred = keys[:, :, None] - mean[:, :, :, None] if intercept else keys[:, :, None]
    matrix = centred.mT @ (weights[..., None] * centred)
    matrix = matrix + ridge[..., None, None] * torch.eye(key.size(3), dtype=matrix.dtype, device=key.device)
    moment = torch.zeros_like(lse)
    if probe is None:
        b = mean - queries if intercept else queries
    else:
        b = torch.zeros_like(mean) if right is None else right
        if grad_out is not None and value is not None:
            signed = weights * (grad_out.to(weights.dtype) @ _per_query_head(value, query).mT)
            moment = signed.sum(-1)
            found = signed @ keys
            b = b + (moment[..., None] * mean - found if intercept else found)
        if grad_mean is not None:
            b = b + grad_mean[..., None] * mean
    x = torch.linalg.solve(matrix, b[..., None])[..., 0].contiguous()
    error = b - (matrix @ x[..., None])[..., 0]
    along = (x * mean).sum(-1)
    out = query.new_empty(0)
    if probe is None:
        first, second = lse, along
        if value is not None:
            scores = x @ keys.mT
            signed = weights * (1 + along[..., None] - scores if intercept else scores)
            out = in_layout_of(query, (signed @ _per_query_head(value, query)).to(value.dtype))
    else:
        offset = ridge[..., None] * x + error
        first, second = moment + along, -(probe * (offset if right is None else offset - right)).sum(-1)
    iterations = torch.zeros(query.shape[:3], dtype=torch.int32, device=query.device)
    return x, out, first, second, iterations, error.norm(dim=-1)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probe: Tensor | None,
    grad_out: Tensor,
    lse: Tensor,
    probe_mean: Tensor,
    tau: Tensor,
    beta: Tensor,
    fw_graphs: tuple[Mod, Mod],
    joint_graphs: tuple[Mod, Mod],
    block_mask: tuple,
    scale: float,
    intercept: bool,
    needs_grad: tuple[bool, bool, bool, bool],
    kernel_options: dict[str, Any],
    score_mod_buffers: tuple = (),
    covariance_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
    score_grad_sum: Tensor | None = None,
    probe_score_grad_sum: Tensor | None = None,
    adjoint: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple, tuple]:
    """Gradients of :func:`forward` from its row statistics and the row terms of :func:`~.operator.row_terms`.

    ``adjoint a [B, Hq, Lq, D]`` adds the gradient of a second output whose values are the keys and whose gradient is ``a``:
    that of a solved probe (:mod:`.solve`).

    Returns:
        ``dq, dk, dv, dprobe`` (None where ``needs_grad`` says so) and the gradients of the tensors captured by each mod.
    """
    buffers = (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)
    raw1, raw2, s1, s2, keep = _scores(query, key, probe, fw_graphs, block_mask, scale, buffers)
    dtype = raw1.dtype
    weights = torch.exp(s1 - torch.where(lse.isneginf(), float("inf"), lse)[..., None])
    grad = grad_out.to(dtype)
    products = grad @ _per_query_head(value, query).mT
    if adjoint is not None:
        products = products + adjoint.to(dtype) @ _per_query_head(key, query).mT
    tau, beta, mean = tau[..., None], beta[..., None], probe_mean[..., None]
    ds2 = torch.zeros_like(weights)
    if probe is None:
        signed, ds1 = weights, weights * (products - tau)
    elif intercept:
        signed = weights * (1 + mean - s2)
        ds1 = weights * ((products - tau) + (mean - s2) * (products - beta))
        ds2 = -weights * (products - beta)
    else:
        signed = weights * s2
        ds1 = weights * (s2 * (products - beta) - tau)
        ds2 = weights * (products - beta)

    index = _indices(query, key)

    def through(joint: Mod, raw: Tensor, ds: Tensor, captured: tuple) -> tuple[Tensor, tuple]:
        grads = vectorize_mod(joint, n_buffers=len(captured), kind="joint")(raw, *index, ds, *captured)
        return torch.where(keep, grads[0], 0.0), tuple(
            g.to(buffer.dtype) if isinstance(g, Tensor) else None for g, buffer in zip(grads[5:], captured, strict=True)
        )

    draw1, score_grads = through(joint_graphs[0], raw1, ds1, score_mod_buffers)
    draw2, covariance_grads = torch.zeros_like(draw1), (None,) * len(covariance_mod_buffers)
    if probe is not None:
        draw2, covariance_grads = through(joint_graphs[1], raw2, ds2, covariance_mod_buffers)
    draw1 = draw1 * scale

    def per_key_head(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (key.size(1), query.size(1) // key.size(1))).sum(2)

    keys = _per_query_head(key, query)
    dk = draw1.mT @ query.to(dtype)
    if probe is not None:
        dk = dk + draw2.mT @ probe.to(dtype)
    if adjoint is not None:
        dk = dk + signed.mT @ adjoint.to(dtype)
    full = (draw1 @ keys, per_key_head(dk), per_key_head(signed.mT @ grad), draw2 @ keys)
    grads = tuple(
        in_layout_of(like, g.to(like.dtype)) if needed and like is not None else None
        for g, like, needed in zip(full, (query, key, value, probe), needs_grad, strict=True)
    )
    return grads[0], grads[1], grads[2], grads[3], score_grads, covariance_grads


def in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """``result`` in the memory layout that the operator's fake promises: heads inside the length where ``like`` has them so."""
    if like.stride(1) < like.stride(2):
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    return result.contiguous()


def allowed_pairs(block_mask: tuple, keep: Tensor, q_length: int, kv_length: int) -> Tensor:
    """Which pairs a block mask allows: all of a full block, those of ``mask_mod`` in a partial one, none elsewhere.

    Args:
        block_mask: fields of :class:`~.operator.BlockMaskOperands`.
        keep: what ``mask_mod`` says, bool, broadcastable to ``[B, Hq, Lq, Lk]``.

    Returns:
        bool ``[Bm, Hm, Lq, Lk]``, broadcastable to ``[B, Hq, Lq, Lk]``.
    """
    counts, indices, full_counts, full_indices = block_mask[:4]
    if counts is None:
        return keep

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        position = torch.arange(indices.size(-1), device=indices.device)
        blocks = torch.zeros((*indices.shape[:-1], indices.size(-1) + 1), dtype=torch.bool, device=indices.device)
        # Entries past the count point at the extra column, which is dropped.
        used = torch.where(position < counts[..., None], indices.long(), indices.size(-1))
        blocks = blocks.scatter(-1, used, True)[..., :-1]
        rows = blocks.repeat_interleave(block_mask[8], dim=-2)[..., :q_length, :]
        return rows.repeat_interleave(block_mask[9], dim=-1)[..., :kv_length]

    allowed = listed(counts, indices) & keep
    return allowed if full_counts is None else allowed | listed(full_counts, full_indices)
