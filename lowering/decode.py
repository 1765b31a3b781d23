"""The decode operator: the core for few query rows against a cache of keys that may be longer than it is filled.

Its results are those of the core (:mod:`.operator`) on each sequence's own keys; it differs in where the keys lie (a
cache with a length for each sequence, perhaps of pages, perhaps in 8 bits) and in how the work is cut
(:func:`.plan_split.decode_cut`). It is for inference: it has no gradient.

Shapes: ``query, probe [B, Hq, Lq, D]``; a cache of keys ``[B, Hkv, capacity, D]``, or with a page table
``[pages, page size, Hkv, D]``; values likewise with ``Dv``. Row ``i`` of sequence ``b`` has the position ``length - Lq + i``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from . import decode_blocks, dense
from .mod_operator import COVARIANCE, SCORE, Mod, ModOperator, ModPlace, statistics_dtype
from .operator import empty_in_layout_of

_TENSORS = 8  # of the operator's arguments, the first


# --- caches in plain torch ------------------------------------------------------------------------------------------


def totals(lengths: Tensor, new_keys: int, capacity: Any) -> Tensor:
    """Keys of each sequence with those that the call appended, int64 ``[B]``."""
    return (lengths.to(torch.int64).clamp(min=0) + new_keys).clamp(max=capacity)


def capacity_of(cache: Tensor, page_table: Tensor | None) -> Any:
    """Keys that a sequence can have."""
    return cache.size(2) if page_table is None else page_table.size(1) * cache.size(1)


def gathered(
    cache: Tensor, page_table: Tensor | None, scale: Tensor | float, total: Tensor, dtype: torch.dtype
) -> Tensor:
    """A cache as one tensor ``[B, Hkv, capacity, width]`` of ``dtype``; 0 where no key is."""
    if page_table is not None:
        pages = page_table.to(torch.int64).clamp(0, cache.size(0) - 1)
        # 8-bit numbers move as bytes: not every device can index them.
        held = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
        cache = held[pages].view(cache.dtype).flatten(1, 2).transpose(1, 2)
    found = cache.to(dtype)
    if isinstance(scale, Tensor):
        found = found * scale[:, :, None, None].to(dtype)
    elif scale != 1.0:
        found = found * scale
    present = torch.arange(found.size(2), device=found.device) < total[:, None]
    # What lies behind the last key may be anything, NaN too.
    return torch.where(present[:, None, :, None], found, 0.0)


def at_positions(mod: Mod, *, score: bool, rows: Any) -> Mod:
    """A mod over row numbers ``0 .. Lq`` of one over positions: its first captured tensor is the total lengths ``[B]``."""

    def moved(*arguments: Any) -> Any:
        given, (b, h, q_idx, kv_idx, total, *captured) = arguments[:score], arguments[score:]
        return mod(*given, b, h, (total[b] - rows + q_idx).clamp(min=0).to(q_idx.dtype), kv_idx, *captured)

    return moved


def within_keys(mask_mod: Mod, rows: Any) -> Mod:
    """The mask over row numbers, first captured tensor as in :func:`at_positions`: keys that are there, for rows that are."""
    positioned = at_positions(mask_mod, score=False, rows=rows)

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, total: Tensor, *captured: Any) -> Tensor:
        present = (kv_idx < total[b]) & (total[b] - rows + q_idx >= 0)
        return positioned(b, h, q_idx, kv_idx, total, *captured) & present

    return keep


def as_core(arguments: tuple, dtype: torch.dtype | None = None) -> tuple:
    """The arguments of the core's forward that a decode call's stand for: gathered caches, mods over row numbers."""
    query, key, value, probe, lengths, page_table, key_scale, value_scale = arguments[:_TENSORS]
    score_mod, covariance_mod, mask, scale, intercept, _, options, *buffers = arguments[_TENSORS:]
    rows = query.size(2)
    total = totals(lengths, options["new_keys"], capacity_of(key, page_table))
    factors = (
        options["key_factor"] if key_scale is None else key_scale,
        options["value_factor"] if value_scale is None else value_scale,
    )
    keys, values = (
        gathered(cache, page_table, factor, total, dtype or query.dtype)
        for cache, factor in zip((key, value), factors, strict=True)
    )
    mods = [at_positions(mod, score=True, rows=rows) for mod in (score_mod, covariance_mod)]
    *lists, kv_block, mask_mod = mask
    if lists[0] is not None:
        group = query.size(1) // keys.size(1)
        mask_mod = decode_blocks.within_lists(tuple(lists), kv_block, mask_mod, group)
    block_mask = (*(None,) * 8, 1, 1, within_keys(mask_mod, rows))
    captured = [(total, *extra) for extra in buffers]
    return query, keys, values, probe, *mods, block_mask, scale, intercept, False, {}, *captured


def _dense(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    probe: Tensor | None,
    lengths: Tensor,
    page_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    score_mod: Mod,
    covariance_mod: Mod,
    mask: tuple,
    scale: float,
    intercept: bool,
    save_statistics: bool,
    options: dict[str, Any],
    score_mod_buffers: tuple = (),
    covariance_mod_buffers: tuple = (),
    mask_mod_buffers: tuple = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend: the operator's meaning, in plain torch.

    Args:
        query, key_cache, value_cache, probe: see the module; the caches in query's dtype or float8_e4m3fn.
        lengths: keys of each sequence before those that the call appended, int ``[B]``; clamped to the capacity.
        page_table: int ``[B, most pages of a sequence]``, or None; its entries are clamped to the cache.
        key_scale, value_scale: factors of what the caches hold, ``[B or 1, Hkv or 1]`` expanded to ``[B, Hkv]``; None is 1.
        score_mod, covariance_mod: as for the core, at the positions of the rows and keys in their sequence.
        mask: lists of blocks (:func:`.decode_blocks.lists_of`) or four times None, keys of a block, and the predicate.
        scale, intercept: as for the core.
        save_statistics: whether LSE and the mean probe score are wanted; else they are empty.
        options: ``new_keys`` (keys that the call appended, which ``lengths`` does not count), ``window`` (how far back a
            row sees, None: to the start), ``key_factor`` and ``value_factor`` (scales that are numbers), beside the user's
            kernel options.

    Returns:
        ``(out, lse, probe_mean)`` of the rows of a batch against their caches.
    """
    tensors = (query, key_cache, value_cache, probe, lengths, page_table, key_scale, value_scale)
    mods, switches = (score_mod, covariance_mod, mask), (scale, intercept, save_statistics, options)
    buffers = (score_mod_buffers, covariance_mod_buffers, mask_mod_buffers)
    out, _, lse, mean = dense.forward(*as_core((*tensors, *mods, *switches, *buffers), statistics_dtype(query)))
    return (out, lse, mean) if save_statistics else (out, *empty_statistics(lse))


def empty_statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for LSE and mean where they are not wanted."""
    return like.new_empty(0), like.new_empty(0)


# --- the operator ---------------------------------------------------------------------------------------------------


def _fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    save_statistics = rest[_TENSORS + 2]
    shape = query.shape[:3] if save_statistics else (0,)
    dtype = statistics_dtype(query)
    out = empty_in_layout_of(query, value_cache.size(3))
    return out, query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)


_MASK = ModPlace("mask_mod", "mask", -1, "mask_mod_buffers", "mask")

attention_decode = ModOperator("parallax_attention_decode", _dense, _fake, (SCORE, COVARIANCE, _MASK))
"""``(out, lse, probe_mean)`` of the rows of a batch against their caches."""

attention_decode.register_dynamo()


@attention_decode.py_impl(DispatchKey.Autograd)
def _no_gradient(*arguments: Any) -> Any:
    # Calls that would need a gradient are refused before they come here (parallax_compile/decoding.py).
    with torch._C._AutoDispatchBelowAutograd():
        return attention_decode(*arguments)
