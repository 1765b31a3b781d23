"""The family's table with a tick for every cell that was checked: ``python -m parallax_compile.check_family``.

Each member is compiled on each device that is there, forward and backward, and compared with the float64 reference. What the
table says was run when it was printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from . import masks
from .attention import attention
from .spec import AttentionSpec, Finite, Gradient, Infinite, Learned, Solved, Zero

__all__ = ["BUDGETS", "Check", "check", "checks", "members", "table"]

BANDWIDTHS = (Finite(), Infinite())
PROBES = (Zero(), Learned(), Solved(1.0), Gradient(3, ridge=1.0))

BUDGETS = {torch.float32: (1e-4, 2e-4), torch.bfloat16: (1e-2, 2e-2)}
"""Largest relative errors (norm) of out and of gradients that get a tick, by dtype: several times what rounding costs."""

BATCH, QUERY_HEADS, KV_HEADS, LENGTH, WIDTH = 1, 4, 2, 150, 16


@dataclass(frozen=True)
class Check:
    """One member on one device.

    Attributes:
        member: its name in the table.
        device, dtype: where and in what it ran.
        error: relative error (norm) of out; None where the call failed.
        gradient_error: the largest of the gradients'.
        passed: both are within :data:`BUDGETS`.
        seconds: with compilation.
        failure: why the call failed.
    """

    member: str
    device: str
    dtype: str
    error: float | None
    gradient_error: float | None
    passed: bool
    seconds: float
    failure: str | None = None

    def __str__(self) -> str:
        if self.failure is not None:
            return "✗ failed"
        return f"{'✓' if self.passed else '✗'} {self.error:.0e}, {self.gradient_error:.0e}"


def members() -> dict[str, AttentionSpec]:
    """Every cell of the table that is no zero map, under the names of :func:`~parallax_compile.family` or a description."""
    found = {}
    for bandwidth in BANDWIDTHS:
        for intercept in (True, False):
            for probe in PROBES:
                if isinstance(probe, Zero) and not intercept:
                    continue  # identically 0, and refused
                spec = AttentionSpec(bandwidth, probe, intercept)
                found[spec.name or _description(spec)] = spec
    return found


def _description(spec: AttentionSpec) -> str:
    return f"{spec.bandwidth.kind}, {spec.probe.kind}" + ("" if spec.intercept else ", no intercept")


def devices() -> list[str]:
    """The devices of this machine that the compiled path covers."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def check(name: str, spec: AttentionSpec, device: str) -> Check:
    """Compile a causal, grouped-query call of ``spec`` on ``device`` and compare out and gradients with float64."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    spec = spec.replace(mask_mod=masks.causal())
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        made = torch.randn(BATCH, heads, LENGTH, WIDTH, generator=generator)
        return made.to(device, dtype).requires_grad_()

    inputs = [normal(QUERY_HEADS), normal(KV_HEADS), normal(KV_HEADS)]
    if spec.probe.kind == "learned":
        inputs.append(normal(QUERY_HEADS))
    weights = normal(QUERY_HEADS).detach()

    def call(*operands: Tensor) -> Tensor:
        return attention(*operands, spec=spec, enable_gqa=True)

    def run(function: Callable[..., Tensor], operands: Sequence[Tensor]) -> list[Tensor]:
        out = function(*operands)
        grads = torch.autograd.grad(out, operands, weights.to(out.dtype), allow_unused=True)
        # The average ignores queries and keys: no gradient is a gradient of zero.
        return [out, *(torch.zeros_like(x) if g is None else g for x, g in zip(operands, grads, strict=True))]

    start = time.perf_counter()
    try:
        torch.compiler.reset()
        found = run(torch.compile(call, fullgraph=True), inputs)
    except Exception as problem:  # a cell that does not run is a result of the table
        failure = f"{type(problem).__name__}: {str(problem)[:200]}"
        return Check(name, device, _dtype_name(dtype), None, None, False, time.perf_counter() - start, failure)
    seconds = time.perf_counter() - start
    exact = run(call, [x.detach().double().requires_grad_() for x in inputs])
    error, *gradients = (_relative_error(a, b) for a, b in zip(found, exact, strict=True))
    worst = max(gradients)
    allowed, allowed_gradient = BUDGETS[dtype]
    passed = error <= allowed and worst <= allowed_gradient
    return Check(name, device, _dtype_name(dtype), error, worst, passed, seconds)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _relative_error(got: Tensor, want: Tensor) -> float:
    """By norm; NaN counts as infinite, and what ought to be zero counts absolutely."""
    difference, size = float((got.detach().double() - want.detach()).norm()), float(want.detach().norm())
    error = difference / size if size > 0 else difference
    return error if error == error else float("inf")


def checks(only: str = "", on: Sequence[str] | None = None) -> Iterator[Check]:
    """A :class:`Check` of each member of a device of ``on`` (None: all that are there).

    Args:
        only: a member's name, or what its name contains.
        on: ``"cpu"``, ``"cuda"``.
    """
    known = members()
    names = [only] if only in known else [name for name in known if only in name]
    for device in devices() if on is None else on:
        for name in names:
            yield check(name, known[name], device)


def table(found: Sequence[Check]) -> str:
    """The checks as the family's table, one for each device: bandwidth and intercept down, probes across."""
    parts = []
    for device in dict.fromkeys(item.device for item in found):
        by_name = {item.member: item for item in found if item.device == device}
        rows = []
        for bandwidth in BANDWIDTHS:
            for intercept in (True, False):
                cells = []
                for probe in PROBES:
                    if isinstance(probe, Zero) and not intercept:
                        cells.append("refused: identically 0")
                        continue
                    spec = AttentionSpec(bandwidth, probe, intercept)
                    item = by_name.get(spec.name or _description(spec))
                    named = f"{spec.name} " if spec.name else ""
                    cells.append("not run" if item is None else f"{named}{item}")
                rows.append([f"{bandwidth.kind}, {'intercept' if intercept else 'no intercept'}", *cells])
        kind = next(item.dtype for item in found if item.device == device)
        headers = [f"{device}, {kind}", *(probe.kind for probe in PROBES)]
        parts.append(tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github"))
    return "\n\n".join(parts)


def _machine(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the table, and say what was done; 0 if every cell that ran passed."""
    parser = argparse.ArgumentParser(prog="python -m parallax_compile.check_family", description=__doc__)
    parser.add_argument("--device", action="append", choices=["cpu", "cuda"], help="default: all that are there")
    parser.add_argument("--only", default="", metavar="TEXT", help="members whose name contains this")
    parser.add_argument("--json", metavar="PATH", help="write the checks there too")
    chosen = parser.parse_args(arguments)
    if "cuda" in (chosen.device or ()) and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here. Leave it out.")
    # What an uncompiled call warns of is what the reference is here for.
    warnings.filterwarnings("ignore", message="plx.attention was called without torch.compile")
    found: list[Check] = []
    for item in checks(chosen.only, chosen.device):
        found.append(item)
        print(f"{item.device} {item.member}: {item} ({item.seconds:.0f} s)", file=sys.stderr, flush=True)
        if item.failure:
            print(f"  {item.failure}", file=sys.stderr)
    if not found:
        parser.error(f"--only {chosen.only}: no such member. Members: {'; '.join(members())}.")
    print(table(found))
    print(
        f"\nEach cell was compiled here (torch {torch.__version__}) and compared with the float64 reference: causal, "
        f"{QUERY_HEADS} query and {KV_HEADS} key heads, length {LENGTH}, width {WIDTH}, ridge 1. "
        "The numbers are the relative errors of out and of the worst gradient."
    )
    for device in dict.fromkeys(item.device for item in found):
        mine = [item for item in found if item.device == device]
        budget = BUDGETS[getattr(torch, mine[0].dtype)]
        print(
            f"{device} ({_machine(device)}): {sum(item.passed for item in mine)} of {len(mine)} within "
            f"{budget[0]:g} and {budget[1]:g}."
        )
    if chosen.json:
        record: dict[str, Any] = {"torch": torch.__version__, "checks": [asdict(item) for item in found]}
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return 0 if all(item.passed for item in found) else 1


if __name__ == "__main__":
    sys.exit(main())
