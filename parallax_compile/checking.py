"""Whether compiled calls compute what they should on this machine's device: every member against the float64 reference."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import masks
from .attention import attention
from .errors import InputError, UnsupportedError
from .shapes import Shape, dtype_of
from .spec import AttentionSpec, Solved, family

__all__ = ["CheckResult", "check", "device_of"]

# Relative error in norm that output and gradients may have: a few roundings of the inputs' dtype.
_ALLOWED = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 2.0**-16}
# A solved probe is as exact as its solver's residual, and its gradient passes the solve once more.
_ALLOWED_SOLVED = {"bfloat16": 2.0**-4, "float16": 2.0**-5, "float32": 2.0**-10}

_QUICK = ((("1,4:2,77,24:16"), True),)
_SHAPES = (*_QUICK, ("2,2,130,64", True), ("1,2,96:160,40", False))


@dataclass(frozen=True)
class CheckResult:
    """One case.

    Attributes:
        errors: ``out``, ``dq``, ... -> relative error in norm against float64.
        allowed: what they may be.
        failure: why it could not run; empty.
    """

    member: str
    shape: str
    dtype: str
    causal: bool
    errors: dict[str, float]
    allowed: float
    seconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether every error is within what is allowed."""
        return not self.failure and all(error <= self.allowed for error in self.errors.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        errors = " ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        case = f"{self.member} {self.dtype} {self.shape}{' causal' if self.causal else ''}"
        return f"{'ok  ' if self.passed else 'FAIL'} {case}: {self.failure or errors} (allowed {self.allowed:.1e})"


def check(
    members: Sequence[str] = (),
    *,
    device: str = "auto",
    quick: bool = False,
    on_result: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Compile every member forward and backward on ``device`` and compare with the uncompiled float64 reference.

    Args:
        members: names in :func:`~parallax_compile.family`; none means all.
        device: ``"auto"`` (a GPU if there is one), ``"cuda"`` or ``"cpu"``.
        quick: one small shape for each member.
        on_result: called with each result as it is there.

    Raises:
        InputError: an unknown member or device.
        UnsupportedError: ``"cuda"`` without a GPU.
    """
    kind = device_of(device)
    known = family()
    unknown = [name for name in members if name.upper() not in known]
    if unknown:
        raise InputError(f"member must be one of {', '.join(known)}, but got {', '.join(unknown)}.")
    dtypes = ("bf16", "fp16", "fp32") if kind == "cuda" else ("fp32",)
    results = []
    for name in [name.upper() for name in members] or list(known):
        for shape, causal in _QUICK if quick else _SHAPES:
            for dtype in dtypes[:1] if quick else dtypes:
                results.append(_case(name, known[name], Shape.of(shape), dtype_of(dtype), causal, kind))
                on_result(results[-1])
    return results


def device_of(device: str) -> str:
    """The kind of device that is meant.

    Raises:
        InputError: unknown; UnsupportedError: not here.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise InputError(f"device must be auto, cuda or cpu, but got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("device is cuda, but this machine has no GPU that torch can use.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _case(name: str, spec: AttentionSpec, shape: Shape, dtype: torch.dtype, causal: bool, device: str) -> CheckResult:
    if isinstance(spec.probe, Solved):
        spec = spec.replace(probe=Solved(ridge=1.0))
    if causal:
        spec = spec.replace(mask_mod=masks.causal())
    text = str(dtype).removeprefix("torch.")
    allowed = (_ALLOWED_SOLVED if isinstance(spec.probe, Solved) else _ALLOWED)[text]
    start = time.perf_counter()
    torch.manual_seed(0)
    inputs = shape.tensors(spec, dtype, device)

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, spec=spec, enable_gqa=True)

    def results(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        out = function(*tensors)
        torch.manual_seed(1)
        weights = torch.randn(out.shape, dtype=dtype, device=device).to(out.dtype)
        grads = torch.autograd.grad(out, tensors, weights, allow_unused=True)
        return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True))]

    errors: dict[str, float] = {}
    failure = ""
    try:
        got = results(torch.compile(call, fullgraph=True, dynamic=False), inputs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="plx.attention was called without torch.compile")
            want = results(call, [tensor.detach().double().requires_grad_() for tensor in inputs])
        names = ["out", *(f"d{letter}" for letter in "qkvr"[: len(inputs)])]
        errors = {name: _error(a, b) for name, a, b in zip(names, got, want, strict=True)}
    except Exception as error:  # a case that cannot run is a result of the check
        failure = f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        torch.compiler.reset()
    return CheckResult(name, str(shape), text, causal, errors, allowed, time.perf_counter() - start, failure)


def _error(got: Tensor, want: Tensor) -> float:
    norm = float(want.norm())
    error = float((got.double() - want).norm())
    error = error / norm if norm else error
    return error if error == error else float("inf")
