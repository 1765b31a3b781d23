"""Kernel configurations of the decode kernel: a small table, filtered by what the target can hold. The first is the default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from .candidates import padded


@dataclass(frozen=True)
class DecodeCandidate:
    """Tile of keys and launch parameters of a decode kernel.

    Attributes:
        programs: of a multiprocessor, that the splits aim at.
        tma: whether tiles are read through tensor descriptors by the copy engine, not by pointers.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs: int
    tma: bool = False

    def groups(self, columns: int, itemsize: int) -> int:
        """Groups of a tile's keys: one for each warp where the tensor cores take numbers of ``itemsize`` bytes, else one.

        A warp of more ``columns`` could not hold all of their sums.
        """
        able = itemsize == 2 and columns <= COLUMNS_OF_A_WARP and not self.tma
        return self.num_warps if able and self.block_n >= _KEYS_OF_A_GROUP * self.num_warps else 1


# (bytes of a cached number, padded width up to) -> BLOCK_N, warps, stages, programs, tma, best first. Guesses, but for
# (2, 128), of which most were timed on an H100, and (1, 128), timed on an H200 (benchmarks/NOTES.md); `benchmarks/decode.py
# --sweep` times the rest.
_TABLE: dict[tuple[int, int], tuple[tuple[int, ...], ...]] = {
    (2, 64): ((64, 4, 4, 2), (128, 4, 3, 2), (64, 4, 3, 4), (32, 4, 4, 4)),
    (2, 128): (
        (64, 4, 4, 2),
        (64, 2, 4, 2),
        (64, 4, 3, 2),
        (64, 4, 4, 2, True),
        (128, 4, 3, 1),
        (32, 2, 4, 4),
    ),
    (2, 256): ((32, 4, 3, 2), (16, 4, 3, 2)),
    (1, 64): ((128, 4, 4, 2), (64, 4, 4, 4)),
    (1, 128): ((128, 8, 3, 2), (128, 4, 3, 2), (64, 4, 4, 2), (64, 4, 3, 3)),
    (1, 256): ((64, 4, 3, 1), (32, 4, 3, 2)),
    (4, 64): ((32, 4, 3, 2), (16, 4, 2, 2)),
    (4, 128): ((32, 8, 2, 2), (16, 4, 2, 2)),
    (4, 256): ((16, 8, 2, 1), (16, 4, 1, 1)),
}
# What comes before a row of the table where a multiprocessor has less to read than a tile of this one: more and shorter splits.
# Timed: (2, 128), one sequence of 512 keys and 8 heads.
_FEW_KEYS: dict[tuple[int, int], tuple[int, ...]] = {(2, 128): (32, 2, 4, 4), (1, 128): (64, 4, 4, 2)}
# And where at least two multiprocessors share a head: there every program ends with a sum over its warps and a merge, which are
# shorter for two warps; elsewhere four hide more. Timed on an H200 (benchmarks/NOTES.md).
_FEW_HEADS: dict[tuple[int, int], tuple[int, ...]] = {(2, 128): (64, 2, 4, 2)}
COLUMNS_OF_A_WARP = 16
"""Most columns, queries and probes, whose sums fit the registers of one warp beside the rest."""
_KEYS_OF_A_GROUP = 16  # at least: the rows of a tensor core's tile
_FIELDS = {
    "BLOCK_N": "block_n",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
    "PROGRAMS_PER_SM": "programs",
    "USE_TMA": "tma",
}


def decode_candidates(
    *,
    rows: int,
    width: int,
    value_width: int,
    itemsize: int,
    cache_itemsize: int,
    shared_memory_limit: int,
    tma: bool,
    options: Mapping[str, Any],
    keys: float = math.inf,
    heads: float = math.inf,
) -> list[DecodeCandidate]:
    """Feasible candidates of the decode kernel, best first, at least one.

    Args:
        rows: queries and probes of a program, the columns of its products.
        itemsize, cache_itemsize: bytes of a number of the queries, and of the caches.
        tma: whether the target has tensor descriptors and the caches are laid out as they need it.
        options: the user's ``kernel_options``.
        keys, heads: that a multiprocessor reads, of all sequences together.

    Raises:
        InputError: the user's options exceed the target's shared memory, or ask for descriptors where there can be none.
    """
    d, dv = padded(width), padded(value_width)
    row = next(limit for limit in (64, 128, 256) if max(d, dv) <= limit)
    forced = {field: options[name] for name, field in _FIELDS.items() if name in options}
    if forced.get("tma") and not tma:
        raise InputError(
            "kernel_options[USE_TMA] of decode needs a GPU of capability 9.0 or more, contiguous caches (no page table) whose "
            "keys lie at multiples of 16 bytes, and no key to append. Leave it out."
        )

    def memory(candidate: DecodeCandidate, in_flight: int) -> int:
        stream = candidate.block_n * (d + dv) * cache_itemsize * max(1, in_flight)
        # For float32, an 8-bit tile may be converted on its way, through a tile of the queries' numbers.
        converted = candidate.block_n * (d + dv) * itemsize if cache_itemsize < itemsize == 4 else 0
        return stream + converted + itemsize * rows * (d + candidate.block_n)

    def resident(candidate: DecodeCandidate) -> bool:
        # The tile that is computed on shares its buffer with one in flight, but for many columns, whose products (`wgmma`)
        # still read it when the next copy begins. A block has 1 kB more than it asks for.
        used = memory(candidate, candidate.num_stages - (rows <= COLUMNS_OF_A_WARP)) + 1024
        return candidate.programs * used <= shared_memory_limit + 1024

    found: list[DecodeCandidate] = []
    kind = min(cache_itemsize, 4), row
    first = []
    if kind in _FEW_KEYS and keys < _FEW_KEYS[kind][0] and "block_n" not in forced:
        first.append(_FEW_KEYS[kind])
    if kind in _FEW_HEADS and heads <= 0.5 and rows <= COLUMNS_OF_A_WARP:
        first.append(_FEW_HEADS[kind])
    for values in (*first, *_TABLE[kind]):
        candidate = DecodeCandidate(*values)  # type: ignore[arg-type]  # the fifth of a row is a bool
        if candidate.tma and not tma and "tma" not in forced:
            continue
        candidate = replace(candidate, **forced)
        # There are as many splits as programs that shall run at once: what does not fit would begin when the others end.
        while "num_stages" not in forced and candidate.num_stages > 2 and not resident(candidate):
            candidate = replace(candidate, num_stages=candidate.num_stages - 1)
        if candidate not in found:
            found.append(candidate)
    feasible = [candidate for candidate in found if memory(candidate, candidate.num_stages) <= shared_memory_limit]
    if feasible:
        return feasible
    smallest = replace(found[-1], num_stages=forced.get("num_stages", 1))
    if forced and memory(smallest, smallest.num_stages) > shared_memory_limit:
        raise InputError(
            f"kernel_options need more shared memory for decoding than the {shared_memory_limit} bytes of the target: "
            f"{smallest}. Make BLOCK_N or num_stages smaller."
        )
    return [smallest]
