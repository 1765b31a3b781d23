"""Shapes of a call, as arguments of functions and as text of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError
from .spec import AttentionSpec

__all__ = ["Shape", "dtype_of"]

_DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32, "fp64": torch.float64, "float64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: ``query [B, Hq, Lq, D]``, ``key [B, Hkv, Lk, D]``, ``value [B, Hkv, Lk, Dv]``."""

    batch: int
    q_heads: int
    kv_heads: int
    q_length: int
    kv_length: int
    width: int
    value_width: int

    @classmethod
    def of(cls, shape: Any) -> Shape:
        """A shape from itself, from ``"B,H,L,D"`` text or from ``(B, H, L, D)``.

        In the text, and as pairs in the tuple, ``H``, ``L`` and ``D`` may each be two: ``"2,32:8,1:4096,128:64"`` is
        ``(2, (32, 8), (1, 4096), (128, 64))``: query and key heads, query and key lengths, key and value widths.

        Raises:
            InputError, InputTypeError: anything else, sizes below 1, query heads that key heads do not divide.
        """
        if isinstance(shape, Shape):
            return shape
        given, expected = shape, "B,H,L,D, where H, L and D may be pairs as in 2,32:8,4096,128"
        if isinstance(shape, str):
            try:
                shape = [tuple(int(size) for size in part.split(":")) for part in shape.replace("x", ",").split(",")]
            except ValueError as error:
                raise InputError(f"shape must be {expected}, but got {given!r}.") from error
        if not isinstance(shape, Sequence):
            raise InputTypeError(f"shape must be a string or a tuple {expected}, but got {type(shape).__name__}.")
        parts = [tuple(part) if isinstance(part, Sequence) else (part,) for part in shape]
        sizes = [size for part in parts for size in part]
        if len(parts) != 4 or len(parts[0]) != 1 or any(len(part) not in (1, 2) for part in parts):
            raise InputError(f"shape must be {expected}, but got {given!r}.")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise InputError(f"sizes of a shape must be integers of at least 1, but got {given!r}.")
        (batch,), heads, lengths, widths = parts
        if heads[0] % heads[-1]:
            raise InputError(f"query heads must be a multiple of key heads, but got {heads[0]} and {heads[-1]}.")
        return cls(batch, heads[0], heads[-1], lengths[0], lengths[-1], widths[0], widths[-1])

    def __str__(self) -> str:
        def pair(first: int, second: int) -> str:
            return str(first) if first == second else f"{first}:{second}"

        parts = ((self.q_heads, self.kv_heads), (self.q_length, self.kv_length), (self.width, self.value_width))
        return ",".join([str(self.batch), *(pair(*part) for part in parts)])

    def sizes(self) -> list[int]:
        """All seven, in the order of the fields."""
        return [self.batch, self.q_heads, self.kv_heads, self.q_length, self.kv_length, self.width, self.value_width]

    def tensors(
        self, spec: AttentionSpec, dtype: torch.dtype, device: str = "meta", requires_grad: bool = True
    ) -> list[Tensor]:
        """Query, key, value, and a probe where the spec takes one: without data on "meta", else standard normal numbers."""
        query = (self.batch, self.q_heads, self.q_length, self.width)
        key, value = ((self.batch, self.kv_heads, self.kv_length, width) for width in (self.width, self.value_width))
        sizes = [query, key, value, *([query] if spec.probe.kind == "learned" else [])]
        make = torch.empty if device == "meta" else torch.randn
        return [make(size, dtype=dtype, device=device, requires_grad=requires_grad) for size in sizes]


def dtype_of(dtype: Any) -> torch.dtype:
    """A dtype from itself or from a name such as ``bf16`` or ``float32``.

    Raises:
        InputError: none that attention takes.
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, but got {dtype!r}.")
    return found
