"""Repairs of Triton's interpreter (triton 3.6 to 3.8), without which results are silently wrong or kernels do not run.

- bfloat16 is stored as 16-bit integers, and ``tl.dot`` and every arithmetic operation work on those integers; conversions to
  bfloat16 truncate (or, with an explicit rounding mode, lose the carry into the exponent) where the hardware rounds to
  nearest even. Those to float8_e4m3fn lose the carry too, and from it to bfloat16 there is none.
- ``libdevice`` functions are external calls, which the interpreter refuses.
- ``tl.range`` yields Python ints where compiled code has tensors.

:func:`install` is idempotent and meant for processes that do nothing else: nothing is restored.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

__all__ = ["enabled", "install"]


def enabled() -> bool:
    """Whether this process runs kernels in the interpreter (``TRITON_INTERPRET=1`` when triton was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def install() -> None:
    """Repair the interpreter of this process.

    Raises:
        RuntimeError: the process was not started with ``TRITON_INTERPRET=1``.
    """
    if not enabled():
        raise RuntimeError("the interpreter needs TRITON_INTERPRET=1 in the environment before triton is imported")
    _repair_bfloat16()
    _repair_range()
    _replace_libdevice()


# --- bfloat16 -------------------------------------------------------------------------------------------------------


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32 (exact)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Numbers as float8_e4m3fn bits, rounded to nearest even (the original loses the carry into the exponent)."""
    import torch

    numbers = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_eight_bits(bits: np.ndarray) -> np.ndarray:
    """float8_e4m3fn bits as float32 (exact)."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).float().numpy()


def _repair_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bf16(handle: Any) -> bool:
        return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16

    def wide(handle: Any) -> Any:
        return TensorHandle(widened(handle.data), tl.float32) if is_bf16(handle) else handle

    def narrow(handle: Any) -> Any:
        return TensorHandle(narrowed(handle.data), tl.bfloat16)

    def converting(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def convert(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
            source, destination = src.dtype.scalar, dst_type.scalar
            if source == destination or not {tl.bfloat16, tl.float8e4nv} & {source, destination}:
                return original(self, src, dst_type, *rest)
            if source == tl.float8e4nv:
                src = TensorHandle(from_eight_bits(src.data), tl.float32)
            if destination == tl.float8e4nv:
                return TensorHandle(eight_bits(wide(src).data), tl.float8e4nv)
            src = wide(src)
            if destination == tl.bfloat16:
                return TensorHandle(narrowed(src.data.astype(np.float32)), tl.bfloat16)
            if destination == tl.float32:
                return src
            return InterpreterBuilder.cast_impl(self, src, dst_type)

        return convert

    def arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def compute(self: Any, *operands: Any) -> Any:
            handles = [operand for operand in operands if isinstance(operand, TensorHandle)]
            if not any(map(is_bf16, handles)) or operands[-1] in _BITWISE:
                return original(self, *operands)
            out = original(
                self, *(wide(operand) if isinstance(operand, TensorHandle) else operand for operand in operands)
            )
            if out.data.dtype == np.bool_:  # a comparison: the interpreter tags it with the dtype of its operands
                return TensorHandle(out.data, tl.bfloat16)
            return narrow(out)

        return compute

    # NumPy functions that move or combine bits rather than numbers.
    _BITWISE = (np.where, np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)

    def dot(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def multiply(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            if is_bf16(d):
                raise NotImplementedError("tl.dot with a bfloat16 accumulator")
            return original(self, wide(a), wide(b), d, *rest)

        return multiply

    def refused(name: str) -> Callable[..., Any]:
        original = getattr(InterpreterBuilder, name)

        @functools.wraps(original)
        def refuse(self: Any, *operands: Any) -> Any:
            if any(isinstance(operand, TensorHandle) and is_bf16(operand) for operand in operands):
                raise NotImplementedError(f"{name} of bfloat16 in the interpreter")
            return original(self, *operands)

        return refuse

    # The create_* members look these up on the class, so that repairing them here repairs all.
    original_cast, original_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    InterpreterBuilder.cast_impl = converting(original_cast)
    InterpreterBuilder.create_fp_to_fp = converting(original_fp)
    InterpreterBuilder.create_dot = dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.binary_op = arithmetic(InterpreterBuilder.binary_op)
    InterpreterBuilder.ternary_op = arithmetic(InterpreterBuilder.ternary_op)
    InterpreterBuilder.unary_op = arithmetic(InterpreterBuilder.unary_op)
    for name in ("create_fma", "create_rsqrt", "create_erf", "create_atomic_rmw", "create_atomic_cas"):
        setattr(InterpreterBuilder, name, refused(name))
    if not hasattr(InterpreterBuilder, "get_bf16"):
        InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(
            narrowed(np.array([value], dtype=np.float32)), tl.bfloat16
        )


# --- loops ----------------------------------------------------------------------------------------------------------


def _repair_range() -> None:
    from triton.runtime import interpreter

    original = interpreter._patch_lang_core

    def tensors(first: Any, last: Any = None, step: Any = None, **options: Any) -> Iterator[Any]:
        start, stop = (0, first) if last is None else (first, last)
        for index in range(int(start), int(stop), 1 if step is None else int(step)):
            yield interpreter.interpreter_semantic.to_tensor(index, False)

    @functools.wraps(original)
    def patch(lang: Any, scope: Any) -> None:
        original(lang, scope)
        scope.set_attr(lang, "range", tensors)

    interpreter._patch_lang_core = patch


# --- libdevice ------------------------------------------------------------------------------------------------------

_SAME_NAME = (
    "tanh sinh cosh tan sin cos sqrt exp exp2 expm1 log log2 log10 log1p floor ceil trunc abs isnan isinf isfinite"
)
_UNARY: dict[str, Callable[..., Any]] = {name: getattr(np, name) for name in _SAME_NAME.split(" ")} | {
    "signbit": np.signbit,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "fabs": np.abs,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "nearbyint": np.rint,
    "rint": np.rint,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "erfc": np.vectorize(math.erfc, otypes=[np.float64]),
    "lgamma": np.vectorize(math.lgamma, otypes=[np.float64]),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
}
_BINARY: dict[str, Callable[..., Any]] = {
    "pow": np.power,
    "atan2": np.arctan2,
    "hypot": np.hypot,
    "fmod": np.fmod,
    "copysign": np.copysign,
    "nextafter": np.nextafter,
}
_PREDICATES = frozenset({"isnan", "isinf", "isfinite", "signbit"})


class _Libdevice:
    """``libdevice`` on NumPy; a function that is not here fails by name."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = _UNARY.get(name) or _BINARY.get(name)
        if function is None:
            raise NotImplementedError(f"libdevice.{name} in the interpreter: add it to {__name__}")
        return functools.partial(self._call, name, function)

    @staticmethod
    def _call(name: str, function: Callable[..., Any], *operands: Any, **options: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle, interpreter_semantic

        tensors = [
            operand if hasattr(operand, "handle") else interpreter_semantic.to_tensor(operand, False)
            for operand in operands
        ]
        first = max(tensors, key=lambda tensor: tensor.handle.data.size)
        data = function(*(tensor.handle.data for tensor in tensors))
        scalar = tl.int32 if name in _PREDICATES else first.dtype
        kind = np.int32 if name in _PREDICATES else first.handle.data.dtype
        type_ = tl.block_type(scalar, first.shape) if first.shape else scalar
        return tl.core.tensor(TensorHandle(np.asarray(data).astype(kind), scalar), type_)


def _replace_libdevice() -> None:
    from torch._inductor.runtime import triton_helpers

    triton_helpers.libdevice = _Libdevice()
