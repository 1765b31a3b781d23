"""``replace_sdpa``: a model's softmax attention becomes another member of the family, without new weights.

Reached are the calls of ``F.scaled_dot_product_attention``, of ``flex_attention`` and of ``nn.MultiheadAttention``, by whatever
name they were imported, while the compiled function runs or is traced: a ``TorchFunctionMode`` sees each of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import masks
from .attention import attention
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering.torch_compat_calls import FLEX_ATTENTION, flex_call, flex_result, multi_head_attention
from .lowering.torch_compat_dynamo import skip_frames_of
from .lowering.torch_compat_errors import raise_input
from .spec import AttentionSpec

__all__ = ["check_member", "replacing", "scaled_dot_product_attention", "without_fast_path"]


def check_member(spec: Any) -> None:
    """A member that can take softmax attention's place: one whose probe needs no weights.

    Raises:
        InputTypeError: ``spec`` is no :class:`~.spec.AttentionSpec`.
        InputError: its probe is learned.
    """
    if not isinstance(spec, AttentionSpec):
        raise InputTypeError(f"replace_sdpa must be an AttentionSpec or None, but got {type(spec).__name__}.")
    if spec.probe.kind == "learned":
        raise InputError(
            "replace_sdpa takes a member that needs no new weights, but the spec's probe is learned. "
            "Use plx.LLA, another solved or gradient probe, or plx.SOFTMAX; for Parallax use plx.nn.ParallaxAttention."
        )


def replacing(function: Callable[..., Any], spec: AttentionSpec) -> Callable[..., Any]:
    """``function`` with every softmax attention inside of it computed by the member ``spec``."""
    calls = _Calls(spec)

    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        with _Replacement(calls):
            return function(*args, **kwargs)

    # A code object of its own: Dynamo keeps what it compiled, and counts recompilations, by code object.
    replaced.__code__ = replaced.__code__.replace()  # type: ignore[attr-defined]
    return replaced


def without_fast_path(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled`` run while torch's own fused transformer layers are off: they have no attention call inside to replace."""

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return compiled(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    return run


class _Calls:
    """The member with the signature of each call whose place it takes."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.sdpa = functools.partial(scaled_dot_product_attention, spec)
        self._multi_head = multi_head_attention(self.sdpa)

    def flex(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _flex_attention(self.spec, *args, **kwargs)

    def multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if kwargs.get("need_weights", True):  # nn.MultiheadAttention passes it by name
            raise_input(
                UnsupportedError,
                "replace_sdpa cannot give the attention weights that nn.MultiheadAttention was asked for. "
                "Call it with need_weights=False.",
            )
        return self._multi_head(*args, **kwargs)


class _Replacement(TorchFunctionMode):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            return self.calls.sdpa(*args, **kwargs)
        if func is FLEX_ATTENTION:
            return self.calls.flex(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # It is called with this mode off, so that the call inside would stay what it is without a word.
            return self.calls.multi_head(*args, **kwargs)
        if isinstance(func, FunctionType) and func.__module__ == "torch._tensor":
            # A method of Tensor written in Python: Dynamo traces it as a method, and not always as the function that it is.
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)


# After a graph break the mode is on while plain Python runs. Compiled for one attribute of a tensor, its frame would answer for
# every other too: Dynamo does not guard on which getter ``func`` is.
skip_frames_of(_Replacement.__torch_function__)


# --- scaled_dot_product_attention -----------------------------------------------------------------------------------


def scaled_dot_product_attention(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The member with the arguments, and the meaning of the arguments, of ``F.scaled_dot_product_attention``.

    Args:
        spec: a member whose probe needs no weights.
        query: ``[..., Hq, Lq, D]``.
        key: ``[..., Hkv, Lk, D]``; value: ``[..., Hkv, Lk, Dv]``; with query's leading dimensions.
        attn_mask: bool (True allows) or floating (added to the scores), broadcastable to ``[..., Hq, Lq, Lk]``.
        dropout_p: must be 0.
        is_causal: row ``i`` sees the keys up to ``i``, also where the lengths differ.
        scale: factor of the scores; None means ``1/sqrt(D)``.
        enable_gqa: allow ``Hq`` to be a multiple of ``Hkv``.

    Returns:
        ``[..., Hq, Lq, Dv]`` in query's dtype.

    Raises:
        UnsupportedError: dropout; an additive mask at infinite bandwidth.
        InputError: both ``attn_mask`` and ``is_causal``; a mask of the wrong shape.
        InputTypeError: a mask that is neither bool nor floating.
    """
    if dropout_p > 0.0:
        raise_input(
            UnsupportedError,
            f"replace_sdpa cannot keep dropout, but the call has dropout_p = {dropout_p}. Set it to 0.",
        )
    if attn_mask is not None:
        if is_causal:
            raise_input(
                InputError, "the call has both attn_mask and is_causal=True; scaled_dot_product_attention takes one."
            )
        _check_mask(attn_mask, query, key)
    if query.dim() == 4:
        return _member(spec, query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if attn_mask is not None:
        attn_mask = _four_dimensional(attn_mask.expand(*query.shape[:-1], key.size(-2)))
    # Any number of leading dimensions: the last of them are heads, the others the batch.
    q, k, v = (_four_dimensional(tensor) for tensor in (query, key, value))
    return _member(spec, q, k, v, attn_mask, is_causal, scale, enable_gqa).reshape(*query.shape[:-1], value.size(-1))


def _four_dimensional(tensor: Tensor) -> Tensor:
    return tensor[None, None] if tensor.dim() == 2 else tensor.reshape(-1, *tensor.shape[-3:])


def _check_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> None:
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise_input(InputTypeError, f"attn_mask must be bool or floating, but got {attn_mask.dtype}.")
    shape = (*query.shape[:-1], key.size(-2))
    fits = attn_mask.dim() <= len(shape)
    for have, want in zip(reversed(attn_mask.shape), reversed(shape), strict=False):
        fits = fits and (have == 1 or have == want)
    if not fits:
        raise_input(InputError, f"attn_mask must broadcast to {tuple(shape)}, but got shape {tuple(attn_mask.shape)}.")


def _member(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The call on four dimensions; ``attn_mask`` broadcasts to ``[B, Hq, Lq, Lk]``."""
    if attn_mask is None:
        member = _masked(spec, masks.causal()) if is_causal else spec
        return attention(query, key, value, spec=member, scale=scale, enable_gqa=enable_gqa)
    pairs = attn_mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
    if attn_mask.dtype == torch.bool:
        allowed = masks.from_pairs(attn_mask, pairs)
        return attention(query, key, value, spec=spec, block_mask=allowed, scale=scale, enable_gqa=enable_gqa)
    if spec.bandwidth.kind == "infinite":
        raise_input(
            UnsupportedError,
            "replace_sdpa cannot keep an additive attn_mask at infinite bandwidth, which has no scores. Pass a bool mask.",
        )

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + pairs[b, h, q_idx, kv_idx]

    return attention(query, key, value, spec=spec, score_mod=score_mod, scale=scale, enable_gqa=enable_gqa)


def _masked(spec: AttentionSpec, mask: Callable[..., Tensor]) -> AttentionSpec:
    """``spec`` with ``mask`` beside its own."""
    own = spec.mask_mod
    if own is None:
        return spec.replace(mask_mod=mask)
    if isinstance(own, masks.LibraryMask) and isinstance(mask, masks.LibraryMask):
        return spec.replace(mask_mod=own & mask)
    return spec.replace(mask_mod=lambda b, h, q_idx, kv_idx: own(b, h, q_idx, kv_idx) & mask(b, h, q_idx, kv_idx))


# --- flex_attention -------------------------------------------------------------------------------------------------


def _flex_attention(spec: AttentionSpec, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The member with the operands of ``flex_attention``'s operator: mods, block mask, scale and grouped heads kept.

    ``kernel_options`` say how torch's kernels are to run, and those do not run: tile sizes are not read.
    """
    call = flex_call(*args, **kwargs)
    if call.max_scores:
        raise_input(
            UnsupportedError,
            "replace_sdpa cannot give the max_scores that flex_attention was asked for. Ask for lse alone.",
        )
    if call.backend == "FLASH":
        raise_input(
            UnsupportedError,
            "replace_sdpa computes flex_attention by kernels of its own, but kernel_options ask for BACKEND FLASH. "
            "Leave it out.",
        )
    scale: float | None = call.scale
    if spec.bandwidth.kind == "infinite":
        if call.score_mod is not None:
            raise_input(
                UnsupportedError,
                "replace_sdpa cannot keep a score_mod at infinite bandwidth, which has no scores. "
                "Write masks as a block_mask, or use a member of finite bandwidth.",
            )
        # flex_attention's own default; another is the caller's wish and raises.
        if scale == 1.0 / math.sqrt(call.query.size(-1)):
            scale = None
    out, lse = attention(
        call.query,
        call.key,
        call.value,
        spec=spec,
        score_mod=call.score_mod,
        block_mask=call.block_mask,
        scale=scale,
        enable_gqa=True,
        return_lse=True,
    )
    return flex_result(out, lse)
