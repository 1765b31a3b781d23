"""Caches of other libraries, seen as ours.

A cache is ``[B, Hkv, capacity, width]``; with a page table it is a pool of pages ``[pages, page size, Hkv, width]``
(vLLM's order), and row ``b`` of the table names the pages of sequence ``b`` in their order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .errors import InputError

__all__ = ["flex_page_table", "flex_pages"]


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
