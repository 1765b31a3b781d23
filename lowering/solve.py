"""The solve operator: each row's ridge system on the weighted covariance of its keys, never formed.

``M x = b`` with ``M = C + ridge I``: ``C = Cov_p(k, k)`` with intercept, else ``sum_j p_j k_j k_j^T``; ``p`` are the weights of
the core. It is the stage in front of the core for members with a solved probe (:mod:`.probes`), and by symmetry of ``M`` its
own derivative: the gradient of ``x`` with respect to ``b`` solves the same systems. Gradients that reach ``M`` through keys,
queries, mods and ridge are the caller's, by implicit differentiation (FAMILY, "Gradients").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from . import dense
from .operator import example_arguments, record_node, statistics_dtype
from .torch_compat import (
    HigherOrderOperator,
    ProxyTorchDispatchMode,
    UnsupportedAliasMutationException,
    functionalized_mutates,
    redirect_checkpointing_modes,
    register_dynamo_operator,
    register_fake,
    save_values_for_backward,
    saved_values,
    trace_mod,
    validate_subgraph_args_types,
)

Mod = Callable[..., Any]


class AttentionSolve(HigherOrderOperator):
    """``(x, iterations, residual)`` of the rows' systems."""

    def __init__(self) -> None:
        super().__init__("parallax_attention_solve", cacheable=True)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        right: Tensor | None,
        known: Tensor | None,
        ridge: Tensor,
        score_mod: Mod,
        block_mask: tuple,
        scale: float,
        intercept: bool,
        solver: dict[str, Any],
        score_mod_buffers: tuple = (),
        mask_mod_buffers: tuple = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solve.

        Args:
            query: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``.
            right: ``b [B, Hq, Lq, D]`` in the dtype of the statistics; None is the member's own, ``mean key - query`` with
                intercept and ``query`` without.
            known: the solution for ``right``, found before: it comes back as it is, with a gradient for ``right``.
            ridge: ``[B, Hq, Lq]``, positive, on normalised weights.
            score_mod, block_mask, scale, intercept: as for the core.
            solver: ``tolerance`` and ``max_iterations``, beside the user's kernel options.

        Returns:
            ``x [B, Hq, Lq, D]``, ``iterations [B, Hq, Lq]`` int32 and the norm of ``b - M x``, ``[B, Hq, Lq]``; float32
            (float64 for float64 inputs).
        """
        validate_subgraph_args_types((*score_mod_buffers, *mask_mod_buffers))
        return super().__call__(
            query, key, right, known, ridge, score_mod, block_mask, scale, intercept, solver,
            score_mod_buffers, mask_mod_buffers,
        )  # fmt: skip


attention_solve = AttentionSolve()
attention_solve.py_impl(DispatchKey.CompositeExplicitAutograd)(dense.solve)


@register_fake(attention_solve)
def _solve_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(query)
    rows = query.shape[:3]
    return (
        query.new_empty(query.shape, dtype=dtype),
        query.new_empty(rows, dtype=torch.int32),
        query.new_empty(rows, dtype=dtype),
    )


@attention_solve.py_impl(ProxyTorchDispatchMode)
def _solve_proxy(
    mode: Any,
    query: Tensor,
    key: Tensor,
    right: Tensor | None,
    known: Tensor | None,
    ridge: Tensor,
    score_mod: Mod,
    block_mask: tuple,
    scale: float,
    intercept: bool,
    solver: dict[str, Any],
    score_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> Any:
    tensors, switches = (query, key, right, known, ridge), (scale, intercept, solver)
    buffers = (score_mod_buffers, mask_mod_buffers)
    example = attention_solve(*tensors, score_mod, block_mask, *switches, *buffers)
    score = trace_mod(score_mod, *example_arguments(query), *score_mod_buffers)
    mask = trace_mod(block_mask[-1], *example_arguments(query, score=False), *mask_mod_buffers)
    arguments = (*tensors, score, (*block_mask[:-1], mask), *switches, *buffers)
    return record_node(mode, attention_solve, arguments, example, {"score_mod": score, "mask_mod": mask})


@attention_solve.py_functionalize_impl
def _solve_functionalize(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    right: Tensor | None,
    known: Tensor | None,
    ridge: Tensor,
    score_mod: Mod,
    block_mask: tuple,
    scale: float,
    intercept: bool,
    solver: dict[str, Any],
    score_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> Any:
    tensors = ctx.unwrap_tensors((query, key, right, known, ridge))
    block_mask = ctx.unwrap_tensors(block_mask)
    buffers = [ctx.unwrap_tensors(captured) for captured in (score_mod_buffers, mask_mod_buffers)]
    with ctx.redispatch_to_next():
        if functionalized_mutates(ctx, score_mod, [*example_arguments(tensors[0]), *buffers[0]]):
            raise UnsupportedAliasMutationException("score_mod writes into a tensor; mods must be pure functions")
        out = attention_solve(  # type: ignore[call-arg]
            *tensors,
            ctx.functionalize(score_mod),
            (*block_mask[:-1], ctx.functionalize(block_mask[-1])),
            scale,
            intercept,
            solver,
            *buffers,
        )
    return ctx.wrap_tensors(out)


redirect_checkpointing_modes(attention_solve)


class _SolveAutograd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        right: Tensor | None,
        known: Tensor | None,
        ridge: Tensor,
        score_mod: Mod,
        block_mask: tuple,
        switches: tuple[float, bool, dict[str, Any]],
        n_score_buffers: int,
        *buffers: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        captured = (tuple(buffers[:n_score_buffers]), tuple(buffers[n_score_buffers:]))
        if known is not None:
            rows = known.shape[:3]
            outputs = (known.view_as(known), known.new_zeros(rows, dtype=torch.int32), known.new_zeros(rows))
        else:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = attention_solve(query, key, right, None, ridge, score_mod, block_mask, *switches, *captured)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.score_mod, ctx.mask_mod, ctx.switches = score_mod, block_mask[-1], switches
        ctx.counts = (len(block_mask) - 1, n_score_buffers)
        save_values_for_backward(ctx, (query, key, ridge, *block_mask[:-1], *buffers))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:  # type: ignore[override]
        query, key, ridge, *rest = saved_values(ctx)
        n_mask, n_score = ctx.counts
        block_mask, buffers = (*rest[:n_mask], ctx.mask_mod), rest[n_mask:]
        captured = (tuple(buffers[:n_score]), tuple(buffers[n_score:]))
        wanted = None
        if ctx.needs_input_grad[2]:
            scale, intercept, solver = ctx.switches
            solution = attention_solve(
                query, key, grad, None, ridge, ctx.score_mod, block_mask, scale, intercept, solver, *captured
            )
            wanted = solution[0]
        return (None, None, wanted, *(None,) * (6 + len(buffers)))


@attention_solve.py_impl(DispatchKey.Autograd)
def _solve_autograd(
    query: Tensor,
    key: Tensor,
    right: Tensor | None,
    known: Tensor | None,
    ridge: Tensor,
    score_mod: Mod,
    block_mask: tuple,
    scale: float,
    intercept: bool,
    solver: dict[str, Any],
    score_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> Any:
    return _SolveAutograd.apply(
        query,
        key,
        right,
        known,
        ridge,
        score_mod,
        block_mask,
        (scale, intercept, solver),
        len(score_mod_buffers),
        *score_mod_buffers,
        *mask_mod_buffers,
    )


def _before_trace() -> None:
    from . import register_lowerings

    register_lowerings()


register_dynamo_operator(
    attention_solve,
    mods={5: "score_mod", 6: "mask_fn"},
    names={5: "score_mod", 6: "mask_mod"},
    on_trace=_before_trace,
)
