"""The resource model: an estimate, for want of a measurement, of the share of a GPU's rate that a kernel reaches.

It knows five things that cost: too few warps to hide latency, tiles with fewer rows than the matrix instructions take, tiles
that read much for what they compute, spills, and blocks that do not divide among the multiprocessors. Its constants were set by
eye to the shares that the kernels reach on an H100 (benchmarks/NOTES.md); it ranks candidates, and no claim of speed rests on
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .codegen import GeneratedKernel, Trial
from .cubin import Resources
from .space import staying
from .targets import Target

__all__ = ["ModelTimer", "blocks_per_sm", "efficiency"]

_BEST = 0.8  # of the data sheet's rate: what large matrix products reach
_ENOUGH_WARPS = 8  # of a multiprocessor
_RESERVED_SHARED_MEMORY = 1024  # bytes that the driver takes of each block


def blocks_per_sm(resources: Resources, target: Target) -> int:
    """How many blocks of a kernel one multiprocessor holds at once."""
    threads = 32 * resources.num_warps
    by_shared = target.shared_memory_per_sm // (resources.shared_memory + _RESERVED_SHARED_MEMORY)
    # Registers are given in portions of 8 for each thread.
    by_registers = target.registers_per_sm // (threads * 8 * math.ceil((resources.registers or 255) / 8))
    resident = min(by_shared, by_registers, target.threads_per_sm // threads)
    if resources.tensor_memory:
        # Given by powers of two, at least 32.
        columns = max(32, 1 << (resources.tensor_memory - 1).bit_length())
        resident = min(resident, target.tensor_memory_columns // columns)
    return max(0, resident)


def efficiency(
    tile: tuple[int, int], resources: Resources, target: Target, blocks: int | None = None, rows: int | None = None
) -> tuple[float, list[str]]:
    """Estimated share of the target's rate, and what it loses, the largest loss first.

    Args:
        tile: ``BLOCK_M, BLOCK_N``.
        blocks: of the whole launch; None takes them to divide evenly.
        rows: of a tile, that go into the matrix products as their rows (:func:`.space.staying`); None is ``BLOCK_M``.
    """
    resident = blocks_per_sm(resources, target)
    if not resident:
        return 0.0, ["a block does not fit into a multiprocessor: smaller tiles or fewer stages"]
    m, n = tile
    losses: list[tuple[float, str]] = []
    warps = resident * resources.num_warps
    if warps < _ENOUGH_WARPS:
        share = (warps / _ENOUGH_WARPS) ** 0.5
        losses.append((share, f"{warps} warps on a multiprocessor ({resident} blocks) hide little latency: smaller tiles, "
                              "or fewer stages, so that more blocks fit"))  # fmt: skip
    rows = rows or m
    if rows < target.matrix_rows:
        share = rows / target.matrix_rows
        losses.append((share, f"tiles of {rows} rows leave a part of each matrix instruction ({target.matrix_rows} rows) idle: "
                              "larger tiles"))  # fmt: skip
    reads = 1 / (1 + 12 * (m + n) / (m * n))
    losses.append((reads, f"tiles of {m}x{n} read {(m + n) / (m * n):.3f} rows for each pair: larger tiles read less"))
    if resources.spills:
        share = 1 / (1 + resources.spills / 1024)
        losses.append((share, f"{resources.spills} bytes of each thread spill: smaller tiles, or more warps"))
    if blocks:
        rounds = blocks / target.sm_count
        share = rounds / math.ceil(rounds)
        if share < 0.95:
            losses.append((share, f"{blocks} blocks on {target.sm_count} multiprocessors leave some idle: "
                                  f"{rounds:.2f} blocks for each"))  # fmt: skip
    whole = _BEST
    for share, _ in losses:
        whole *= share
    return whole, [text for share, text in sorted(losses) if share < 0.95]


class ModelTimer:
    """Ranks candidates by the model where there is no GPU to time them on: "times" are inverse shares, without a unit.

    Attributes:
        name: what ranks, for the provenance.
        tested: False: nothing is measured.
        resources: source of a trial -> what its kernel takes; filled in by the search.
    """

    name = "resource model"
    tested = False
    execute = None

    def __init__(self, target: Target) -> None:
        self.target = target
        self.resources: dict[str, Resources] = {}
        self._stage = ""

    def load(self, kernel: GeneratedKernel) -> None:
        """Take a graph's kernel as the one whose candidates are ranked."""
        self._stage = kernel.stage or ""

    def sample(self, trial: Trial, repeats: int) -> Sequence[float]:
        """The same estimate, ``repeats`` times."""
        candidate = trial.candidate
        share, losses = efficiency(
            (candidate.block_m, candidate.block_n),
            self.resources[trial.source],
            self.target,
            math.prod(trial.grid),
            staying(self._stage, candidate),
        )
        if not share:
            raise RuntimeError(losses[0])
        return [1.0 / share] * repeats

    def difference(self, trial: Trial, default: Trial) -> float:
        """Nothing ran."""
        return 0.0
