"""The operator that writes new keys and values into caches, behind those that each sequence has.

Compiled for a GPU it is a kernel of its own, or a part of the decode kernel that reads the same caches next
(:mod:`.inductor_decode`). Here it is in plain torch, without a word from the device: what it must leave out it does not know.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_factor: float,
    value_factor: float,
    cache_salt: str,
) -> None:
    """Write new keys and values behind those of each sequence, in place; see :data:`append`."""
    batch, _, length, _ = key.shape
    cache, cache_seqlens = key_cache, lengths
    scales = (key_factor if key_scale is None else key_scale, value_factor if value_scale is None else value_scale)
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
    for held, tensor, scale in zip((key_cache, value_cache), (key, value), scales, strict=True):
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


append = torch.library.custom_op("parallax::append", _append, mutates_args=("key_cache", "value_cache"))
"""Write new keys and values behind those of each sequence, in place.

Args:
    key_cache, value_cache: as for :mod:`.decode`; key, value: ``[B, Hkv, Lnew, width]``.
    lengths: keys of each sequence before, ``[B]``; page_table, key_scale, value_scale: as for :mod:`.decode`.
    key_factor, value_factor: scales that are numbers, where those are None.
    cache_salt: not used here; see :data:`~.cache_key.CACHE_SALT`.

What would lie past the capacity, or on a page that does not exist, is left out.
"""


@append.register_fake
def _(key_cache: Tensor, *rest: object) -> None:
    from . import register_lowerings

    register_lowerings()  # whoever traces a call comes here
