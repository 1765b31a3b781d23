"""Operators with mods: what their registration and tracing take from torch's private modules (:mod:`.torch_compat`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import create_fw_bw_graph
from torch._higher_order_ops.utils import (
    UnsupportedAliasMutationException,
    _has_potential_branch_input_mutation,
    _maybe_reenter_make_fx,
    redirect_to_mode,
    register_fake,
    save_values_for_backward,
    saved_values,
    validate_subgraph_args_types,
)
from torch._ops import HigherOrderOperator
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, set_original_aten_op, track_tensor_tree
from torch.nn.attention.flex_attention import _vmap_for_bhqkv
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

__all__ = [
    "HigherOrderOperator",
    "ProxyTorchDispatchMode",
    "UnsupportedAliasMutationException",
    "create_fw_bw_graph",
    "functionalized_mutates",
    "indexing_by_tensors",
    "outside_of_tracing",
    "redirect_checkpointing_modes",
    "register_fake",
    "result_problem",
    "save_values_for_backward",
    "saved_values",
    "set_original_aten_op",
    "statically_known_true",
    "trace_mod",
    "track_tensor_tree",
    "validate_subgraph_args_types",
    "vectorize_mod",
]


def indexing_by_tensors() -> Any:
    """A context in which a mod may index a captured tensor by scalar tensors (``tensor[h]``) while it is traced or mapped."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def statically_known_true(condition: Any) -> bool:
    """Whether a condition on sizes holds for every size that what is compiled will serve."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true as is_known  # with it comes sympy

    return is_known(condition)


def trace_mod(mod: Callable[..., Any], *example: Any) -> Any:
    """Trace a mod (or its joint graph) to an FX graph on scalar ``example`` values."""
    with indexing_by_tensors():
        return _maybe_reenter_make_fx(mod)(*example)


def outside_of_tracing() -> Any:
    """A context in which operations on tensors that hold data are computed, not recorded, whatever traces around it."""
    return _disable_current_modes()


def functionalized_mutates(ctx: Any, mod: Callable[..., Any], example: Sequence[Any]) -> bool:
    """Whether ``mod`` writes into one of its inputs or captured tensors."""
    pre_dispatch = hasattr(ctx, "mode") and ctx.mode.pre_dispatch
    with indexing_by_tensors():
        return bool(_has_potential_branch_input_mutation(mod, list(example), pre_dispatch))


def redirect_checkpointing_modes(op: HigherOrderOperator) -> None:
    """Let selective activation checkpointing see ``op`` as one operator."""
    redirect_to_mode(op, _CachingTorchDispatchMode)
    redirect_to_mode(op, _CachedTorchDispatchMode)


def vectorize_mod(mod: Callable[..., Any], *, n_buffers: int = 0, kind: str = "score") -> Callable[..., Any]:
    """Lift a flex-style mod over 0-dim tensors to whole ``[B, H, Lq, Lk]`` tensors.

    Args:
        mod: ``score`` ``(score, b, h, q_idx, kv_idx, *buffers) -> score``, ``mask`` ``(b, h, q_idx, kv_idx, *buffers) ->
            bool``, or ``joint`` ``(score, b, h, q_idx, kv_idx, grad, *buffers) -> (grad_score, ..., *grad_buffers)``.
        n_buffers: number of captured tensors, which are not mapped over.
        kind: ``"score"``, ``"mask"`` or ``"joint"``.

    Returns:
        the same function over index vectors ``b [B]``, ``h [H]``, ``q_idx [Lq]``, ``kv_idx [Lk]`` and dense scores.
    """
    unmapped = (None,) * n_buffers
    if kind == "score":
        dense = _vmap_for_bhqkv(mod, prefix=(0,), suffix=unmapped)
    elif kind == "mask":
        dense = _vmap_for_bhqkv(mod, prefix=(), suffix=unmapped)
    else:
        out_dims: list[int | None] = [0, None, None, None, None, *unmapped]
        dense = _vmap_for_bhqkv(mod, prefix=(0,), suffix=(0, *unmapped), out_dims=out_dims)

    def run(*args: Any) -> Any:
        with indexing_by_tensors():
            return dense(*args)

    return run


def result_problem(value: Any, *, is_mask: bool, axes: int = 0) -> str | None:
    """What is wrong with the value that a mod returned, or None; ``axes`` are those that :func:`vectorize_mod` added."""
    if not isinstance(value, Tensor):
        return f"must return a tensor, but returned {type(value).__name__}."
    if is_mask and value.dtype != torch.bool:
        return f"must return bool, but returned {value.dtype}. Compare, do not subtract."
    if not is_mask and not value.is_floating_point():
        return f"must return a floating score, but returned {value.dtype}."
    if value.dim() != axes:
        shape = list(value.shape)[axes:]
        return f"must return one number for its pair of a query and a key, but returned a tensor of shape {shape}."
    return None
