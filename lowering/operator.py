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
from .torch_compat import (
    HigherOrderOperator,
    ProxyTorchDispatchMode,
    TransformGetItemToIndex,
    UnsupportedAliasMutationException,
    create_fw_bw_graph,
    functionalized_mutates,
    redirect_checkpointing_modes,
    register_dynamo_operator,
    register_fake,
    save_values_for_backward,
    saved_values,
    set_original_aten_op,
    trace_mod,
    track_tensor_tree,
    validate_subgraph_args_types,
)

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


class AttentionForward(HigherOrderOperator):
    """The forward of the core; see :func:`dense.forward` for the meaning of the arguments and results."""

    def __init__(self) -> None:
        super().__init__("parallax_attention", cacheable=True)

    def __call__(
        self,
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
        """Check the operands and dispatch."""
        validate_subgraph_args_types((*score_mod_buffers, *covariance_mod_buffers, *mask_mod_buffers))
        return super().__call__(
            query,
            key,
            value,
            probe,
            score_mod,
            covariance_mod,
            block_mask,
            scale,
            intercept,
            save_value_mean,
            kernel_options,
            score_mod_buffers,
            covariance_mod_buffers,
            mask_mod_buffers,
        )


class AttentionBackward(HigherOrderOperator):
    """The backward of the core; see :func:`dense.backward` for the meaning of the arguments and results."""

    def __init__(self) -> None:
        super().__init__("parallax_attention_backward", cacheable=True)

    def __call__(
        self,
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
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple, tuple]:
        """Check the operands and dispatch."""
        validate_subgraph_args_types((*score_mod_buffers, *covariance_mod_buffers, *mask_mod_buffers))
        return super().__call__(
            query,
            key,
            value,
            probe,
            grad_out,
            lse,
            probe_mean,
            tau,
            beta,
            fw_graphs,
            joint_graphs,
            block_mask,
            scale,
            intercept,
            needs_grad,
            kernel_options,
            score_mod_buffers,
            covariance_mod_buffers,
            mask_mod_buffers,
            score_grad_sum,
            probe_score_grad_sum,
        )


attention_forward = AttentionForward()
attention_backward = AttentionBackward()

attention_forward.py_impl(DispatchKey.CompositeExplicitAutograd)(dense.forward)
attention_backward.py_impl(DispatchKey.CompositeExplicitAutograd)(dense.backward)


# --- shapes ---------------------------------------------------------------------------------------------------------


def empty_in_layout_of(like: Tensor, width: int) -> Tensor:
    """An empty ``[B, H, L, width]`` tensor, dense, with heads inside the length when ``like`` has them so.

    Models hold ``[B, L, H, D]`` memory viewed as ``[B, H, L, D]``; keeping that order makes the transpose back free.
    """
    batch, heads, length, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, length, width)


def statistics_dtype(query: Tensor) -> torch.dtype:
    """LSE and row means are float32, and float64 for float64 inputs."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@register_fake(attention_forward)
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


@register_fake(attention_backward)
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


# --- tracing --------------------------------------------------------------------------------------------------------


def example_arguments(
    query: Tensor, *, score: bool = True, grad: bool = False, requires_grad: bool = False
) -> list[Tensor]:
    """Scalar arguments of a mod: the score (float32, or float64), four indices, and the gradient of a joint graph."""
    dtype = statistics_dtype(query)
    values = [query.new_zeros((), dtype=dtype, requires_grad=requires_grad)] if score else []
    values += [query.new_zeros((), dtype=torch.int) for _ in range(4)]
    if grad:
        values.append(query.new_zeros((), dtype=dtype))
    return values


def record_node(mode: Any, op: HigherOrderOperator, arguments: tuple, example: Any, graphs: dict[str, Any]) -> Any:
    """Put a call of ``op`` into the graph being traced; ``graphs`` are its traced mods, ``example`` its fake results."""
    from . import register_lowerings

    register_lowerings()  # an exported program reaches Inductor without passing through our Dynamo hook
    for name, graph in graphs.items():
        mode.tracer.root.register_module(mode.tracer.get_fresh_qualname(name), graph)
    proxies = pytree.tree_map(mode.tracer.unwrap_proxy, arguments)
    with set_original_aten_op(op):
        proxy = mode.tracer.create_proxy("call_function", op, proxies, {})
    return track_tensor_tree(example, proxy, constant=None, tracer=mode.tracer)


@attention_forward.py_impl(ProxyTorchDispatchMode)
def _forward_proxy(
    mode: Any,
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
    tensors, switches = (query, key, value, probe), (scale, intercept, save_value_mean, kernel_options)
    buffers = (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)
    example = attention_forward(*tensors, score_mod, covariance_mod, block_mask, *switches, *buffers)
    requires_grad = query.requires_grad
    score = trace_mod(score_mod, *example_arguments(query, requires_grad=requires_grad), *score_mod_buffers)
    covariance = trace_mod(
        covariance_mod, *example_arguments(query, requires_grad=requires_grad), *covariance_mod_buffers
    )
    mask = trace_mod(block_mask[-1], *example_arguments(query, score=False), *mask_mod_buffers)
    arguments = (*tensors, score, covariance, (*block_mask[:-1], mask), *switches, *buffers)
    graphs = {"score_mod": score, "covariance_mod": covariance, "mask_mod": mask}
    return record_node(mode, attention_forward, arguments, example, graphs)


@attention_backward.py_impl(ProxyTorchDispatchMode)
def _backward_proxy(
    mode: Any,
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
) -> Any:
    tensors = (query, key, value, probe, grad_out, lse, probe_mean, tau, beta)
    switches = (scale, intercept, needs_grad, kernel_options)
    buffers = (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)
    sums = (score_grad_sum, probe_score_grad_sum)
    example = attention_backward(*tensors, fw_graphs, joint_graphs, block_mask, *switches, *buffers, *sums)
    mod_buffers = buffers[:2]
    forward = tuple(
        trace_mod(graph, *example_arguments(query, requires_grad=True), *captured)
        for graph, captured in zip(fw_graphs, mod_buffers, strict=True)
    )
    joint = tuple(
        trace_mod(graph, *example_arguments(query, requires_grad=True, grad=True), *captured)
        for graph, captured in zip(joint_graphs, mod_buffers, strict=True)
    )
    mask = trace_mod(block_mask[-1], *example_arguments(query, score=False), *mask_mod_buffers)
    graphs = {
        "score_mod": forward[0],
        "covariance_mod": forward[1],
        "score_mod_joint": joint[0],
        "covariance_mod_joint": joint[1],
        "mask_mod": mask,
    }
    arguments = (*tensors, forward, joint, (*block_mask[:-1], mask), *switches, *buffers, *sums)
    return record_node(mode, attention_backward, arguments, example, graphs)


@attention_forward.py_functionalize_impl
def _forward_functionalize(
    ctx: Any,
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
    tensors = ctx.unwrap_tensors((query, key, value, probe))
    block_mask = ctx.unwrap_tensors(block_mask)
    buffers = [ctx.unwrap_tensors(b) for b in (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)]
    with ctx.redispatch_to_next():
        for name, mod, captured in (
            ("score_mod", score_mod, buffers[0]),
            ("covariance_mod", covariance_mod, buffers[1]),
        ):
            if functionalized_mutates(ctx, mod, [*example_arguments(tensors[0]), *captured]):
                raise UnsupportedAliasMutationException(f"{name} writes into a tensor; mods must be pure functions")
        out = attention_forward(  # type: ignore[call-arg]
            *tensors,
            ctx.functionalize(score_mod),
            ctx.functionalize(covariance_mod),
            (*block_mask[:-1], ctx.functionalize(block_mask[-1])),
            scale,
            intercept,
            save_value_mean,
            kernel_options,
            *buffers,
        )
    return ctx.wrap_tensors(out)


@attention_backward.py_functionalize_impl
def _backward_functionalize(
    ctx: Any,
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
) -> Any:
    tensors = ctx.unwrap_tensors((query, key, value, probe, grad_out, lse, probe_mean, tau, beta))
    block_mask = ctx.unwrap_tensors(block_mask)
    sums = ctx.unwrap_tensors((score_grad_sum, probe_score_grad_sum))
    buffers = [ctx.unwrap_tensors(b) for b in (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)]
    with ctx.redispatch_to_next():
        grads = attention_backward(  # type: ignore[call-arg]
            *tensors,
            tuple(map(ctx.functionalize, fw_graphs)),
            tuple(map(ctx.functionalize, joint_graphs)),
            (*block_mask[:-1], ctx.functionalize(block_mask[-1])),
            scale,
            intercept,
            needs_grad,
            kernel_options,
            *buffers,
            *sums,
        )
    return ctx.wrap_tensors(grads)


for _op in (attention_forward, attention_backward):
    redirect_checkpointing_modes(_op)


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


def _joint_graphs(
    query: Tensor, mods: tuple[Mod, Mod], buffers: tuple[tuple, tuple]
) -> tuple[tuple[Mod, Mod], tuple[Mod, Mod]]:
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
    with TransformGetItemToIndex():
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in differentiable):
            mods, joint = _joint_graphs(query, mods, (score_mod_buffers, covariance_mod_buffers))
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


@attention_backward.py_impl(DispatchKey.Autograd)
def _backward_autograd(*arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        grads = attention_backward(*arguments)
    flat, spec = pytree.tree_flatten(grads)
    tensors = [grad for grad in flat if isinstance(grad, Tensor)]
    tracked = iter(
        _NoDoubleBackward.apply(*tensors) if torch.is_grad_enabled() and _any_requires_grad(arguments) else tensors
    )
    return pytree.tree_unflatten([next(tracked) if isinstance(grad, Tensor) else grad for grad in flat], spec)


def _any_requires_grad(arguments: tuple) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(arguments))


# --- Dynamo ---------------------------------------------------------------------------------------------------------


def _before_trace() -> None:
    from . import register_lowerings

    register_lowerings()


register_dynamo_operator(
    attention_forward,
    mods={4: "score_mod", 5: "score_mod", 6: "mask_fn"},
    names={4: "score_mod", 5: "covariance_mod", 6: "mask_mod"},
    on_trace=_before_trace,
)
