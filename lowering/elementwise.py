"""Inductor lowerings of our elementwise operators."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .torch_compat_inductor import inductor


@inductor.register_lowering(torch.ops.parallax_compile.tanh_approx.default, type_promotion_kind=None)
def _lower_tanh_approx(x: Any) -> Any:
    """One instruction on an NVIDIA GPU, for float32; else tanh."""
    if x.get_device().type == "cuda" and x.get_dtype() == torch.float32:
        instruction = functools.partial(inductor.ops.inline_asm_elementwise, asm="tanh.approx.f32 $0, $1;")
        return inductor.make_pointwise(instruction)(x)
    return inductor.lowerings[torch.ops.aten.tanh](x)
