"""A compiler backend for attention: declare a member of the local-linear family, get fused kernels.

>>> import parallax_compile as plx
>>> out = plx.attention(q, k, v, r, spec=plx.PARALLAX)          # as flex_attention, with a probe
>>> @plx.parallax_compile                                        # fused, forward and backward
... class Block(torch.nn.Module): ...
"""

from __future__ import annotations

from . import errors, masks, mods, nn
from .attention import AuxOutput, AuxRequest, attention, flex_attention
from .compiler import parallax_compile
from .explanation import Explanation, explain
from .inspection import Inspection, inspect
from .lowering.scan import State
from .portable import MlirInspection, PortableArtifact, compile_portable, export_mlir
from .spec import (
    AFFINE_LINEAR,
    AFFINE_MESA,
    LINEAR,
    LLA,
    MESA,
    PARALLAX,
    SOFTMAX,
    VALUE_AVERAGE,
    AttentionSpec,
    Finite,
    Gradient,
    Infinite,
    Learned,
    Solved,
    Zero,
    family,
)

__version__ = "0.1.0"

__all__ = [
    "AFFINE_LINEAR",
    "AFFINE_MESA",
    "LINEAR",
    "LLA",
    "MESA",
    "PARALLAX",
    "SOFTMAX",
    "VALUE_AVERAGE",
    "AttentionSpec",
    "AuxOutput",
    "AuxRequest",
    "Explanation",
    "Finite",
    "Gradient",
    "Infinite",
    "Inspection",
    "Learned",
    "MlirInspection",
    "PortableArtifact",
    "Solved",
    "State",
    "Zero",
    "attention",
    "compile_portable",
    "errors",
    "explain",
    "export_mlir",
    "family",
    "flex_attention",
    "inspect",
    "masks",
    "mods",
    "nn",
    "parallax_compile",
]
