"""Block masks of a call: the spec's own, the one given at the call, or both combined by and."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import masks
from .errors import InputTypeError, UnsupportedError
from .lowering import decode_blocks
from .lowering.torch_compat_errors import raise_input
from .lowering.torch_compat_operator import outside_of_tracing, result_problem
from .masks import LibraryMask, MaskMod

EMPTY, PARTIAL, FULL = 0, 1, 2


def combined_block_mask(
    mask_mod: MaskMod | None, block_mask: BlockMask | None, query: Tensor, key: Tensor
) -> BlockMask | None:
    """The block mask of a call, or None when every key is allowed.

    Args:
        mask_mod: the spec's mask.
        block_mask: the call's, for ``(Lq, Lk)``; its block sizes are kept.
        query: ``[B, Hq, Lq, D]``; key: ``[B, Hkv, Lk, D]``.
    """
    if mask_mod is None:
        return block_mask
    check_mask_mod(mask_mod, query)
    batch, heads, q_length, kv_length = query.size(0), query.size(1), query.size(2), key.size(2)
    if block_mask is None:
        return masks.block_mask(mask_mod, batch, heads, q_length, kv_length, query.device)
    sizes = (block_mask.BLOCK_SIZE[0], block_mask.BLOCK_SIZE[1])
    own = masks.block_mask(mask_mod, batch, heads, q_length, kv_length, query.device, BLOCK_SIZE=sizes)
    kinds = torch.minimum(block_kinds(own), block_kinds(block_mask))
    given = block_mask.mask_mod

    def both(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx) & given(b, h, q_idx, kv_idx)

    return masks.from_kinds(kinds, (q_length, kv_length), sizes, both)


def check_mask_mod(mask_mod: MaskMod, query: Tensor) -> None:
    """A mask of the user's gives one bool for each pair."""
    if isinstance(mask_mod, LibraryMask):
        return
    zero = torch.zeros((), dtype=torch.int32, device=query.device)
    problem = result_problem(mask_mod(zero, zero, zero, zero), is_mask=True)
    if problem is not None:
        raise_input(InputTypeError, f"the spec's mask_mod {problem}")


def own_lists(block_mask: BlockMask, query: Tensor, key: Tensor) -> bool:
    """Whether query heads that share a key head have lists of blocks of their own, or rows several lists."""
    heads, row_blocks = block_mask.kv_num_blocks.shape[1:]
    return row_blocks > 1 or (heads > 1 and query.size(1) != key.size(1))


def visited_blocks(block_mask: BlockMask, total: Tensor, rows: int) -> decode_blocks.Visits:
    """What a block mask over positions says of the last ``rows`` positions of sequences of ``total`` keys, int64 ``[B]``."""
    lists = (block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return decode_blocks.visits(lists, *block_mask.BLOCK_SIZE, block_mask.mask_mod, total, rows)


def block_kinds(block_mask: BlockMask) -> Tensor:
    """EMPTY, PARTIAL or FULL for each pair of blocks, int8 ``[B, H, q blocks, kv blocks]``."""
    kinds = _listed(block_mask.kv_num_blocks, block_mask.kv_indices) * PARTIAL
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        kinds = torch.maximum(kinds, full * FULL)
    return kinds


def as_mask_mod(mask_mod: MaskMod | None, block_mask: BlockMask | None) -> MaskMod | None:
    """The masks of a call, the spec's and the block mask with its lists of blocks, as one ``mask_mod``; None allows all."""
    if block_mask is None:
        return mask_mod
    if type(block_mask.kv_indices) is not Tensor:
        raise UnsupportedError(
            "a block_mask that is made while the call is traced is not traced for MLIR. "
            "Make it before, or put the mask into the spec (mask_mod=)."
        )
    with outside_of_tracing():
        kinds = block_kinds(block_mask)
    sizes, given = block_mask.BLOCK_SIZE, block_mask.mask_mod
    batches, heads = kinds.shape[:2]

    def combined(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kind = kinds[b if batches > 1 else 0, h if heads > 1 else 0, q_idx // sizes[0], kv_idx // sizes[1]]
        keep = (kind == FULL) | ((kind == PARTIAL) & given(b, h, q_idx, kv_idx))
        return keep if mask_mod is None else keep & mask_mod(b, h, q_idx, kv_idx)

    return combined


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """1 where a block stands in its row's list, 0 elsewhere."""
    columns = indices.size(-1)
    position = torch.arange(columns, device=indices.device)
    # Entries past a row's count point at one extra column, which is dropped.
    used = torch.where(position < counts[..., None], indices, columns).to(torch.int64)
    zeros = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.int8, device=indices.device)
    return zeros.scatter(-1, used, torch.ones_like(used, dtype=torch.int8))[..., :-1]
