"""Library mods: frozen, importable, storable by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import register_mod

__all__ = ["alibi", "scale_by", "tanh_cap"]


@register_mod("tanh_cap")
@dataclass(frozen=True)
class TanhCap:
    """``cap * tanh(score / cap)``: scores stay within ``(-cap, cap)``."""

    cap: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cap) and self.cap > 0):
            raise ValueError(f"cap must be positive and finite, but got {self.cap}.")

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return self.cap * torch.tanh(score / self.cap)


@register_mod("alibi")
@dataclass(frozen=True)
class Alibi:
    """``score - slope_h * (q_idx - kv_idx)`` with ``slope_h = 2 ** (-8 (h + 1) / num_heads)`` (arXiv 2108.12409)."""

    num_heads: int

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, but got {self.num_heads}.")

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        slope = torch.exp2(-8.0 * (h + 1) / self.num_heads)
        return score - slope * (q_idx - kv_idx)


@register_mod("scale_by")
@dataclass(frozen=True)
class ScaleBy:
    """``factor * score``."""

    factor: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ValueError(f"factor must be finite, but got {self.factor}.")

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * self.factor


def tanh_cap(cap: float) -> TanhCap:
    """Soft cap at ``cap``, for scores or probe scores."""
    return TanhCap(cap)


def alibi(num_heads: int) -> Alibi:
    """ALiBi biases for ``num_heads`` query heads."""
    return Alibi(num_heads)


def scale_by(factor: float) -> ScaleBy:
    """A constant factor."""
    return ScaleBy(factor)
