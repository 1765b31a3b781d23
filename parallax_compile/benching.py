"""Times of a compiled call on this machine, beside what the plan says that it must take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import attention
from .checking import device_of
from .explanation import Explanation, explain
from .shapes import Shape, dtype_of
from .spec import AttentionSpec

__all__ = ["Timing", "bench"]


@dataclass(frozen=True)
class Timing:
    """One direction of a call.

    Attributes:
        direction: ``forward`` or ``forward + backward``.
        milliseconds: median; host time included.
        first_seconds: of the first call, which compiles.
        tflops: of the least operations of the plan.
        floor_milliseconds: under which the device cannot go by its data sheet; None where we have none.
    """

    direction: str
    milliseconds: float
    first_seconds: float
    tflops: float
    floor_milliseconds: float | None


@dataclass(frozen=True)
class BenchReport:
    """What :func:`bench` measured; prints as a table."""

    spec: str
    shape: str
    dtype: str
    device: str
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            [
                timing.direction,
                f"{timing.milliseconds:.4f}",
                f"{timing.tflops:.3f}",
                "-" if timing.floor_milliseconds is None else f"{timing.floor_milliseconds:.4f}",
                "-" if timing.floor_milliseconds is None else f"{timing.floor_milliseconds / timing.milliseconds:.0%}",
                f"{timing.first_seconds:.1f}",
            ]
            for timing in self.timings
        ]
        headers = ["direction", "ms", "TFLOP/s", "floor ms", "of the floor's rate", "first call s"]
        return f"{self.spec}\n{self.shape} {self.dtype} on {self.device}\n\n" + tabulate(
            rows, headers=headers, disable_numparse=True
        )


def bench(
    spec: AttentionSpec,
    shape: Any,
    dtype: Any = "bf16",
    *,
    backward: bool = True,
    device: str = "auto",
    repeats: int = 20,
) -> BenchReport:
    """Compile the call and time it with ``torch.utils.benchmark``.

    Args:
        spec: the member.
        shape, dtype: as for :func:`~parallax_compile.autotune`.
        backward: forward with backward too.
        device: ``"auto"``, ``"cuda"`` or ``"cpu"``.
        repeats: timed calls.
    """
    kind, sizes, number = device_of(device), Shape.of(shape), dtype_of(dtype)
    inputs = sizes.tensors(spec, number, kind)

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, spec=spec, enable_gqa=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=False)

    def forward() -> Tensor:
        with torch.no_grad():
            return compiled(*inputs)

    def both() -> Any:
        out = compiled(*inputs)
        return torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    query, key, value, *rest = (tensor.detach() for tensor in inputs)
    operands = (query, key, value, rest[0] if rest else None)
    target = "cpu" if kind == "cpu" else "auto"
    timings = [_timed("forward", forward, explain(spec, *operands, target=target, backward=False), kind, repeats)]
    if backward:
        plan = explain(spec, *operands, target=target, backward=True)
        timings.append(_timed("forward + backward", both, plan, kind, repeats))
    name = torch.cuda.get_device_name() if kind == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return BenchReport(repr(spec), str(sizes), str(number).removeprefix("torch."), name, tuple(timings))


def _timed(direction: str, call: Callable[[], Any], plan: Explanation, kind: str, repeats: int) -> Timing:
    from torch.utils.benchmark import Timer

    def wait() -> None:
        if kind == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    call()
    wait()
    first = time.perf_counter() - start
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    seconds = sorted(timer.timeit(1).median for _ in range(repeats))[repeats // 2]
    flops = sum(stage.cost.flops for stage in plan.stages)
    floor = None if plan.floor_seconds is None or kind == "cpu" else plan.floor_seconds * 1e3
    return Timing(direction, seconds * 1e3, first, flops / seconds / 1e12, floor)
