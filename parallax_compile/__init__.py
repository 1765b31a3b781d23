"""A compiler backend for attention: declare a member of the local-linear family, get fused kernels.

>>> import parallax_compile as plx
>>> out = plx.attention(q, k, v, r, spec=plx.PARALLAX)          # as flex_attention, with a probe
>>> @plx.parallax_compile                                        # fused, forward and backward
... class Block(torch.nn.Module): ...
"""

from __future__ import annotations

from . import caches, errors, masks, mods, nn
from .ahead_of_time import AheadOfTime, aot, load_aot
from .attention import AuxOutput, AuxRequest, attention, flex_attention
from .compiler import parallax_compile
from .decoding import decode
from .explanation import Explanation, explain, explain_decode
from .inspection import Inspection, inspect
from .lowering.scan import State
from .portable import MlirInspection, PortableArtifact, compile_portable, export_mlir
from .recurrent import decode_state, empty_state
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
from .tuning import TuningReport, autotune
from .version import __version__ as __version__

__all__ = [
    "AFFINE_LINEAR",
    "AFFINE_MESA",
    "LINEAR",
    "LLA",
    "MESA",
    "PARALLAX",
    "SOFTMAX",
    "VALUE_AVERAGE",
    "AheadOfTime",
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
    "TuningReport",
    "Zero",
    "aot",
    "attention",
    "autotune",
    "caches",
    "compile_portable",
    "decode",
    "decode_state",
    "empty_state",
    "errors",
    "explain",
    "explain_decode",
    "export_mlir",
    "family",
    "flex_attention",
    "inspect",
    "load_aot",
    "masks",
    "mods",
    "nn",
    "parallax_compile",
]
