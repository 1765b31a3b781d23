"""The operator: one higher-order operator for the whole core, forward and backward.

``torch.compile``, AOTAutograd, fake tensors, functionalization, activation checkpointing and ``torch.export`` see one node,
:data:`attention_forward`, with the mods as subgraphs and their captured tensors as operands; Inductor lowers it through
:mod:`.inductor`. The members of the family are switches of this node (no probe, no intercept), not other operators.

Shapes: ``query, probe [B, Hq, Lq, D]``, ``key [B, Hkv, Lk, D]``, ``value [B, Hkv, Lk, Dv]``. The formulas are those of
FAMILY ("Gradients"); ``tau`` and ``beta`` fold the row terms and the gradients of the auxiliary outputs together:

    ======================  ============================  ==================================================
    member                  row terms                     score gradients (A = g v^T, p the weights)
    ======================  ============================  ==================================================
    probe, intercept        tau = g.out - g_lse           ds1 = p ((A - tau) + (t - s2)(A - beta))
                            beta = g.value_mean + g_t     ds2 = -p (A - beta)
    probe, no intercept     tau = g.out - g_lse + t g_t   ds1 = p (s2 (A - beta) - tau)
                            beta = -g_t                   ds2 = p (A - beta)
    no probe                tau = g.out - g_lse           ds1 = p (A - tau)
    ======================  ============================  ==================================================

A row's ``ds1`` sum to ``g_lse``, and with intercept its ``ds2`` to ``g_t``, both usually 0: the backward gets the two sums
(``score_grad_sum``, ``probe_score_grad_sum``; None is 0), against which low-precision kernels settle their rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import DispatchKey

from . import dense
from .mod_graphs import differentiated_buffers
from .mod_operator import COVARIANCE, MASK, SCORE, ModOperator, ModPlace, example_arguments, statistics_dtype
from .torch_compat_operator import create_fw_bw_graph, indexing_by_tensors, save_values_for_backward, saved_values

__all__ = [
    "BlockMaskOperands",
    "attention_backward",
    "attention_forward",
    "empty_in_layout_of",
    "joint_graphs",
    "once_differentiable",
    "row_terms",
    "statistics_dtype",
]

Mod = Callable[..., Any]


class BlockMaskOperands(NamedTuple):
    """A block mask as the operator carries it: our own tuple, because torch's ``BlockMask.as_tuple`` changes length.

    The tensors are int32, ``[Bm, Hm, blocks]`` (counts) and ``[Bm, Hm, blocks, blocks]`` (indices), with ``Bm``, ``Hm``
    1 or the batch and query-head counts. All are None when every block is to be visited; ``mask_mod`` holds either way.
    """

    kv_num_blocks: Tensor | None
    kv_indices: Tensor | None
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    q_num_blocks: Tensor | None
    q_indices: Tensor | None
    full_q_num_blocks: Tensor | None
    full_q_indices: Tensor | None
    q_block: int
    kv_block: int
    mask_mod: Any


# --- shapes ---------------------------------------------------------------------------------------------------------


def empty_in_layout_of(like: Tensor, width: int) -> Tensor:
    """An empty ``[B, H, L, width]`` tensor, dense, with heads inside the length when ``like`` has them so.

    Models hold ``[B, L, H, D]`` memory viewed as ``[B, H, L, D]``; keeping that order makes the transpose back free.
    """
    batch, heads, length, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, length, width)


def _forward_fake(
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
    *buffers: tuple,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = query.shape[:3]
    out = empty_in_layout_of(query, value.size(-1))
    value_mean = empty_in_layout_of(query, value.size(-1)) if save_value_mean else query.new_empty(0)
    dtype = statistics_dtype(query)
    return out, value_mean, query.new_empty(rows, dtype=dtype), query.new_empty(rows, dtype=dtype)


def _backward_fake(
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
    grads = [
        empty_in_layout_of(tensor, tensor.size(-1)) if needed and tensor is not None else None
        for tensor, needed in zip((query, key, value, probe), needs_grad, strict=True)
    ]

    def buffer_grads(joint: Mod, buffers: tuple) -> tuple:
        # Inductor runs this again on tensors that no longer know what requires a gradient: there the traced graph says it.
        if isinstance(joint, torch.fx.GraphModule):
            wanted = differentiated_buffers(joint)
        else:
            wanted = tuple(isinstance(buffer, Tensor) and buffer.requires_grad for buffer in buffers)
        return tuple(
            buffer.new_empty(buffer.shape) if want else None for buffer, want in zip(buffers, wanted, strict=True)
        )

    captured = (score_mod_buffers, covariance_mod_buffers)
    return (*grads, *map(buffer_grads, joint_graphs, captured))  # type: ignore[return-value]


attention_forward = ModOperator("parallax_attention", dense.forward, _forward_fake, (SCORE, COVARIANCE, MASK))
"""The forward of the core; see :func:`.dense.forward` for the meaning of the arguments and results."""

attention_backward = ModOperator(
    "parallax_attention_backward",
    dense.backward,
    _backward_fake,
    (
        ModPlace("score_mod", "fw_graphs", 0, "score_mod_buffers", "forward"),
        ModPlace("covariance_mod", "fw_graphs", 1, "covariance_mod_buffers", "forward"),
        ModPlace("score_mod", "joint_graphs", 0, "score_mod_buffers", "joint"),
        ModPlace("covariance_mod", "joint_graphs", 1, "covariance_mod_buffers", "joint"),
        MASK,
    ),
)
"""The backward of the core; see :func:`.dense.backward` for the meaning of the arguments and results."""


# --- autograd -------------------------------------------------------------------------------------------------------


def row_terms(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_probe_mean: Tensor | None,
    out: Tensor,
    value_mean: Tensor,
    probe_mean: Tensor,
    *,
    has_probe: bool,
    intercept: bool,
) -> tuple[Tensor, Tensor]:
    """``tau`` and ``beta`` of the module's table, each ``[B, Hq, Lq]`` float32 (float64 for float64 inputs)."""
    dtype = probe_mean.dtype
    grad = grad_out.to(dtype)
    tau = (grad * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        tau = tau - grad_lse.to(dtype)
    beta = torch.zeros_like(tau)
    if not has_probe:
        return tau, beta
    if intercept:
        beta = (grad * value_mean.to(dtype)).sum(-1)
    if grad_probe_mean is not None:
        grad_t = grad_probe_mean.to(dtype)
        if intercept:
            beta = beta + grad_t
        else:
            beta, tau = -grad_t, tau + probe_mean * grad_t
    return tau, beta


class _AttentionAutograd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        probe: Tensor | None,
        fw_graphs: tuple[Mod, Mod],
        joint_graphs: tuple[Mod, Mod] | None,
        block_mask: tuple,
        scale: float,
        intercept: bool,
        save_value_mean: bool,
        kernel_options: dict[str, Any],
        mask_mod_buffers: tuple,
        n_score_buffers: int,
        *buffers: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        score_buffers, covariance_buffers = tuple(buffers[:n_score_buffers]), tuple(buffers[n_score_buffers:])
        needs_backward = joint_graphs is not None
        with torch._C._AutoDispatchBelowAutograd():
            outputs = attention_forward(
                query,
                key,
                value,
                probe,
                *fw_graphs,
                block_mask,
                scale,
                intercept,
                # Already asked for when a traced graph is run again without gradients.
                save_value_mean or (needs_backward and intercept and probe is not None),
                kernel_options,
                score_buffers,
                covariance_buffers,
                mask_mod_buffers,
            )
        ctx.mark_non_differentiable(outputs[1])
        ctx.fw_graphs, ctx.joint_graphs, ctx.mask_mod = fw_graphs, joint_graphs, block_mask[-1]
        ctx.scale, ctx.intercept, ctx.kernel_options = scale, intercept, kernel_options
        ctx.counts = (len(block_mask) - 1, len(score_buffers), len(covariance_buffers))
        save_values_for_backward(
            ctx, (query, key, value, probe, *outputs, *block_mask[:-1], *buffers, *mask_mod_buffers)
        )
        return outputs

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        grad_out: Tensor | None,
        grad_value_mean: None,
        grad_lse: Tensor | None,
        grad_probe_mean: Tensor | None,
    ) -> tuple:
        values = saved_values(ctx)
        query, key, value, probe, out, value_mean, lse, probe_mean = values[:8]
        rest = values[8:]
        n_mask, n_score, n_covariance = ctx.counts
        block_mask, rest = (*rest[:n_mask], ctx.mask_mod), rest[n_mask:]
        score_buffers, rest = tuple(rest[:n_score]), rest[n_score:]
        covariance_buffers, mask_buffers = tuple(rest[:n_covariance]), tuple(rest[n_covariance:])
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        tau, beta = row_terms(
            grad_out,
            grad_lse,
            grad_probe_mean,
            out,
            value_mean,
            probe_mean,
            has_probe=probe is not None,
            intercept=ctx.intercept,
        )
        *grads, score_grads, covariance_grads = attention_backward(
            query,
            key,
            value,
            probe,
            grad_out,
            lse,
            probe_mean,
            tau,
            beta,
            ctx.fw_graphs,
            ctx.joint_graphs,
            block_mask,
            ctx.scale,
            ctx.intercept,
            tuple(ctx.needs_input_grad[:4]),
            ctx.kernel_options,
            score_buffers,
            covariance_buffers,
            mask_buffers,
            grad_lse,
            grad_probe_mean,
        )
        return (*grads, *(None,) * 9, *score_grads, *covariance_grads)


def joint_graphs(
    query: Tensor, mods: tuple[Mod, Mod], buffers: tuple[tuple, tuple]
) -> tuple[tuple[Mod, Mod], tuple[Mod, Mod]]:
    """The mods to run again in a backward, and the joint graphs that differentiate them."""
    example: Any = tuple(example_arguments(query, requires_grad=True))
    pairs = [create_fw_bw_graph(mod, example, captured) for mod, captured in zip(mods, buffers, strict=True)]
    return (pairs[0][0], pairs[1][0]), (_with_score_gradient(pairs[0][1]), _with_score_gradient(pairs[1][1]))


def _with_score_gradient(joint: Mod) -> Mod:
    """A mod that ignores its score has no gradient for it, which is 0."""

    def filled(score: Tensor, *rest: Any) -> list[Any]:
        grad, *others = joint(score, *rest)
        return [torch.zeros_like(score) if grad is None else grad, *others]

    return filled


@attention_forward.py_impl(DispatchKey.Autograd)
def _forward_autograd(
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
) -> Any:
    differentiable = (query, key, value, probe, *score_mod_buffers, *covariance_mod_buffers)
    mods: tuple[Mod, Mod] = (score_mod, covariance_mod)
    joint = None
    with indexing_by_tensors():
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in differentiable):
            mods, joint = joint_graphs(query, mods, (score_mod_buffers, covariance_mod_buffers))
        return _AttentionAutograd.apply(
            query,
            key,
            value,
            probe,
            mods,
            joint,
            block_mask,
            scale,
            intercept,
            save_value_mean,
            kernel_options,
            mask_mod_buffers,
            len(score_mod_buffers),
            *score_mod_buffers,
            *covariance_mod_buffers,
        )


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:  # type: ignore[override]
        raise RuntimeError(
            "parallax_attention has no compiled double backward. Workaround: call attention outside of torch.compile, "
            "where the reference is differentiable to any order."
        )


def once_differentiable(op: ModOperator, arguments: tuple) -> Any:
    """Call an operator that a backward uses; what differentiates its results raises."""
    with torch._C._AutoDispatchBelowAutograd():
        grads = op(*arguments)
    flat, spec = pytree.tree_flatten(grads)
    floating = [isinstance(grad, Tensor) and grad.is_floating_point() for grad in flat]
    tensors = [grad for grad, is_floating in zip(flat, floating, strict=True) if is_floating]
    tracked = iter(
        _NoDoubleBackward.apply(*tensors) if torch.is_grad_enabled() and _any_requires_grad(arguments) else tensors
    )
    mixed = [next(tracked) if is_floating else grad for grad, is_floating in zip(flat, floating, strict=True)]
    return pytree.tree_unflatten(mixed, spec)


@attention_backward.py_impl(DispatchKey.Autograd)
def _backward_autograd(*arguments: Any) -> Any:
    return once_differentiable(attention_backward, arguments)


def _any_requires_grad(arguments: tuple) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(arguments))


attention_forward.register_dynamo()
