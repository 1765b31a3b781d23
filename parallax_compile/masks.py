"""Library masks, and block masks made from block bounds.

A library mask is a ``mask_mod`` that knows, from the bounds of a block of rows and a block of keys, whether the block is
empty, full or mixed: its ``BlockMask`` is made without a tensor of ``Lq x Lk`` elements, in plain torch operations that
trace with dynamic lengths. Masks combine by ``&``; ``q_idx`` and ``kv_idx`` start at 0.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .lowering.scan import Prefix
from .spec import register_mod

__all__ = [
    "LibraryMask",
    "MaskMod",
    "all_of",
    "block_mask",
    "causal",
    "document",
    "document_ids",
    "from_kinds",
    "from_pairs",
    "full",
    "prefix_lm",
    "sliding_window",
]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Bounds:
    """First and last index of each block: rows ``[nQ, 1]``, keys ``[nKV]``; and the block sizes and lengths."""

    q_first: Tensor
    q_last: Tensor
    kv_first: Tensor
    kv_last: Tensor
    q_block: int
    kv_block: int
    q_length: int
    kv_length: int


class LibraryMask(abc.ABC):
    """A mask with block bounds: callable as a ``mask_mod``, combinable by ``&``. Subclass it for masks of your own."""

    @abc.abstractmethod
    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether the pair is allowed; on scalar or broadcastable index tensors."""

    @abc.abstractmethod
    def extent(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        """Whether a block may have an allowed pair, and whether all its pairs surely are; broadcastable to blocks."""

    def __and__(self, other: LibraryMask) -> LibraryMask:
        if not isinstance(other, LibraryMask):
            return NotImplemented
        return all_of(self, other)


@register_mod("mask.full")
@dataclass(frozen=True)
class Full(LibraryMask):
    """Every key is allowed."""

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= 0) & (kv_idx >= 0)

    def extent(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        everywhere = (bounds.q_first >= 0) & (bounds.kv_first >= 0)
        return everywhere, everywhere


@register_mod("mask.causal")
@dataclass(frozen=True)
class Causal(LibraryMask):
    """``kv_idx <= q_idx + offset``."""

    offset: int = 0

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx + self.offset >= kv_idx

    def extent(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        return (
            bounds.q_last + self.offset >= bounds.kv_first,
            bounds.q_first + self.offset >= bounds.kv_last,
        )


@register_mod("mask.sliding_window")
@dataclass(frozen=True)
class SlidingWindow(LibraryMask):
    """The last ``window`` keys up to the row's own: ``0 <= q_idx + offset - kv_idx < window``."""

    window: int
    offset: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be an int of at least 1 (it counts the row's own key), got {self.window!r}.")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx + self.offset - kv_idx
        return (distance >= 0) & (distance < self.window)

    def extent(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        nearest = bounds.q_first + self.offset - bounds.kv_last
        farthest = bounds.q_last + self.offset - bounds.kv_first
        return (farthest >= 0) & (nearest < self.window), (nearest >= 0) & (farthest < self.window)


@register_mod("mask.prefix_lm")
@dataclass(frozen=True)
class PrefixLM(LibraryMask):
    """Causal, but the first ``prefix_length`` keys are seen by every row."""

    prefix_length: int

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < self.prefix_length) | (q_idx >= kv_idx)

    def extent(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        return (
            (bounds.kv_first < self.prefix_length) | (bounds.q_last >= bounds.kv_first),
            (bounds.kv_last < self.prefix_length) | (bounds.q_first >= bounds.kv_last),
        )


@dataclass(frozen=True, eq=False)
class Document(LibraryMask):
    """Rows see keys of their own document. Holds a tensor, so it hashes by identity and does not serialise.

    Attributes:
        ids: document of each position, integer ``[L]`` or ``[B, L]``; queries and keys share positions.
        contiguous: a promise that each document is one run of positions, with which the sums of infinite bandwidth run.
    """

    ids: Tensor
    contiguous: bool = False

    def __post_init__(self) -> None:
        if self.ids.dim() not in (1, 2) or self.ids.is_floating_point():
            raise ValueError(f"ids must be integers [L] or [B, L], but got {self.ids.dtype} {tuple(self.ids.shape)}.")

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        ids = self.ids
        if ids.dim() == 1:
            return ids[q_idx] == ids[kv_idx]
        return ids[b, q_idx] == ids[b, kv_idx]

    def extent(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        ids = self.ids if self.ids.dim() == 2 else self.ids[None]
        q_low, q_high = _block_range(ids, bounds.q_block, bounds.q_length)
        kv_low, kv_high = _block_range(ids, bounds.kv_block, bounds.kv_length)
        q_low, q_high = q_low[:, None, :, None], q_high[:, None, :, None]
        kv_low, kv_high = kv_low[:, None, None, :], kv_high[:, None, None, :]
        overlap = (q_low <= kv_high) & (kv_low <= q_high)
        return overlap, (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low)


@register_mod("mask.all_of")
@dataclass(frozen=True)
class AllOf(LibraryMask):
    """What every one of ``parts`` allows."""

    parts: tuple[LibraryMask, ...]

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = self.parts[0](b, h, q_idx, kv_idx)
        for part in self.parts[1:]:
            allowed = allowed & part(b, h, q_idx, kv_idx)
        return allowed

    def extent(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        some, every = self.parts[0].extent(bounds)
        for part in self.parts[1:]:
            part_some, part_every = part.extent(bounds)
            some, every = some & part_some, every & part_every
        return some, every


def _block_range(ids: Tensor, block: int, length: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest id of each block of positions, ``[B, blocks]``; the last block is filled with its last id."""
    blocks = (length + block - 1) // block
    position = torch.arange(blocks * block, device=ids.device).clamp(max=length - 1)
    tiled = ids[:, position].unflatten(1, (blocks, block))
    return tiled.amin(-1), tiled.amax(-1)


def full() -> LibraryMask:
    """Every key."""
    return Full()


def causal(offset: int = 0) -> LibraryMask:
    """Keys up to the row's own position plus ``offset``."""
    return Causal(offset)


def sliding_window(window: int, offset: int = 0) -> LibraryMask:
    """The last ``window`` keys up to the row's own position plus ``offset``, that one counted."""
    return SlidingWindow(window, offset)


def prefix_lm(prefix_length: int) -> LibraryMask:
    """Causal, with a prefix of ``prefix_length`` keys that every row sees."""
    return PrefixLM(prefix_length)


def document(ids: Tensor, contiguous: bool = False) -> LibraryMask:
    """Keys of the row's own document.

    Args:
        ids: integer ``[L]`` or ``[B, L]``.
        contiguous: a promise, which is not checked, that each document is one run of positions, as in packed sequences
            (:func:`document_ids`). Members of infinite bandwidth then take linear time under a causal mask.
    """
    return Document(ids, contiguous)


def all_of(*parts: LibraryMask) -> LibraryMask:
    """What every one of ``parts`` allows; nested combinations are flattened."""
    flat: list[LibraryMask] = []
    for part in parts:
        flat += part.parts if isinstance(part, AllOf) else (part,)
    return AllOf(tuple(flat))


def reach(mask_mod: MaskMod | None) -> int | None:
    """How many positions a row sees at most before its own; None where there is no bound, or none is known.

    Args:
        mask_mod: the spec's mask; only library masks are recognised.
    """
    parts: tuple[Any, ...] = mask_mod.parts if isinstance(mask_mod, AllOf) else (mask_mod,)
    found = None
    for part in parts:
        if isinstance(part, SlidingWindow):
            own = max(0, part.window - 1 - part.offset)
            found = own if found is None else min(found, own)
    return found


def band(mask_mod: MaskMod | None) -> tuple[int | None, int | None]:
    """``(behind, ahead)``: row ``q`` sees keys from ``q + behind`` up to ``q + ahead``; None is no bound, or none known.

    Args:
        mask_mod: the spec's mask; only library masks are recognised.
    """
    parts: tuple[Any, ...] = mask_mod.parts if isinstance(mask_mod, AllOf) else (mask_mod,)
    behind = [part.offset - part.window + 1 for part in parts if isinstance(part, SlidingWindow)]
    ahead = [part.offset for part in parts if isinstance(part, (Causal, SlidingWindow))]
    return max(behind) if behind else None, min(ahead) if ahead else None


def prefix(mask_mod: MaskMod | None, q_length: int, kv_length: int) -> Prefix | None:
    """The keys of each row as a running prefix, where the mask is one: none, causal, or causal within contiguous documents.

    Args:
        mask_mod: the spec's mask; only library masks are recognised.
        q_length, kv_length: lengths.
    """
    parts: tuple[Any, ...] = mask_mod.parts if isinstance(mask_mod, AllOf) else (mask_mod,)
    documents: list[Document] = []
    causal_parts = 0
    for part in parts:
        if isinstance(part, Causal) and part.offset == 0:
            causal_parts += 1
        elif isinstance(part, Document) and part.contiguous:
            documents.append(part)
        elif part is not None and not isinstance(part, Full):
            return None
    if causal_parts == 0:
        return Prefix(whole=True) if not documents else None
    if q_length != kv_length:
        return None
    starts = None
    for part in documents:
        ids = part.ids if part.ids.dim() == 2 else part.ids[None]
        position = torch.arange(kv_length, device=ids.device, dtype=torch.int32)
        begins = torch.cat(
            [torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:kv_length] != ids[:, : kv_length - 1]], 1
        )
        own = torch.where(begins, position, 0).cummax(1).values
        starts = own if starts is None else torch.maximum(starts, own)
    return Prefix(whole=False, starts=starts)


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """Document of each position of a packed sequence, int32 ``[length]``.

    Args:
        cu_seqlens: starts of the documents and the total length, int ``[documents + 1]``, as flash_attn_varlen has it.
        length: the packed length; positions past the last start belong to one more document.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [documents + 1], but got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    position = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(position.dtype), position, right=True).to(torch.int32)


# --- block masks ----------------------------------------------------------------------------------------------------


def block_mask(
    mask_mod: MaskMod,
    B: int | None,  # noqa: N803  (torch's names)
    H: int | None,  # noqa: N803
    Q_LEN: int,  # noqa: N803
    KV_LEN: int,  # noqa: N803
    device: torch.device | str = "cpu",
    BLOCK_SIZE: int | tuple[int, int] = 128,  # noqa: N803
) -> BlockMask:
    """A torch ``BlockMask``; of a library mask from block bounds, of any other through ``create_block_mask``.

    Args:
        mask_mod: the mask.
        B, H: batch and query heads, for masks that depend on them; None broadcasts.
        Q_LEN, KV_LEN: lengths.
        device: where the lists live.
        BLOCK_SIZE: of both sides, or ``(q, kv)``; a multiple of 16.

    Raises:
        ValueError: a block size that is no multiple of 16.
    """
    sizes = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else (BLOCK_SIZE[0], BLOCK_SIZE[1])
    if sizes[0] % 16 or sizes[1] % 16 or min(sizes) < 16:
        raise ValueError(f"BLOCK_SIZE must be a multiple of 16, but got {BLOCK_SIZE}.")
    if torch.compiler.is_dynamo_compiling():
        return _build(mask_mod, B, H, Q_LEN, KV_LEN, torch.device(device), sizes)
    return _cached(mask_mod, B, H, Q_LEN, KV_LEN, torch.device(device), sizes)


def _build(
    mask_mod: MaskMod,
    batch: Any,
    heads: Any,
    q_length: int,
    kv_length: int,
    device: torch.device,
    sizes: tuple[int, int],
) -> BlockMask:
    if not isinstance(mask_mod, LibraryMask):
        return create_block_mask(
            mask_mod,
            batch,
            heads,
            q_length,
            kv_length,
            device=device,
            BLOCK_SIZE=sizes,  # type: ignore[arg-type]
        )
    q_first, q_last = _bounds(q_length, sizes[0], device)
    kv_first, kv_last = _bounds(kv_length, sizes[1], device)
    bounds = Bounds(q_first[:, None], q_last[:, None], kv_first, kv_last, *sizes, q_length, kv_length)
    some, every = mask_mod.extent(bounds)
    kinds = some.to(torch.int8) + (some & every).to(torch.int8)
    while kinds.dim() < 4:
        kinds = kinds[None]
    return from_kinds(kinds, (q_length, kv_length), sizes, mask_mod)


_cached = functools.lru_cache(maxsize=32)(_build)


def _bounds(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first = torch.arange((length + block - 1) // block, device=device) * block
    return first, (first + block - 1).clamp(max=length - 1)


def from_kinds(kinds: Tensor, lengths: tuple[int, int], block_size: tuple[int, int], mask_mod: MaskMod) -> BlockMask:
    """A ``BlockMask`` from the kind of each block: 0 empty, 1 partial, 2 full; int8 ``[B, H, q blocks, kv blocks]``."""
    partial, whole = kinds == PARTIAL, kinds == FULL
    kv_num_blocks, kv_indices = _lists(partial)
    full_kv_num_blocks, full_kv_indices = _lists(whole)
    q_num_blocks, q_indices = _lists(partial.mT)
    full_q_num_blocks, full_q_indices = _lists(whole.mT)
    return BlockMask(
        seq_lengths=lengths,
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
    )


def from_pairs(allowed: Tensor, pairs: Tensor, block_size: tuple[int, int] = (128, 128)) -> BlockMask:
    """A ``BlockMask`` of a mask that is there as a tensor: blocks where it allows nothing are not visited.

    Args:
        allowed: bool, broadcastable to ``pairs``; each dimension that it lacks is one block list less.
        pairs: the same mask expanded, bool ``[B, Hq, Lq, Lk]``.
        block_size: ``(q, kv)``.
    """
    q_length, kv_length = pairs.size(2), pairs.size(3)
    while allowed.dim() < 4:
        allowed = allowed[None]
    allowed = allowed.expand(-1, -1, q_length, kv_length)

    def blocks(filled: bool) -> Tensor:
        # Past the ends a block has what changes nothing about it.
        padding = (0, -kv_length % block_size[1], 0, -q_length % block_size[0])
        whole = torch.nn.functional.pad(allowed, padding, value=filled)
        return whole.unflatten(3, (-1, block_size[1])).unflatten(2, (-1, block_size[0]))

    some, every = blocks(False).any(5).any(3), blocks(True).all(5).all(3)
    kinds = some.to(torch.int8) + (some & every).to(torch.int8)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return pairs[b, h, q_idx, kv_idx]

    return from_kinds(kinds, (q_length, kv_length), block_size, mask_mod)


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and, first in each row, the ascending indices of the marked blocks; the last block's after them."""
    columns = blocks.size(-1)
    if columns == 0:
        return blocks.sum(-1, dtype=torch.int32), blocks.to(torch.int32)
    # The j-th marked block is where the running count passes j: a scan, whose maximum is the count, and a search. As kernels
    # of a compiled call they take a sixth of the time that a sort takes to compile.
    running = blocks.cumsum(-1, dtype=torch.int32)
    wanted = torch.arange(columns, dtype=torch.int32, device=blocks.device).expand(blocks.shape).contiguous()
    indices = torch.searchsorted(running, wanted, right=True, out_int32=True).clamp(max=columns - 1)
    return running.amax(-1), indices
