"""Caches of keys and values: how new ones are written, and how other libraries' caches are seen as ours.

A cache is ``[B, Hkv, capacity, width]``; with a page table it is a pool of pages ``[pages, page size, Hkv, width]`` (vLLM's order),
and row ``b`` of the table names the pages of sequence ``b`` in their order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["append", "flex_page_table", "flex_pages"]


def append(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    scales: tuple[Tensor | float, Tensor | float],
) -> None:
    """Write the new keys and values behind those of each sequence, in place.

    Args:
        caches: of keys and values; new: ``[B, Hkv, Lnew, width]`` each.
        cache_seqlens: keys of each sequence before, ``[B]``.
        page_table: see the module.
        scales: what the caches' numbers are multiplied with when they are read: numbers, or ``[B, Hkv]``.

    What would lie past the capacity, or on a page that does not exist, is left out.
    """
    batch, _, length, _ = new[0].shape
    cache = caches[0]
    device = cache.device
    sequence = torch.arange(batch, device=device)[:, None].expand(batch, length)
    position = cache_seqlens.to(torch.int64)[:, None] + torch.arange(length, device=device)
    if page_table is None:
        place, slot = sequence, position
        valid = (position >= 0) & (position < cache.size(2))
    else:
        size = cache.size(1)
        number = (position // size).clamp(0, page_table.size(1) - 1)
        place, slot = page_table.gather(1, number).to(torch.int64), position % size
        valid = (position >= 0) & (position < page_table.size(1) * size) & (place >= 0) & (place < cache.size(0))
    place, slot, valid = place.reshape(-1), slot.reshape(-1), valid.reshape(-1)
    # A key that has no place is replaced by one that has: the same number is written twice. (A write cannot be left out without
    # knowing here which ones they are.) Where none has a place, the first place is given what it holds.
    stand_in = valid.to(torch.int32).argmax(0, keepdim=True)
    source = torch.where(valid, torch.arange(batch * length, device=device), stand_in)
    some = valid.any()
    place = torch.where(some, place[source], 0)
    slot = torch.where(some, slot[source], 0)
    for held, tensor, scale in zip(caches, new, scales, strict=True):
        numbers = tensor.transpose(1, 2)  # [B, Lnew, Hkv, width]
        if isinstance(scale, Tensor):
            numbers = numbers.float() / scale[:, None, :, None].float()
        elif scale != 1.0:
            numbers = numbers.float() / scale
        numbers = _stored(numbers, held.dtype).flatten(0, 1)[source]
        # 8-bit numbers move as bytes: not every device can index them.
        raw = held.view(torch.uint8) if held.dtype.itemsize == 1 else held
        if page_table is None:
            raw[place, :, slot] = torch.where(some, numbers, raw[0, :, 0])
        else:
            raw[place, slot] = torch.where(some, numbers, raw[0, 0])


def _stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as a cache holds them; of an 8-bit one, their bytes."""
    if dtype.itemsize != 1:
        return numbers.to(dtype)
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest).to(dtype).view(torch.uint8)


def flex_pages(cache: Tensor, page_size: int) -> Tensor:
    """The cache of ``torch.nn.attention.experimental``'s ``PagedAttention`` as pages.

    Args:
        cache: ``[1, H, pages * page_size, width]``, as its ``assign`` writes it.
        page_size: of the PagedAttention.

    Returns:
        A view ``[pages, page_size, H, width]`` of the same memory.

    Raises:
        InputError: another shape.
    """
    if cache.dim() != 4 or cache.size(0) != 1 or page_size < 1 or cache.size(2) % page_size:
        raise InputError(
            f"cache must be [1, heads, pages * page_size, width] with page_size = {page_size}, "
            f"but got {tuple(cache.shape)}."
        )
    return cache[0].unflatten(1, (-1, page_size)).permute(1, 2, 0, 3)


def flex_page_table(paged: Any, batch_index: Tensor) -> Tensor:
    """Rows ``batch_index`` ``[B]`` of the page table of a ``PagedAttention``; -1 where it has no page."""
    return paged.page_table[batch_index.to(paged.page_table.device)]
