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

    Source: Goodnight, "A Tutorial on the SWEEP Operator", The American Statistician 33 (1979).
    """
    width = matrix.size(-1)
    position = torch.arange(width, dtype=torch.int32, device=matrix.device)
    for step in range(width):
        chosen = position == step
        unit = chosen.to(matrix.dtype)
        row, column = matrix[..., step, :], matrix[..., :, step]
        scale = 1.0 / row[..., step : step + 1]
        row = torch.where(chosen, scale, row * scale)
        # The chosen row becomes `row` itself: 0 - (0 - 1) * row.
        column = torch.where(chosen, -unit, column)
        rest = torch.where(chosen[:, None] | chosen, 0.0, matrix)
        matrix = rest - column[..., :, None] * row[..., None, :]
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
