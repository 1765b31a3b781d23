"""Kernel configurations to choose from: a small table for each stage, filtered by what the target can hold.

The first feasible candidate is the default; ``mode="max-autotune"`` times them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import InputError


@dataclass(frozen=True)
class Candidate:
    """Tile sizes and launch parameters of one kernel.

    Attributes:
        tma: whether loops read their tiles through tensor descriptors by the copy engine (Hopper and later), not by pointers.
        held: how many of the tiles that stay (query, probe; query, gradient, probe; key, value) are kept in registers.
        specialized: whether it is the stage's warp-specialised kernel for Hopper (Gluon), whose ``block_m`` rows are those of
            one of its two groups of warps.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    held: int = 0
    specialized: bool = False


_Row = tuple[tuple[int, ...], ...]
_TMA, _POINTERS = True, False

# (stage, is the dtype 16-bit, padded width up to) -> candidates, best first: BLOCK_M, BLOCK_N, warps, stages, tma, held.
# Widths are rounded up to a power of two. The 16-bit rows up to 128 are what a search on an H100 found
# (benchmarks/NOTES.md). What `plx.autotune` finds comes before all of them (tuned.py).
_TABLE: dict[tuple[str, bool, int], _Row] = {
    ("core_forward", True, 64): (
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 3, _TMA, 2),
        (128, 64, 8, 3),
        (64, 32, 4, 3),
    ),
    ("core_forward", True, 128): (
        (64, 64, 4, 2, _TMA),
        (128, 64, 8, 3),
        (128, 64, 8, 3, _TMA),
        (64, 64, 4, 2),
        (64, 32, 4, 3),
        (32, 32, 4, 2),
    ),
    ("core_forward", True, 256): ((64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2), (16, 32, 4, 1)),
    ("core_forward", False, 64): ((32, 32, 4, 2), (64, 32, 4, 2), (32, 16, 4, 2)),
    ("core_forward", False, 128): ((32, 16, 4, 2), (32, 32, 8, 2), (16, 16, 4, 1)),
    ("core_forward", False, 256): ((16, 16, 4, 1), (16, 16, 8, 1)),
    ("core_backward_query", True, 64): (
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3, _TMA, 3),
        (128, 64, 8, 2),
    ),
    ("core_backward_query", True, 128): (
        (64, 32, 4, 3, _TMA, 1),
        (64, 32, 4, 2, _POINTERS, 1),
        (64, 32, 4, 3),
        (64, 64, 4, 2, _TMA),
        (128, 64, 8, 2),
        (32, 32, 4, 2),
    ),
    ("core_backward_query", True, 256): ((32, 32, 8, 1), (64, 32, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    ("core_backward_query", False, 64): ((32, 32, 4, 2), (32, 16, 4, 2), (16, 16, 4, 1)),
    ("core_backward_query", False, 128): ((16, 16, 4, 1), (32, 16, 8, 1), (32, 16, 4, 1)),
    ("core_backward_query", False, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    ("core_backward_key", True, 64): (
        (64, 64, 4, 3),
        (32, 64, 4, 3, _POINTERS, 2),
        (64, 64, 4, 2, _POINTERS, 1),
        (64, 64, 4, 2),
        (64, 128, 8, 2),
    ),
    ("core_backward_key", True, 128): (
        (32, 64, 4, 3, _TMA, 1),
        (32, 64, 4, 2, _POINTERS, 1),
        (32, 64, 4, 2, _TMA, 1),
        (32, 64, 4, 2),
        (32, 128, 8, 2),
        (32, 32, 4, 2),
    ),
    ("core_backward_key", True, 256): ((32, 32, 8, 1), (32, 64, 8, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
    ("core_backward_key", False, 64): ((32, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
    ("core_backward_key", False, 128): ((16, 16, 4, 1), (16, 32, 8, 1), (16, 32, 4, 1)),
    ("core_backward_key", False, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    ("core_solve", True, 64): ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    ("core_solve", True, 128): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (32, 32, 4, 2)),
    ("core_solve", True, 256): ((32, 32, 8, 1), (16, 32, 4, 1)),
    ("core_solve", False, 64): ((32, 32, 4, 2), (16, 16, 4, 1)),
    ("core_solve", False, 128): ((16, 32, 4, 1), (16, 16, 4, 1)),
    ("core_solve", False, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    # Guesses, by registers, which the matrices of a tile's rows half fill (`_holds_matrices`). The values may be of any width.
    **{
        ("core_solve_direct", half, widest): (
            (64, 16, 4, 2),
            (128, 32, 8, 2),
            (32, 16, 4, 2),
            (16, 16, 8, 1),
            (32, 16, 8, 1),
        )
        for half in (True, False)
        for widest in (64, 128, 256)
    },
    # Of a scan, BLOCK_N is the number of the values' columns that a program takes.
    ("scan_totals", True, 64): ((64, 64, 4, 3), (64, 64, 4, 2)),
    ("scan_totals", True, 128): ((64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 3), (32, 32, 4, 2)),
    ("scan_totals", True, 256): ((64, 64, 8, 2), (32, 32, 4, 2), (32, 16, 4, 1)),
    ("scan_totals", False, 64): ((32, 32, 4, 2), (32, 16, 4, 1)),
    ("scan_totals", False, 128): ((32, 32, 8, 2), (16, 16, 4, 1)),
    ("scan_totals", False, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    ("scan_product", True, 64): ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
    ("scan_product", True, 128): ((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (32, 32, 4, 2)),
    ("scan_product", True, 256): ((64, 32, 8, 2), (32, 32, 4, 2), (32, 16, 4, 1)),
    ("scan_product", False, 64): ((32, 32, 4, 2), (32, 16, 4, 1)),
    ("scan_product", False, 128): ((32, 32, 8, 1), (16, 16, 4, 1)),
    ("scan_product", False, 256): ((16, 16, 8, 1), (16, 16, 4, 1)),
    # BLOCK_M is the chunk; of the systems BLOCK_N is not used.
    ("scan_states", True, 64): ((64, 64, 4, 3), (64, 64, 4, 2)),
    ("scan_states", True, 128): ((64, 64, 4, 2), (64, 128, 8, 2)),
    ("scan_states", True, 256): ((64, 64, 8, 2), (64, 32, 4, 1)),
    ("scan_states", False, 64): ((64, 32, 4, 1), (64, 16, 4, 1)),
    ("scan_states", False, 128): ((64, 32, 8, 1), (64, 16, 4, 1)),
    ("scan_states", False, 256): ((64, 16, 8, 1),),
    ("scan_systems", True, 64): ((64, 64, 4, 1), (32, 64, 4, 1)),
    ("scan_systems", True, 128): ((64, 64, 4, 1), (64, 64, 8, 1), (32, 64, 4, 1)),
    ("scan_systems", True, 256): ((32, 64, 8, 1), (16, 64, 8, 1)),
    ("scan_systems", False, 64): ((32, 64, 4, 1), (16, 64, 4, 1)),
    ("scan_systems", False, 128): ((16, 64, 4, 1),),
    ("scan_systems", False, 256): ((16, 64, 8, 1),),
}
# Without a probe a stage holds half of the accumulators and tiles, so that other tiles are best.
_TABLE_WITHOUT_PROBE: dict[tuple[str, bool, int], _Row] = {
    ("core_forward", True, 64): (
        (64, 128, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2, _TMA),
        (128, 64, 8, 3),
        (64, 32, 4, 3),
    ),
    ("core_forward", True, 128): (
        (64, 64, 4, 3, _TMA),
        (128, 128, 8, 2, _TMA),
        (128, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
    ),
    ("core_backward_query", True, 64): (
        (64, 64, 4, 3),
        (64, 64, 4, 3, _TMA, 2),
        (64, 64, 4, 2),
        (128, 64, 8, 2),
        (64, 32, 4, 3),
    ),
    ("core_backward_query", True, 128): (
        (128, 64, 8, 3),
        (128, 64, 8, 3, _TMA),
        (64, 64, 4, 2, _TMA),
        (64, 64, 4, 2),
        (64, 32, 4, 3),
    ),
    ("core_backward_key", True, 64): (
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3, _TMA, 2),
        (64, 128, 8, 3),
        (32, 64, 4, 3),
    ),
    ("core_backward_key", True, 128): (
        (64, 64, 4, 2, _TMA),
        (64, 64, 4, 2),
        (32, 64, 4, 3, _POINTERS, 1),
        (64, 128, 8, 3),
        (32, 64, 4, 3),
    ),
}

# (stage, has a probe, padded width up to) -> warp-specialised candidates, best first: rows of a streamed tile, stages.
# The forward's are from throwaway kernels on an H100, the order of those with a probe at 64 from an H200 (benchmarks/NOTES.md).
_SPECIALIZED_TABLE: dict[tuple[str, bool, int], tuple[tuple[int, int], ...]] = {
    ("core_forward", True, 64): ((128, 3), (64, 4)),
    ("core_forward", True, 128): ((64, 3),),
    ("core_forward", False, 64): ((128, 3),),
    ("core_forward", False, 128): ((128, 2),),
    ("core_backward_query", True, 64): ((64, 4),),
    ("core_backward_query", True, 128): ((64, 3),),
    ("core_backward_query", False, 64): ((128, 3), (64, 4)),
    ("core_backward_query", False, 128): ((64, 4),),
    ("core_backward_key", True, 64): ((64, 4),),
    ("core_backward_key", True, 128): ((64, 3), (64, 2)),
    ("core_backward_key", False, 64): ((64, 4),),
    ("core_backward_key", False, 128): ((64, 4), (64, 3)),
    ("core_solve", False, 64): ((64, 3),),
    ("core_solve", False, 128): ((64, 2),),
}

# float32 on the tensor cores.
_TABLE_TF32: dict[tuple[str, bool, int], _Row] = {
    ("scan_totals", False, 64): ((64, 64, 4, 2), (32, 32, 4, 2)),
    ("scan_totals", False, 128): ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
    ("scan_product", False, 64): ((64, 64, 4, 2), (32, 32, 4, 2)),
    # Those of 4 warps spill up to 670 bytes a thread, and are faster all the same.
    ("scan_product", False, 128): ((64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1)),
}

_OPTION_PREFIXES = {
    "core_forward": ("", "fwd_"),
    "core_solve": ("", "solve_"),
    "core_solve_direct": ("", "solve_"),
    "scan_totals": ("", "totals_"),
    "scan_product": ("", "scan_"),
    "scan_states": ("", "states_"),
    "scan_systems": ("", "systems_"),
    "core_backward_query": ("", "bwd_", "bwd_query_"),
    "core_backward_key": ("", "bwd_", "bwd_key_"),
}
_OPTION_FIELDS = {
    "BLOCK_M": "block_m",
    "BLOCK_N": "block_n",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
    "USE_TMA": "tma",
    "HELD_TILES": "held",
    "WARP_SPECIALIZED": "specialized",
}

SPECIALIZED_STAGES: dict[str, Literal["block_m", "block_n"]] = {
    "core_forward": "block_m",
    "core_backward_query": "block_m",
    "core_backward_key": "block_n",
    "core_solve": "block_m",
}
"""Stages that have a warp-specialised kernel beside Triton's -> the rows of the tile that stays with a group of four warps."""

SPECIALIZED_GROUPS = 2
"""Groups of four warps that share the streamed tiles of a warp-specialised kernel; each has a tile of its own that stays."""

SPECIALIZED_ROWS = 64
"""Rows of the tile that stays with a group."""


def padded(width: int) -> int:
    """The power of two, at least 16, that a kernel pads a head width to."""
    return max(16, 1 << math.ceil(math.log2(width)))


def shared_memory(stage: str, candidate: Candidate, width: int, value_width: int, itemsize: int, row_tiles: int) -> int:
    """Estimate, in bytes, of the shared memory that a candidate needs: the tiles that stay and the tiles in flight."""
    d, dv, bm, bn = padded(width), padded(value_width), candidate.block_m, candidate.block_n
    query_side = d * (1 + row_tiles)
    if candidate.specialized and stage == "core_solve":
        # Residual and solution; before and after, values take the place of one or both.
        stay, stream = bm * d, bn * candidate.num_stages
        passes = max(4 * bm * d + itemsize * stream * dv, itemsize * (bm + stream) * dv, 8 * bm * d)
        return itemsize * (stay + stream * d) + passes + 1024
    if candidate.specialized:
        # No scores, but barriers, the backward's row terms and mean keys, and what the forward's epilogue turns into rows.
        if SPECIALIZED_STAGES[stage] == "block_n":
            stay, stream, terms = bn * (d + dv), bm * (query_side + dv), 4 * bm * candidate.num_stages
        else:
            stay, stream = bm * (query_side + dv), bn * (d + dv)
            terms = 0 if stage == "core_forward" else SPECIALIZED_GROUPS * (4 * bm + d)
        return itemsize * (SPECIALIZED_GROUPS * stay + stream * candidate.num_stages) + 4 * terms + 1024
    if stage == "core_forward":
        stay, stream = bm * query_side, bn * (d + dv)
    elif stage == "core_solve":
        # The direction, or the solution in two terms beside the values.
        stay, stream = 3 * bm * d, bn * (d + dv)
    elif stage == "core_solve_direct":
        # The products of pairs of key entries, and the weights, in two terms.
        stay, stream = 3 * bm * d + 2 * bn * (d * d + bm), bn * (d + dv)
    elif stage == "scan_totals" or stage == "scan_states":
        stay, stream = 0, bm * (d + bn)
    elif stage == "scan_systems":
        stay, stream = d * d + (bm + bn) * d, 0
    elif stage == "scan_product":
        stay, stream = d * bn, bm * (2 * d + bn)
    elif stage == "core_backward_query":
        stay, stream = bm * (query_side + dv), bn * (d + dv)
    else:
        stay, stream = bn * (d + dv), bm * (query_side + dv)
    scores = bm * (bm if stage == "scan_product" else bn)
    return itemsize * (stay + stream * max(1, candidate.num_stages) + scores)


def candidates(
    stage: str,
    *,
    width: int,
    value_width: int,
    itemsize: int,
    row_tiles: int,
    shared_memory_limit: int,
    tma: bool = False,
    specialized: bool = False,
    tensor_memory: bool = False,
    crowded: bool = False,
    tf32: bool = False,
    q_block: int | None = None,
    kv_block: int | None = None,
    options: Mapping[str, Any] | None = None,
    listed: Sequence[Candidate] | None = None,
) -> list[Candidate]:
    """Feasible candidates for ``stage``, best first, at least one.

    Args:
        stage: a stage that is a template.
        width, value_width: ``D`` and ``Dv``.
        itemsize: bytes of an element of the inputs.
        row_tiles: how many tiles of rows are held beside the query's: the probe's and the adjoint's terms.
        shared_memory_limit: bytes that one block may use on the target.
        tma: whether the target has tensor descriptors and the tensors are laid out as they need it.
        specialized: whether the call is one that a warp-specialised kernel can compute, on a target that it is for.
        tensor_memory: whether products are accumulated in the target's tensor memory.
        crowded: whether a warp can take no more than 1024 numbers of a tile of rows: below capability 9 ptxas gives up on more
            of the systems with an intercept (32 registers and 35 kB of spills a thread on 8.0).
        tf32: whether float32 is multiplied as TF32, on the tensor cores.
        q_block, kv_block: sizes of the block mask's blocks, which tiles must divide; None without one.
        options: the user's ``kernel_options``; a more specific prefix wins over a less specific one.
        listed: candidates in place of the table's; may leave none.

    Raises:
        InputError: the user's options exceed the target's shared memory, do not divide the mask's blocks, or ask for
            tensor descriptors or a warp-specialised kernel where there can be none.
    """
    forced = forced_fields(stage, options or {})
    if forced.get("tma") and not tma:
        raise InputError(
            f"kernel_options[USE_TMA] of {stage} needs a GPU of capability 9.0 or more, query, key, value, probe and "
            "the gradient of out with contiguous rows at multiples of 16 bytes, and no C++ wrapper (AOTInductor). Leave it "
            "out, or copy with .contiguous()."
        )
    asked = forced.pop("specialized", None)
    # Tiles that are asked for are those of Triton's kernel.
    specialized = specialized and (asked or (asked is None and not forced))
    if asked and (stage in SPECIALIZED_STAGES or _names_stage(stage, "WARP_SPECIALIZED", options)):
        listed = specialized_table(stage, width, value_width, bool(row_tiles)) if listed is None else listed
        _check_specialized(stage, specialized and tma and bool(listed), forced)
    found: list[Candidate] = []
    for candidate in table(stage, width, value_width, itemsize, row_tiles, tf32) if listed is None else listed:
        if candidate.specialized and not specialized:
            continue
        if tensor_memory and stage == "core_solve_direct" and candidate.block_m > 32 and "block_m" not in forced:
            continue  # the matrices of 64 rows take more columns of it than there are; those of fewer rows stay in registers
        if candidate.tma and not tma and "tma" not in forced:
            continue
        if crowded and candidate.block_m * padded(width) > 1024 * candidate.num_warps:
            continue
        candidate = replace(candidate, **forced)
        if "block_m" not in forced and q_block is not None:
            candidate = replace(candidate, block_m=min(candidate.block_m, q_block & -q_block))
        if "block_n" not in forced and kv_block is not None:
            candidate = replace(candidate, block_n=min(candidate.block_n, kv_block & -kv_block))
        if candidate not in found:
            found.append(candidate)
    if forced:
        _check_forced(stage, found[0], q_block, kv_block)

    def fits(candidate: Candidate) -> bool:
        return shared_memory(stage, candidate, width, value_width, itemsize, row_tiles) <= shared_memory_limit

    feasible = [candidate for candidate in found if fits(candidate)]
    if feasible or listed is not None:
        return feasible
    # The last of each row is the smallest; with fewer stages it is the least that can be asked for.
    smallest = replace(found[-1], num_stages=forced.get("num_stages", 1))
    if forced and not fits(smallest):
        raise InputError(
            f"kernel_options need more shared memory for {stage} than the {shared_memory_limit} bytes of the target: "
            f"{smallest}. Make BLOCK_M, BLOCK_N or num_stages smaller."
        )
    return [smallest]


def table(
    stage: str, width: int, value_width: int, itemsize: int, row_tiles: int, tf32: bool = False
) -> list[Candidate]:
    """The table's candidates for a stage, best first, whether or not a target can hold them."""
    key = (stage, itemsize == 2, _row(width, value_width))
    special = _TABLE_WITHOUT_PROBE if not row_tiles else _TABLE_TF32 if tf32 and itemsize == 4 else {}
    rows = special.get(key) or _TABLE[key]
    if stage == "core_solve_direct":
        rows = tuple(row for row in rows if _holds_matrices(row, padded(width)))
    first = specialized_table(stage, width, value_width, bool(row_tiles)) if stage == "core_solve" else []
    return [*first, *(Candidate(*values) for values in rows)]  # type: ignore[arg-type]  # the fifth of a row is a bool


def _holds_matrices(row: tuple[int, ...], width: int) -> bool:
    """Whether a tile's matrices, one of ``width`` squared for each row, take half of the registers at most."""
    block_m, _, num_warps, *_ = row
    return block_m * width * width <= 128 * 32 * num_warps


def specialized_table(stage: str, width: int, value_width: int, probe: bool) -> list[Candidate]:
    """A stage's warp-specialised candidates, best first, taken where they are asked for or were measured to be best."""
    stays = SPECIALIZED_STAGES.get(stage)
    return [
        Candidate(
            *((SPECIALIZED_ROWS, streamed) if stays == "block_m" else (streamed, SPECIALIZED_ROWS)),
            4,
            stages,
            tma=True,
            specialized=True,
        )
        for streamed, stages in _SPECIALIZED_TABLE.get((stage, probe, _row(width, value_width)), ())
    ]


def stages() -> list[str]:
    """The stages that the table has candidates for."""
    return list(dict.fromkeys(stage for stage, _, _ in _TABLE))


def _row(width: int, value_width: int) -> int:
    widest = max(padded(width), padded(value_width))
    return next(limit for limit in (64, 128, 256) if widest <= limit)


def forced_fields(stage: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a candidate that ``kernel_options`` settle for a stage."""
    forced: dict[str, Any] = {}
    for prefix in _OPTION_PREFIXES[stage]:
        for name, attribute in _OPTION_FIELDS.items():
            if prefix + name in options:
                forced[attribute] = options[prefix + name]
    return forced


def _names_stage(stage: str, name: str, options: Mapping[str, Any] | None) -> bool:
    """Whether an option is asked of the stage itself, and not of every stage that has it."""
    return any(prefix + name in (options or {}) for prefix in _OPTION_PREFIXES[stage] if prefix)


def _check_specialized(stage: str, possible: bool, forced: Mapping[str, Any]) -> None:
    if not possible:
        raise InputError(
            f"kernel_options[WARP_SPECIALIZED] of {stage} needs a Hopper GPU (capability 9.x), a Triton with Gluon, "
            "bfloat16 inputs (of a forward without a probe and of a solver also float16) of widths up to 128 with contiguous "
            "rows at multiples of 16 bytes, a positive scale, mods that are arithmetic of score, indices and captured tensors "
            "without gradients (tanh: plx.mods.tanh_cap(approx=True)) and grow at most 1024 times as fast as their score, no "
            "solved probe in the backward, all gradients that a backward stage computes, a mask that only compares indices and "
            "captured tensors, mask blocks of whole 128 rows (a solver: 64), and no C++ wrapper (AOTInductor). Leave it out."
        )
    rows = SPECIALIZED_STAGES[stage].upper()
    for name, value in ((rows, SPECIALIZED_ROWS), ("num_warps", 4), ("USE_TMA", True), ("HELD_TILES", 0)):
        got = forced.get(_OPTION_FIELDS[name], value)
        if got != value:
            raise InputError(f"kernel_options[{name}] of a warp-specialised {stage} must be {value}, but got {got}.")


def _check_forced(stage: str, candidate: Candidate, q_block: int | None, kv_block: int | None) -> None:
    for name, tile, block in (("BLOCK_M", candidate.block_m, q_block), ("BLOCK_N", candidate.block_n, kv_block)):
        if block is not None and block % tile:
            raise InputError(
                f"kernel_options[{name}] = {tile} must divide the block mask's block size {block} ({stage}). "
                "Make it smaller, or the mask's blocks larger."
            )
