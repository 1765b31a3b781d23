"""The choice of a solver: how the systems of solved probes are solved where the keys are streamed, by what each way costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .plan_stages import Algorithm

EXPECTED_ITERATIONS = 16
"""Steps that a solve is expected to take, for its cost: rows stop by their residual (the first ``2 D`` rows take more)."""

# Costs of a solve in multiply-adds of the tensor cores, of which an H100's multiprocessor has 2048 a clock: an operation in
# float32 (128 a clock), and a weight: its exponential (16 a clock) and the operations around it. At D = 64 and 128 a step of
# conjugate gradients took 1.4 and 1.9 times as long as this says (benchmarks/NOTES.md).
_FLOAT32_COST = 16
_WEIGHT_COST = 256
# Operations on a product of two key entries until it is two 16-bit terms, and on an entry of a matrix in one of its sweeps.
_PAIR_OPERATIONS = 8
_SWEEP_OPERATIONS = 6
_WORTH_IT = 0.75  # of the cost of conjugate gradients, because these are estimates
_MATRIX_ENTRIES = 64 * 16 * 16  # that a tile's rows have together
WIDEST_DIRECT = 32
"""The widest keys whose matrices a tile of rows can hold in registers."""


@dataclass(frozen=True)
class SolveMethod:
    """How the systems of solved probes are solved where the keys are streamed.

    Attributes:
        direct: by factorising each row's matrix, and not by conjugate gradients.
        reason: why.
    """

    direct: bool
    reason: str

    @property
    def stage(self) -> str:
        """The stage, a template."""
        return "core_solve_direct" if self.direct else "core_solve"

    @property
    def algorithm(self) -> Algorithm:
        """What the plan calls it."""
        return "direct solve" if self.direct else "conjugate gradients"


def asked_direct(options: Mapping[str, Any]) -> bool | None:
    """What the user's ``kernel_options`` say of the solver; None where they say nothing."""
    found: bool | None = options.get("solve_DIRECT", options.get("DIRECT"))
    return found


def solve_method(width: int, keys: Any, asked: bool | None = None) -> SolveMethod:
    """Choose the solver of a call's systems by what each costs for a row and a key, but for what both do.

    Conjugate gradients meet every key in each step: the weight, ``k.x`` and the weights times the keys, three products of
    width D. The direct solve meets them twice: for the matrix, whose D x D entries are one product for all rows of a tile (in
    three terms), and for the residual; and it inverts the matrix, D^3 for each row, the same for any number of keys.

    Args:
        width: ``D``.
        keys: that a row may see, perhaps a symbol: many.
        asked: the user's choice (``kernel_options["DIRECT"]``).
    """
    if asked is not None:
        return SolveMethod(asked, "kernel_options ask for it")
    if width > WIDEST_DIRECT:
        return SolveMethod(False, f"the matrices of a tile's rows fit into registers up to D = {WIDEST_DIRECT}")
    padded = max(16, 1 << (width - 1).bit_length())
    steps = min(EXPECTED_ITERATIONS, width)
    iterated = steps * (3 * padded + _WEIGHT_COST)
    rows = _MATRIX_ENTRIES // padded**2
    pairs = padded**2 * (3 + _PAIR_OPERATIONS * _FLOAT32_COST / rows)
    direct = pairs + 6 * padded + 2 * _WEIGHT_COST
    if _known_size(keys):
        direct += _SWEEP_OPERATIONS * _FLOAT32_COST * padded**2 * width / max(1, int(keys))
    compared = f"a direct solve costs about {direct / iterated:.1f} times {steps} steps of conjugate gradients"
    return SolveMethod(direct <= _WORTH_IT * iterated, compared)


def _known_size(size: Any) -> bool:
    """Whether a size is a number, Python's or the compiler's, and not a symbol."""
    return isinstance(size, int) or bool(getattr(size, "is_Integer", False))
