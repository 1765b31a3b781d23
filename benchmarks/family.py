"""Every member of the family on one device: accuracy against float64, time, growth with the length.

    python benchmarks/family.py [--json PATH] [--lengths 1024 2048 4096] [--widths 64 128] [--ridges 1 0.1 0.01] [--quick]

Accuracy: relative error (norm) of out and gradients at length 512, causal, 2 heads. Times: medians with a cold L2, 16 heads in
all, forward and forward with backward. Growth: the exponent of a power law through the times. bf16 on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import Clock, summary
from record import environment
from tabulate import tabulate
from torch import Tensor

import parallax_compile as plx

CAUSAL = plx.masks.causal()


def members(ridges: list[float]) -> dict[str, plx.AttentionSpec]:
    """The members, solved ones with each ridge."""
    found = {}
    for name, spec in plx.family().items():
        if spec.probe.kind == "solved":
            found |= {f"{name} ridge {ridge:g}": spec.replace(probe=plx.Solved(ridge)) for ridge in ridges}
        else:
            found[name] = spec
    found["no intercept, learned"] = plx.PARALLAX.replace(intercept=False)
    found["no intercept, solved"] = plx.LLA.replace(intercept=False, probe=plx.Solved(ridges[0]))
    found["gradient, 3 steps"] = plx.LLA.replace(probe=plx.Gradient(3, ridge=ridges[0]))
    return {name: spec.replace(mask_mod=CAUSAL) for name, spec in found.items()}


def operands(spec: plx.AttentionSpec, heads: int, length: int, width: int, device: str) -> list[Tensor]:
    """Query, key, value (and probe), normal, requiring gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    count = 4 if spec.probe.kind == "learned" else 3
    shape = (1, heads, length, width)
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(count)]


def error(got: Tensor | None, want: Tensor | None) -> float | None:
    """Relative error by norm; None where there is no gradient to compare."""
    if got is None or want is None or not want.norm() > 0:
        return None
    return float((got.double() - want).norm() / want.norm())


def accuracy(spec: plx.AttentionSpec, width: int, device: str, length: int) -> dict[str, Any]:
    """Errors of out and of the gradients of query, key, value and probe; iterations of the solver."""
    inputs = operands(spec, 2, length, width, device)
    solved = spec.probe.kind == "solved"
    request = plx.AuxRequest(iterations=solved, residual=solved)
    call = torch.compile(lambda *x: plx.attention(*x, spec=spec, return_aux=request), fullgraph=True)
    out, aux = call(*inputs)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    again = torch.autograd.grad(call(*inputs)[0], inputs, grad, allow_unused=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = plx.attention(*exact, spec=spec)
    wanted = torch.autograd.grad(want, exact, grad.double(), allow_unused=True)
    found: dict[str, Any] = {"out": error(out, want)}
    found |= {f"d{name}": error(a, b) for name, a, b in zip("qkvr", grads, wanted, strict=False)}
    found["worst_row"] = float(((out.double() - want).norm(dim=-1) / want.norm(dim=-1)).max())
    found["repeatable"] = all(a is None or torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    if solved:
        found["iterations"] = [float(aux.iterations.float().mean()), int(aux.iterations.max())]
    return found


def times(spec: plx.AttentionSpec, width: int, device: str, length: int, heads: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of the forward and of forward and backward."""
    inputs = operands(spec, heads, length, width, device)
    call = torch.compile(lambda *x: plx.attention(*x, spec=spec), fullgraph=True)
    grad = torch.randn_like(inputs[0])
    clock = Clock(device)

    def forward() -> None:
        with torch.no_grad():
            call(*inputs)

    found: dict[str, Any] = {}

    def both():
        return torch.autograd.grad(call(*inputs), inputs, grad, allow_unused=True)

    for name, run in (("forward", forward), ("both", both)):
        start = time.perf_counter()
        run()
        first = time.perf_counter() - start
        run()
        found[name] = {"first_call_s": first, **summary(clock(run, repeats))}
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--match", default="", help="only members whose name contains this")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--ridges", type=float, nargs="+", default=[1.0, 0.1, 0.01])
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--accuracy-length", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="one width, one ridge, one short length")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.widths, arguments.ridges, arguments.lengths, arguments.accuracy_length = [16], [1.0], [64], 48
    heads = 16 if arguments.device == "cuda" else 2
    record: dict[str, Any] = {"schema": 1, "environment": environment(arguments.device), "heads": heads, "members": []}
    rows = []
    for width in arguments.widths:
        for name, spec in members(arguments.ridges).items():
            if arguments.match not in name:
                continue
            torch._dynamo.reset()
            entry: dict[str, Any] = {"member": name, "width": width}
            try:
                entry["accuracy"] = accuracy(spec, width, arguments.device, arguments.accuracy_length)
                measured = {n: times(spec, width, arguments.device, n, heads, 7) for n in arguments.lengths}
                entry["times"] = measured
            except Exception as problem:  # one member that fails is a result, not a failure of the run
                entry["failed"] = f"{type(problem).__name__}: {str(problem)[:300]}"
                measured = {}
            record["members"].append(entry)
            found = entry.get("accuracy", {})
            cells = [
                f"{found[key]:.1e}" if found.get(key) is not None else "" for key in ("out", "dq", "dk", "dv", "dr")
            ]
            spread = "/".join(f"{value:.0f}" for value in found.get("iterations", ()))
            clocked = [f"{m['forward']['ms']:.2f} {m['both']['ms']:.2f}" for m in measured.values()]
            growth = ""
            if len(measured) > 1:
                lengths = list(measured)
                ratio = measured[lengths[-1]]["both"]["ms"] / measured[lengths[-2]]["both"]["ms"]
                entry["growth"] = math.log(ratio) / math.log(lengths[-1] / lengths[-2])
                growth = f"{entry['growth']:.2f}"
            rows.append([name, width, *cells, spread, *clocked, growth, entry.get("failed", "")[:60]])
            print(*rows[-1], flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    headers = ["member", "D", "out", "dq", "dk", "dv", "dr", "steps mean/max"]
    headers += [f"ms fwd, both at {n}" for n in arguments.lengths] + ["growth", "failed"]
    print("\n" + tabulate(rows, headers=headers[: len(rows[0])], disable_numparse=True) if rows else "no such member")
    return int(any("failed" in entry for entry in record["members"]))


if __name__ == "__main__":
    sys.exit(main())
