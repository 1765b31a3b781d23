"""Infinite bandwidth in linear time: our scan beside fla's chunked linear attention, on the same inputs in one run.

    python benchmarks/scan.py --json benchmarks/results/scan.json

Prints errors against the float64 reference (plain, documents, keys with an offset), times with a cold L2, ratios to fla where
it is installed (``flash-linear-attention==0.6.0``), and the exponent of the growth with the length. Times under about a
millisecond hold the host's; ``--widths --batched 0 --members AFFINE_LINEAR --lengths 65536 131072 262144`` is for the growth.
``--quick`` runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Clock, summary
from record import environment
from tabulate import tabulate
from torch import Tensor

import parallax_compile as plx

CAUSAL = plx.masks.causal()
OURS = {name: plx.family()[name] for name in ("AFFINE_LINEAR", "LINEAR", "VALUE_AVERAGE")}
Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(spec: plx.AttentionSpec, mask: Any = CAUSAL) -> Call:
    """A member, compiled; arguments query, key, value, probe."""
    spec = spec.replace(mask_mod=mask)
    learned = spec.probe.kind == "learned"
    return torch.compile(
        lambda q, k, v, r: plx.attention(q, k, v, r if learned else None, spec=spec), fullgraph=True, dynamic=False
    )


def fla() -> Call | None:
    """Chunked linear attention, not normalised; None where fla is not installed."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError:
        return None

    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        turned = [tensor.transpose(1, 2) for tensor in (r, k, v)]
        return chunk_linear_attn(*turned, scale=1.0, normalize=False)[0].transpose(1, 2)

    return call


def operands(shape: tuple[int, int, int, int], device: str, offset: float = 0.0) -> list[Tensor]:
    """Query, key, value, probe: normal, the keys with a common offset."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = [torch.randn(shape, device=device) for _ in range(4)]
    found[1] = found[1] + offset * torch.randn(shape[-1], device=device)
    return [tensor.to(dtype).requires_grad_() for tensor in found]


def errors(spec: plx.AttentionSpec, device: str, length: int, width: int, kind: str) -> dict[str, Any]:
    """Relative errors by norm of out and gradients, and whether a second run gives the same bits."""
    inputs = operands((2, 2, length, width), device, offset=10.0 if kind == "offset" else 0.0)
    mask = CAUSAL
    if kind == "documents":
        ids = torch.arange(length, device=device) // (length // 3 + 7)
        mask = CAUSAL & plx.masks.document(ids, contiguous=True)
    if kind == "no mask":
        mask = None
    call = ours(spec, mask)
    exact_spec = spec.replace(mask_mod=mask)
    learned = spec.probe.kind == "learned"
    grad = torch.randn_like(inputs[0])

    def run(call: Call, tensors: list[Tensor]) -> list[Tensor]:
        out = call(*tensors)
        used = tensors[1:] if learned else tensors[2:3]
        return [out, *torch.autograd.grad(out, used, grad.to(out.dtype))]

    got, again = run(call, inputs), run(call, inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = run(lambda q, k, v, r: plx.attention(q, k, v, r if learned else None, spec=exact_spec), exact)
    names = ("out", "dk", "dv", "dr") if learned else ("out", "dv")
    found: dict[str, Any] = {
        name: float((a.double() - b).norm() / b.norm()) for name, a, b in zip(names, got, want, strict=True)
    }
    found["repeatable"] = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return found


def times(calls: dict[str, Call], shape: tuple[int, int, int, int], device: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of the forward and of forward and backward of each contender, interleaved."""
    inputs = operands(shape, device)
    grad = torch.randn_like(inputs[0])
    clock = Clock(device)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    for name, call in calls.items():

        def forward(call: Call = call) -> None:
            with torch.no_grad():
                call(*inputs)

        def both(call: Call = call) -> None:
            torch.autograd.grad(call(*inputs), inputs[1:], grad, allow_unused=True)

        found[name] = {}
        for direction, run in (("forward", forward), ("both", both)):
            start = time.perf_counter()
            try:
                run()
            except Exception as problem:  # a contender that cannot run is a result
                found[name]["failed"] = f"{type(problem).__name__}: {str(problem)[:300]}"
                break
            found[name][direction] = {"first_call_s": time.perf_counter() - start}
            runs[name, direction] = run
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(3):
        for key, run in runs.items():
            run()
            samples[key] += clock(run, repeats)
    for (name, direction), measured in samples.items():
        found[name][direction] |= summary(measured)
    return found


def growth(lengths: list[int], milliseconds: list[float]) -> float:
    """Least-squares exponent of the time over the length."""
    x, y = [math.log(n) for n in lengths], [math.log(t) for t in milliseconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 96], help="of the errors")
    parser.add_argument("--members", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--batched", type=int, default=2, help="time only so many of the shapes with a larger batch")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536], help="of (1, 16, length, 128)")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    arguments = parser.parse_args()
    device, quick = arguments.device, arguments.quick
    record: dict[str, Any] = {"schema": 1, "environment": environment(device), "errors": [], "times": []}
    length, widths = (150, [16]) if quick else (1000, arguments.widths)
    rows = []
    for width in widths:
        for name in arguments.members:
            for kind in ("plain", "documents", "offset", "no mask"):
                torch._dynamo.reset()
                found = errors(OURS[name], device, length, width, kind)
                record["errors"].append({"member": name, "width": width, "length": length, "kind": kind, **found})
                cells = [f"{found[key]:.1e}" if key in found else "" for key in ("out", "dk", "dv", "dr")]
                rows.append([name, width, kind, *cells, found["repeatable"]])
    print(tabulate(rows, headers=["member", "D", "case", "out", "dk", "dv", "dr", "same bits"], disable_numparse=True))

    long = [256, 512] if quick else arguments.lengths
    shapes = [(1, 2, 64, 16)] if quick else [(4, 16, 4096, 128), (8, 16, 2048, 64)][: arguments.batched]
    shapes += [(1, 2 if quick else 16, n, 16 if quick else 128) for n in long]
    rows, by_length = [], []
    for shape in shapes:
        torch._dynamo.reset()
        calls = {name: ours(OURS[name]) for name in arguments.members}
        peer = fla() if device == "cuda" else None
        if peer is not None:
            calls["fla linear"] = peer
        found = times(calls, shape, device, 3 if quick else 7)
        record["times"].append({"shape": list(shape), "contenders": found})
        by_length.append(found)
        for name, measured in found.items():
            base = found.get("fla linear", {})
            cells = []
            for direction in ("forward", "both"):
                ms = measured.get(direction, {}).get("ms")
                theirs = base.get(direction, {}).get("ms")
                cells += ["" if ms is None else f"{ms:.3f}", "" if not (ms and theirs) else f"{theirs / ms:.2f}"]
            rows.append([str(shape), name, *cells, measured.get("failed", "")[:60]])
    headers = ["B, H, L, D", "contender", "fwd ms", "fla / it", "both ms", "fla / it", "failed"]
    print("\n" + tabulate(rows, headers=headers, disable_numparse=True))
    record["growth"] = {}
    for name in arguments.members if len(long) > 1 else ():
        for direction in ("forward", "both"):
            clocked = [found[name].get(direction, {}).get("ms") for found in by_length[-len(long) :]]
            if all(clocked):
                record["growth"][f"{name} {direction}"] = growth(long, clocked)
    print("\ngrowth exponents:", {name: round(value, 3) for name, value in record["growth"].items()})
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
