"""``replace_sdpa``: a model's ``F.scaled_dot_product_attention`` becomes another member of the family, without new weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import masks
from .attention import attention
from .errors import InputError, InputTypeError, UnsupportedError
from .lowering.torch_compat import raise_input
from .spec import AttentionSpec

__all__ = ["check_member", "replacing"]


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
    """``function`` with every call of ``scaled_dot_product_attention`` inside of it computed by the member ``spec``."""

    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        with _Replacement(spec):
            return function(*args, **kwargs)

    return replaced


class _Replacement(TorchFunctionMode):
    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            return _member(self.spec, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            # It is called with this mode off, so that the call inside would stay what it is without a word.
            raise_input(
                UnsupportedError,
                "replace_sdpa does not reach into nn.MultiheadAttention. Call F.scaled_dot_product_attention in its place.",
            )
        return func(*args, **kwargs)


def _member(
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
    """The member with the arguments, and the meaning of the arguments, of ``F.scaled_dot_product_attention``."""
    if dropout_p > 0.0:
        raise_input(
            UnsupportedError,
            f"replace_sdpa cannot keep dropout, but the call has dropout_p = {dropout_p}. Set it to 0.",
        )
    if query.dim() == 3:
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
        q, k, v = (tensor.unsqueeze(1) for tensor in (query, key, value))
        return _member(spec, q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa).squeeze(1)
    if is_causal:
        if attn_mask is not None:
            raise_input(
                InputError, "the call has both attn_mask and is_causal=True; scaled_dot_product_attention takes one."
            )
        return attention(query, key, value, spec=_masked(spec, masks.causal()), scale=scale, enable_gqa=enable_gqa)
    if attn_mask is None:
        return attention(query, key, value, spec=spec, scale=scale, enable_gqa=enable_gqa)
    pairs = attn_mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
    if spec.bandwidth.kind == "infinite":
        if pairs.dtype != torch.bool:
            raise_input(
                UnsupportedError,
                "replace_sdpa cannot keep an additive attn_mask at infinite bandwidth, which has no scores. Pass a bool mask.",
            )
        allowed = _masked(spec, lambda b, h, q_idx, kv_idx: pairs[b, h, q_idx, kv_idx])
        return attention(query, key, value, spec=allowed, scale=scale, enable_gqa=enable_gqa)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        given = pairs[b, h, q_idx, kv_idx]
        return torch.where(given, score, -float("inf")) if pairs.dtype == torch.bool else score + given

    return attention(query, key, value, spec=spec, score_mod=score_mod, scale=scale, enable_gqa=enable_gqa)


def _masked(spec: AttentionSpec, mask: Callable[..., Tensor]) -> AttentionSpec:
    """``spec`` with ``mask`` beside its own."""
    own = spec.mask_mod
    if own is None:
        return spec.replace(mask_mod=mask)
    if isinstance(own, masks.LibraryMask) and isinstance(mask, masks.LibraryMask):
        return spec.replace(mask_mod=own & mask)
    return spec.replace(mask_mod=lambda b, h, q_idx, kv_idx: own(b, h, q_idx, kv_idx) & mask(b, h, q_idx, kv_idx))
