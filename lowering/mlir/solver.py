"""The rows' ridge systems by a fixed number of steps, in operations that every dialect has.

torch-mlir lowers no factorisation and no solve, and miscompiles a loop with a condition; ``D`` sweeps need neither. The
systems are symmetric positive definite (a ridge is positive), so that no pivot is searched for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["inverse", "refined", "solve"]


def inverse(matrix: Tensor) -> Tensor:
    """The inverse of symmetric positive definite matrices ``[..., D, D]`` by ``D`` sweeps (Gauss-Jordan in place).

    Each sweep is on the first row and column, which then move to the end, so that all steps are the same program: IREE
    compiles it once, whatever ``D``.

    Source: Goodnight, "A Tutorial on the SWEEP Operator", The American Statistician 33 (1979).
    """
    width = matrix.size(-1)
    if width == 1:
        return 1.0 / matrix
    for _ in range(width):
        scale = 1.0 / matrix[..., :1, :1]
        row, column, rest = matrix[..., :1, 1:] * scale, matrix[..., 1:, :1], matrix[..., 1:, 1:]
        upper = torch.cat([rest - column * row, -column * scale], -1)
        matrix = torch.cat([upper, torch.cat([row, scale], -1)], -2)
    return matrix


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``x`` of ``matrix x = right``, ``[..., D, D]`` and ``[..., D]``, differentiable in both.

    In the place of ``torch.linalg.solve`` in :func:`parallax_compile.reference.attention`.
    """
    return refined(inverse(matrix.detach()), right, lambda x: right - (matrix @ x[..., None])[..., 0])


def refined(inverse_matrix: Tensor, right: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """``found + M^-1 (b - M found)``: a step of refinement, and in its second term the whole gradient.

    Args:
        inverse_matrix: ``M^-1``, a constant of differentiation (implicit differentiation needs no more).
        right: ``b``.
        error: ``x -> b - M x``, differentiable in what ``b`` and ``M`` depend on.
    """
    found = (inverse_matrix @ right.detach()[..., None])[..., 0]
    return found + (inverse_matrix @ error(found)[..., None])[..., 0]
