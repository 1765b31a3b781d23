"""The blocks of keys that the rows of a decode call visit, from the lists of a block mask over positions.

A block mask lists blocks of keys for each block of rows. The rows of a decode call are the last of their sequence, so that the
lengths on the device choose its blocks of rows. All in plain torch, of the size of one row of blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .mod_operator import Mod

_PARTIAL, _FULL = 1, 2


class Visits(NamedTuple):
    """What a block mask says of the rows of each sequence.

    Attributes:
        kinds: 0 not visited, 1 where the mask is asked for each pair, 2 where it allows all; int8
            ``[B, H or 1, blocks of rows, blocks of keys]``, from the block of each sequence's first row on.
        first: that block, int64 ``[B]``.
        q_block, kv_block: rows and keys of a block.
        mask_mod: the mask, over positions.
    """

    kinds: Tensor
    first: Tensor
    q_block: int
    kv_block: int
    mask_mod: Mod

    def predicate(self) -> Mod:
        """The block mask as a ``mask_mod``, with its lists."""
        kinds, first, q_block, kv_block, given = self
        heads, row_blocks = kinds.size(1), kinds.size(2)

        def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row = (q_idx // q_block - first[b]).clamp(0, row_blocks - 1)
            kind = kinds[b, h if heads > 1 else h * 0, row, kv_idx // kv_block]
            return (kind == _FULL) | ((kind == _PARTIAL) & given(b, h, q_idx, kv_idx))

        return keep


def visits(lists: tuple, q_block: int, kv_block: int, mask_mod: Mod, total: Tensor, rows: int) -> Visits:
    """Look up the blocks of the last ``rows`` positions of each sequence.

    Args:
        lists: counts ``[B or 1, H or 1, blocks of rows]`` and indices ``[..., blocks of keys]`` of partial blocks, then of full
            ones or None.
        total: keys of each sequence, int64 ``[B]``.
    """
    counts, indices, full_counts, full_indices = lists
    count = 1 if rows == 1 else (rows - 2) // q_block + 2  # that so many rows can touch
    first = (total - rows).clamp(min=0) // q_block
    row_blocks = (first[:, None] + torch.arange(count, device=total.device)).clamp(max=counts.size(2) - 1)

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        batch = torch.arange(total.size(0), device=total.device)[:, None] * int(counts.size(0) > 1)
        return listed_blocks(counts[batch, :, row_blocks], indices[batch, :, row_blocks]).transpose(1, 2)

    kinds = listed(counts, indices) * _PARTIAL
    if full_counts is not None:
        kinds = torch.maximum(kinds, listed(full_counts, full_indices) * _FULL)
    return Visits(kinds, first, q_block, kv_block, mask_mod)


def listed_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """1 where a block stands in its list, else 0: int8, of the shape of ``indices``."""
    columns = indices.size(-1)
    # Entries past a list's count point at one extra column, which is dropped.
    used = torch.where(torch.arange(columns, device=indices.device) < counts[..., None], indices, columns)
    zeros = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.int8, device=indices.device)
    return zeros.scatter(-1, used.to(torch.int64), torch.ones_like(zeros[..., :-1]))[..., :-1]


def lists_of(
    found: Visits, kv_heads: int, total: Tensor, rows: int, behind: int | None, asked_everywhere: bool
) -> tuple:
    """One list of partial and one of full blocks for all rows of a key head, as the kernels read them.

    A block is full if it is for every row. Blocks behind the last key, and before a window that sees ``behind`` keys back, are
    left out.

    Args:
        asked_everywhere: whether the mask is to be asked in full blocks too, for another one that it holds; then there is no
            second list.

    Returns:
        Counts ``[B, Hkv or 1, 1]`` and ascending indices ``[..., blocks]``, int32, twice.
    """
    kinds = found.kinds.unflatten(1, (kv_heads if found.kinds.size(1) > 1 else 1, -1))
    start = torch.arange(kinds.size(-1), device=kinds.device) * found.kv_block
    within = start < total[:, None]
    if behind is not None:
        within = within & (start + found.kv_block > (total - rows - behind)[:, None])
    within = within[:, None, :]
    some = (kinds != 0).any(3).any(2) & within
    if asked_everywhere:
        return (*_list(some), None, None)
    whole = (kinds == _FULL).all(3).all(2) & within
    return (*_list(some & ~whole), *_list(whole))


def _list(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are marked in each row, and which: as lists of one block of rows."""
    columns = blocks.size(-1)
    rank = blocks.cumsum(-1, dtype=torch.int32)
    place = torch.where(blocks, rank - 1, columns).to(torch.int64)
    zeros = torch.zeros((*blocks.shape[:-1], columns + 1), dtype=torch.int32, device=blocks.device)
    column = torch.arange(columns, dtype=torch.int32, device=blocks.device).expand(blocks.shape)
    indices = zeros.scatter(-1, place, column)[..., :-1]
    return rank[..., -1:].contiguous(), indices[:, :, None].contiguous()


def within_lists(lists: tuple, kv_block: int, mask_mod: Mod, group: int) -> Mod:
    """The mask that a call with :func:`lists_of` computes, as a ``mask_mod``; ``group`` query heads share a key head."""
    counts, indices, full_counts, full_indices = lists
    kinds = listed_blocks(counts[..., 0], indices[:, :, 0]) * _PARTIAL
    if full_counts is not None:
        kinds = kinds + listed_blocks(full_counts[..., 0], full_indices[:, :, 0]) * _FULL
    heads = kinds.size(1)

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, *captured: Any) -> Tensor:
        kind = kinds[b, h // group if heads > 1 else h * 0, kv_idx // kv_block]
        return (kind == _FULL) | ((kind == _PARTIAL) & mask_mod(b, h, q_idx, kv_idx, *captured))

    return keep
