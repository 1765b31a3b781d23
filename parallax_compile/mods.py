"""Library mods: frozen, importable, storable by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spec import register_mod

__all__ = ["alibi", "scale_by", "tanh_cap"]


@torch.library.custom_op("parallax_compile::tanh_approx", mutates_args=())
def _tanh_approx(x: Tensor) -> Tensor:
    # Compiled for an NVIDIA GPU this is one instruction (lowering/elementwise.py); everywhere else it is tanh.
    return torch.tanh(x)


@_tanh_approx.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_tanh(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _differentiate_tanh(ctx: Any, grad: Tensor) -> Tensor:
    (output,) = ctx.saved_tensors
    return grad * (1 - output * output)


_tanh_approx.register_autograd(_differentiate_tanh, setup_context=_save_tanh)
_tanh_approx.register_vmap(lambda info, in_dims, x: (_tanh_approx(x), in_dims[0]))


@register_mod("tanh_cap")
@dataclass(frozen=True)
class TanhCap:
    """``cap * tanh(score / cap)``: scores stay within ``(-cap, cap)``.

    Attributes:
        approx: take ``tanh.approx.f32`` in kernels for NVIDIA GPUs: one instruction, with a relative error of at most 2**-11
            (PTX ISA), about what rounding to bfloat16 costs. Elsewhere it is the exact tanh.
    """

    cap: float
    approx: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cap) and self.cap > 0):
            raise ValueError(f"cap must be positive and finite, but got {self.cap}.")

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        scaled = score * (1.0 / self.cap)
        return self.cap * (_tanh_approx(scaled) if self.approx else torch.tanh(scaled))


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


def tanh_cap(cap: float, *, approx: bool = False) -> TanhCap:
    """Soft cap at ``cap``, for scores or probe scores; ``approx`` trades accuracy for speed (:class:`TanhCap`)."""
    return TanhCap(cap, approx)


def alibi(num_heads: int) -> Alibi:
    """ALiBi biases for ``num_heads`` query heads."""
    return Alibi(num_heads)


def scale_by(factor: float) -> ScaleBy:
    """A constant factor."""
    return ScaleBy(factor)
