"""The solve operator: the members with a solved probe, whose systems are solved and whose output is made in one stage.

Each row's system is ``M x = b`` with ``M = C + ridge I``: ``C = Cov_p(k, k)`` with intercept, else ``sum_j p_j k_j k_j^T``;
``p`` are the weights of the core. No row's matrix is ever formed.

The gradient is that of implicit differentiation (FAMILY, "Gradients"): with ``u = M^-1 dL/dx`` the operator is used again, its
``b`` now made from the gradient of the output, and what is left is the core's own backward for ``g.v_j + a.k_j`` in place of
``g.v_j``, where ``a = u`` (``-u`` without intercept). Its row terms hold no rounded number: as ``C u = dL/dx - ridge u``,

    beta = g.value_mean + a.key_mean + g_t,    beta - tau = -x.(ridge u + residual) + g_t (1 + t) + g_lse    (intercept)
    beta = -g_t,                                     -tau = -x.(ridge u + residual) + g_lse
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from . import dense
from .mod_operator import MASK, SCORE, ModOperator, statistics_dtype
from .operator import attention_backward, empty_in_layout_of, joint_graphs, once_differentiable
from .torch_compat_operator import indexing_by_tensors, save_values_for_backward, saved_values

Mod = Callable[..., Any]


def _solve_fake(
    query: Tensor, key: Tensor, value: Tensor | None, ridge: Tensor, grad_out: Tensor | None, probe: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = statistics_dtype(query), query.shape[:3]
    out = query.new_empty(0)
    if probe is None and value is not None:
        out = empty_in_layout_of(query.to(value.dtype), value.size(3))
    return (
        query.new_empty(query.shape, dtype=dtype),
        out,
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=torch.int32),
        query.new_empty(rows, dtype=dtype),
    )


attention_solve = ModOperator("parallax_attention_solve", dense.solve, _solve_fake, (SCORE, MASK))
"""Solve, forward or adjoint; see :func:`.dense.solve` for the meaning of the arguments and results."""


def _identity(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score


def _operands(*tensors: Tensor) -> list[Tensor]:
    """Queries and keys as the solver multiplies them: float16 has three bits more than bfloat16.

    Numbers of bfloat16 fit exactly up to 65504, which queries and keys do not reach.
    """
    return [tensor.to(torch.float16) if tensor.dtype == torch.bfloat16 else tensor for tensor in tensors]


class _SolveAutograd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        ridge: Tensor,
        graphs: tuple[tuple[Mod, Mod], tuple[Mod, Mod] | None],
        block_mask: tuple,
        switches: tuple[float, bool, dict[str, Any]],
        mask_buffers: tuple,
        *score_buffers: Any,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.graphs, ctx.mask_mod, ctx.switches = graphs, block_mask[-1], switches
        ctx.counts = (len(block_mask) - 1, len(score_buffers))
        with torch._C._AutoDispatchBelowAutograd():
            outputs = attention_solve(
                *_operands(query, key), value, ridge, None, None, None, None, graphs[0][0], block_mask, *switches,
                score_buffers, mask_buffers,
            )  # fmt: skip
        ctx.mark_non_differentiable(*outputs[4:])
        x, _, lse, mean = outputs[:4]
        tensors = (query, key, value, ridge, x, lse, mean, *block_mask[:-1], *score_buffers, *mask_buffers)
        save_values_for_backward(ctx, tensors)
        return outputs

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None, grad_lse: Any, grad_mean: Any, *_: Any
    ) -> tuple:
        query, key, value, ridge, x, lse, mean, *rest = saved_values(ctx)
        n_mask, n_score = ctx.counts
        block_mask, rest = (*rest[:n_mask], ctx.mask_mod), rest[n_mask:]
        score_buffers, mask_buffers = tuple(rest[:n_score]), tuple(rest[n_score:])
        fw_graphs, joints = ctx.graphs
        scale, intercept, solver = ctx.switches
        if grad_out is None:
            # No output was made here, or none is differentiated.
            solved, value = None, key if value is None else value
            grad_out = value.new_zeros((*query.shape[:3], value.size(3)))
        else:
            solved = value
        u, _, beta, offset, _, _ = attention_solve(
            *_operands(query, key), solved, ridge, None if solved is None else grad_out, x, grad_mean, grad_x,
            fw_graphs[0], block_mask, *ctx.switches, score_buffers, mask_buffers,
        )  # fmt: skip
        if grad_lse is not None:
            offset = offset + grad_lse
        if intercept:
            adjoint = u
            if grad_mean is not None:
                beta, offset = beta + grad_mean, offset + grad_mean * (1 + mean)
            tau = beta - offset
        else:
            adjoint, tau = -u, -offset
            beta = torch.zeros_like(tau) if grad_mean is None else -grad_mean
        needs = ctx.needs_input_grad
        options = {name: option for name, option in solver.items() if name not in ("tolerance", "max_iterations")}
        dq, dk, dv, _, score_grads, _ = attention_backward(
            query, key, value, x, grad_out, lse, mean, tau, beta, fw_graphs, joints, block_mask, scale, intercept,
            (needs[0], needs[1], needs[2], False), options, score_buffers, (), mask_buffers, grad_lse, None, adjoint,
        )  # fmt: skip
        if dq is not None:
            dq = (dq.to(u.dtype) - adjoint).to(query.dtype)
        dridge = -(u * x).sum(-1) if needs[3] else None
        return (dq, dk, dv, dridge, None, None, None, None, *score_grads)


@attention_solve.py_impl(DispatchKey.Autograd)
def _solve_autograd(*arguments: Any) -> Any:
    query, key, value, ridge, _, probe, _, _, score_mod, block_mask, *rest = arguments
    *switches, score_buffers, mask_buffers = rest
    if probe is not None:
        return once_differentiable(attention_solve, arguments)
    mods: tuple[Mod, Mod] = (score_mod, _identity)
    joints = None
    with indexing_by_tensors():
        differentiable = (query, key, value, ridge, *score_buffers)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in differentiable):
            mods, joints = joint_graphs(query, mods, (score_buffers, ()))
        return _SolveAutograd.apply(
            query, key, value, ridge, (mods, joints), block_mask, tuple(switches), mask_buffers, *score_buffers
        )


attention_solve.register_dynamo()
