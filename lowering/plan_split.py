"""The choices of decoding: whether the keys of a call's rows are split, how they are cut, and who merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .plan_stages import Problem

# Decoding: rows of a program at most.
_MOST_ROWS = 32
# What the program of a head that arrives last may merge: so many rows, and states of splits, rows times splits. On an H200 two
# rows of 33 splits take 10.2 us so and 10.6 with a stage, four 11.1 and 10.7, sixteen 18.5 and 12.7.
_MERGED_BY_THE_LAST = 16
_MOST_STATES = 96
# More rows than these only where the sequences fill enough of the device that most have few splits: 8 and 16 rows of 8 to 32
# sequences, some of them long, take 2 to 8 % less so than with a stage.
_MERGED_WHATEVER_THE_SPLITS = 4
_FEW_SPLITS = 6
MOST_COUNTERS = 1 << 15
"""Heads of all sequences whose splits may count who is last (:mod:`.counters`)."""

# A call of the core with few rows, over many keys: there a program for each tile of rows would leave most of the device idle.
MOST_ROWS_TO_SPLIT = 16
FEWEST_KEYS_TO_SPLIT = 512
ONLY_OF_THE_CORE = ("BLOCK_M", "HELD_TILES", "WARP_SPECIALIZED")


def splits_keys(problem: Problem) -> bool:
    """Whether the output of a call comes from the decoding kernels: few rows, no gradient, many keys.

    Their programs take a split of a head's keys each, where those of ``core_forward`` take a tile of rows and all its keys.
    They save no value mean for a backward, and take one list of blocks for all rows of a key head.
    """
    able = problem.device != "cpu" and problem.needs_grad is None and not problem.own_lists and not problem.scans
    if not able or problem.split_keys is False or (problem.solved and not problem.covariance_mod):
        return False
    rows, keys = problem.q_length, problem.kv_length
    # Of a length that is a symbol: rows may be any number; keys are a cache that grows.
    few = isinstance(rows, int) and rows <= MOST_ROWS_TO_SPLIT
    many = not isinstance(keys, int) or keys >= FEWEST_KEYS_TO_SPLIT
    return bool(problem.split_keys) or (few and many)


def split_choice(options: Mapping[str, Any] | None) -> bool | None:
    """What the user's ``kernel_options`` say of splitting keys: ``SPLIT_KEYS``, or options that only ``core_forward`` has."""
    if options is None:
        return None
    if "SPLIT_KEYS" in options:
        return bool(options["SPLIT_KEYS"])
    for name in ONLY_OF_THE_CORE:
        if name in options or "fwd_" + name in options:
            return False
    return None


Merge = Literal["none", "kernel", "stage"]


@dataclass(frozen=True)
class Cut:
    """How a decode call's work is cut into programs: by rows here, by keys in the kernel, which alone knows the lengths.

    Attributes:
        rows: rows of a tile, a power of two; a row is one query of one of the heads that share a key head.
        row_tiles: tiles of rows of a key head.
        slots: programs of one tile of rows and one key head that the splits of all sequences are to fill.
        least_tiles: tiles of keys that a split has at least, where its sequence has that many.
        programs: programs of one tile of rows and one key head that are launched.
        merge: how the states of splits merge: there is one split of each sequence; by the program of a head that arrives last;
            or in a stage of its own.
    """

    rows: int
    row_tiles: int
    slots: int
    least_tiles: int
    programs: Any
    merge: Merge


def decode_cut(
    *,
    batch: Any,
    kv_heads: int,
    rows_of_head: int,
    most_keys: int | None,
    has_probe: bool,
    block_n: int,
    programs: int,
    least_tiles: int = 1,
    merge: Merge | None = None,
) -> Cut:
    """Cut a decode call.

    Args:
        batch: sequences, perhaps a symbol; rows_of_head: queries times query heads of a key head.
        most_keys: that a row can see: the capacity, or less under a window; None where it is a symbol.
        has_probe: a row's probe takes a second row of the tile.
        block_n: keys of a tile.
        programs: that fill the device.
        merge: the user's choice.
    """
    fewest = 4 if has_probe else 8  # the tensor cores take 8 columns
    rows = max(fewest, min(_MOST_ROWS, 1 << (rows_of_head - 1).bit_length()))
    row_tiles = -(-rows_of_head // rows)
    heads = kv_heads * row_tiles
    slots = max(1, -(-programs // heads))
    known = isinstance(batch, int)
    # A window, or the rows of a call, may begin inside of a tile.
    most_splits = None if most_keys is None else -(-(-(-most_keys // block_n) + 1) // least_tiles)
    if most_keys is not None and -(-most_keys // block_n) <= least_tiles:
        return Cut(rows, row_tiles, slots, least_tiles, batch, "none")
    launched = slots + batch
    if known and most_splits is not None:
        launched = min(launched, batch * most_splits)
    fits = row_tiles == 1 and rows_of_head <= _MERGED_BY_THE_LAST and known and batch * heads <= MOST_COUNTERS
    if not fits:
        merge = "stage"
    elif merge is None:
        splits = -(-launched // batch)
        few = rows_of_head <= _MERGED_WHATEVER_THE_SPLITS or splits <= _FEW_SPLITS
        merge = "kernel" if few and rows_of_head * splits <= _MOST_STATES else "stage"
    return Cut(rows, row_tiles, slots, least_tiles, launched, merge)


MERGES: dict[Merge, str] = {
    "none": "one split of each sequence: nothing to merge",
    "kernel": "keys are split to fill the device; the program of a head that arrives last merges its states",
    "stage": "keys are split to fill the device; too many rows and splits for one program to merge",
}
