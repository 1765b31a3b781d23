"""The declared space of each stage that a search goes through, and the estimates that keep it small.

A space is axes and what cannot be good of their product; a stage without one of its own is searched around its rows of the
table. Estimates are of what a candidate holds at once: shared memory (:func:`.candidates.shared_memory`) and registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .candidates import Candidate, padded, shared_memory, specialized_table, table
from .targets import Target

__all__ = ["EFFORTS", "SPACES", "Effort", "Space", "explore", "registers", "staying"]


class Effort(NamedTuple):
    """How much a search tries at most of a stage: candidates (None: all), rounds of timing, and samples of a round."""

    candidates: int | None
    rounds: int
    samples: int


_REGISTERS_OF_A_THREAD = 255


@dataclass(frozen=True)
class Space:
    """The axes of one stage.

    Attributes:
        block_m, block_n, num_warps, num_stages: values to combine.
        tma: whether loops may read through tensor descriptors.
        stays: which side's tiles stay in a block, ``m`` or ``n``.
        held: how many of the tiles that stay may be kept in registers, without and with a probe.
        spills: whether state outside of the inner loop may spill, so that the register estimate does not count.
    """

    block_m: tuple[int, ...] = (32, 64, 128)
    block_n: tuple[int, ...] = (32, 64, 128)
    num_warps: tuple[int, ...] = (4, 8)
    num_stages: tuple[int, ...] = (2, 3, 4)
    tma: tuple[bool, ...] = (False, True)
    stays: Literal["m", "n"] = "m"
    held: tuple[int, int] = (0, 0)
    spills: bool = False


SPACES: dict[str, Space] = {
    "core_forward": Space(held=(1, 2)),
    "core_backward_query": Space(held=(2, 3)),
    "core_backward_key": Space(stays="n", held=(2, 2)),
    "core_solve": Space(num_stages=(2, 3), spills=True),
    "scan_totals": Space(block_m=(32, 64), num_stages=(2, 3, 4), tma=(False,)),
    "scan_product": Space(block_m=(32, 64), num_stages=(2, 3, 4), tma=(False,)),
}
"""Stage -> its space."""

EFFORTS: dict[str, Effort] = {"quick": Effort(10, 4, 5), "normal": Effort(32, 8, 6), "full": Effort(None, 12, 10)}
"""By name, in the order of how much they try."""


def explore(
    stage: str, width: int, value_width: int, itemsize: int, has_probe: bool, target: Target | None = None
) -> list[Candidate]:
    """The candidates of a stage's space, the tables' first; without those that ``target`` cannot hold by estimate.

    Then every tile once, those first that read little for what they compute, then every tile in its second variant (pipeline,
    copies, what is held), and so on: a search that stops early has seen all tiles.
    """
    rows = table(stage, width, value_width, itemsize, has_probe)
    rows += specialized_table(stage, width, value_width, has_probe) if itemsize == 2 else []
    space = SPACES.get(stage)
    found = list(_around(rows)) if space is None else list(_combined(space))
    if space is not None:
        found = [c for c in found if _worth_it(space, stage, c, width, value_width, has_probe)]

    def tile(candidate: Candidate) -> tuple[float, int, int]:
        m, n = candidate.block_m, candidate.block_n
        return -m * n / (m + n), m, n

    def variant(candidate: Candidate) -> tuple[int, int, bool]:
        return candidate.held, abs(candidate.num_stages - 3), not candidate.tma

    tiles = [sorted(group, key=variant) for _, group in itertools.groupby(sorted(found, key=tile), key=tile)]
    turns = itertools.zip_longest(*tiles)
    ordered = dict.fromkeys([*rows, *(candidate for turn in turns for candidate in turn if candidate is not None)])

    def fits(candidate: Candidate) -> bool:
        if target is None:
            return True
        needed = shared_memory(stage, candidate, width, value_width, itemsize, int(has_probe))
        able = target.capability[0] == 9 if candidate.specialized else target.capability >= (9, 0) or not candidate.tma
        return able and needed <= target.shared_memory_per_block

    return list(filter(fits, ordered))


def registers(stage: str, candidate: Candidate, width: int, value_width: int, has_probe: bool) -> float:
    """Estimate of the 32-bit registers of a thread for what is held through the inner loop: accumulators, scores, tiles."""
    d, dv, bm, bn = padded(width), padded(value_width), candidate.block_m, candidate.block_n
    probes = int(has_probe)
    if stage == "core_forward":
        held = bm * dv * (1 + probes) + bm * bn * (1 + probes)
    elif stage == "core_backward_query":
        held = bm * d * (1 + probes) + bm * bn * (1 + probes)
    elif stage == "core_backward_key":
        held = bn * (d + dv) + bm * bn * (1 + probes)
    elif stage == "core_solve":
        held = bm * d + 2 * bm * bn
    else:  # a scan: BLOCK_N columns of the values
        held = (d + bm) * bn + bm * bm
    # Operands in registers are 16-bit.
    held += candidate.held * (bn if stage == "core_backward_key" else bm) * d // 2
    return held / (32 * candidate.num_warps)


def staying(stage: str, candidate: Candidate) -> int:
    """Rows of the tiles that stay in a block while the others stream: those of its matrix products' left operands."""
    space = SPACES.get(stage)
    return candidate.block_n if space is not None and space.stays == "n" else candidate.block_m


def _combined(space: Space) -> Iterator[Candidate]:
    for held in range(max(space.held) + 1):
        axes = (space.block_m, space.block_n, space.num_warps, space.num_stages, space.tma)
        for m, n, warps, stages, tma in itertools.product(*axes):
            yield Candidate(m, n, warps, stages, tma, held)


def _worth_it(space: Space, stage: str, candidate: Candidate, width: int, value_width: int, has_probe: bool) -> bool:
    """Whether a candidate may be good: its warps have the rows of an instruction each, and its registers hold it."""
    if candidate.held > space.held[has_probe] or (candidate.num_warps == 8) != (staying(stage, candidate) == 128):
        return False
    small = candidate.block_m * candidate.block_n < (2048 if max(width, value_width) <= 128 else 512)
    if small or (candidate.num_stages == 4 and candidate.block_m * candidate.block_n > 4096):
        return False
    return space.spills or registers(stage, candidate, width, value_width, has_probe) <= _REGISTERS_OF_A_THREAD


def _around(rows: list[Candidate]) -> Iterator[Candidate]:
    """Neighbours of the table's rows: half and double of each size, one stage less and more, half and double the warps."""
    for row in rows:
        for factor in (0.5, 2):
            for name in ("block_m", "block_n"):
                size = int(getattr(row, name) * factor)
                if 16 <= size <= 256:
                    yield replace(row, **{name: size})  # type: ignore[arg-type]
            warps = int(row.num_warps * factor)
            if 1 <= warps <= 8:
                yield replace(row, num_warps=warps)
        for stages in (row.num_stages - 1, row.num_stages + 1):
            if 1 <= stages <= 5:
                yield replace(row, num_stages=stages)
