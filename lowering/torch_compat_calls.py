"""Torch's own attention calls, taken apart: what ``replace_sdpa`` needs to compute them by another member.

The private symbols are fenced in :mod:`.torch_compat`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as FLEX_ATTENTION
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE, BlockMask, _identity, noop_mask

from ..errors import InputError
from .torch_compat_errors import raise_input

__all__ = ["FLEX_ATTENTION", "FlexCall", "flex_call", "flex_result", "multi_head_attention"]

_LN2 = 0.6931471805599453


class FlexCall(NamedTuple):
    """A call of ``flex_attention`` as its caller wrote it, read from the operator that it becomes.

    Attributes:
        score_mod, block_mask: None where the caller gave none.
        scale: always a number; the operator no longer says whether the caller gave it.
        max_scores: whether the maxima are asked for.
        backend: of ``kernel_options``; None where there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: Callable[..., Any] | None
    block_mask: BlockMask | None
    scale: float
    max_scores: bool
    backend: str | None


def flex_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: Mapping[str, Any],
    *_: Any,
) -> FlexCall:
    """The operands of :data:`FLEX_ATTENTION`, with the defaults that ``flex_attention`` filled in taken out again."""
    # Between the lists and the sizes, releases put orders of writing that only their own backward reads.
    q_length, kv_length, *lists = block_mask[:10]
    q_block, kv_block, mask_mod = block_mask[-3:]
    mask = None
    if not (q_block == kv_block == _LARGE_SPARSE_BLOCK_SIZE and mask_mod is noop_mask):
        mask = BlockMask(
            seq_lengths=(q_length, kv_length),
            kv_num_blocks=lists[0],
            kv_indices=lists[1],
            full_kv_num_blocks=lists[2],
            full_kv_indices=lists[3],
            q_num_blocks=lists[4],
            q_indices=lists[5],
            full_q_num_blocks=lists[6],
            full_q_indices=lists[7],
            BLOCK_SIZE=(q_block, kv_block),
            mask_mod=mask_mod,
        )
    mod = None if score_mod is _identity else score_mod
    wants_maxima = bool(kernel_options.get("OUTPUT_MAX", False))
    return FlexCall(query, key, value, mod, mask, scale, wants_maxima, kernel_options.get("BACKEND"))


def flex_result(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :data:`FLEX_ATTENTION` returns: out, log-sum-exp to base 2, and no maxima.

    Args:
        out: ``[B, Hq, Lq, Dv]``; lse: ``[B, Hq, Lq]``, natural logarithm.
    """
    return out, lse / _LN2, lse.new_empty(0)


def multi_head_attention(attention: Callable[..., Tensor]) -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` with ``attention`` where it calls ``scaled_dot_product_attention``."""
    original = F.multi_head_attention_forward
    # The same code with other globals: projections, biases and mask rules stay torch's. Without ``__name__`` Dynamo guards on
    # these globals; with it, it would take the module's own to be what it sees.
    names = original.__globals__
    namespace = {name: names[name] for name in ("__builtins__", *original.__code__.co_names) if name in names}
    other = {
        "scaled_dot_product_attention": attention,
        "has_torch_function": _no_override,
        "_check_key_padding_mask": _check_key_padding_mask,
    }
    assert set(other) <= set(namespace), "multi_head_attention_forward no longer calls what is replaced in it"
    namespace |= other
    rebound = types.FunctionType(original.__code__, namespace, original.__name__, original.__defaults__)
    rebound.__kwdefaults__ = original.__kwdefaults__
    return rebound


def _no_override(tensors: Any) -> bool:
    """The override is what called."""
    return False


def _check_key_padding_mask(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """Torch's check, whose message Dynamo cannot trace."""
    if key_padding_mask.size(0) != bsz or key_padding_mask.size(1) != src_len:
        raise_input(
            InputError,
            f"key_padding_mask must be [batch, key length] = ({bsz}, {src_len}), but got {tuple(key_padding_mask.shape)}.",
        )
