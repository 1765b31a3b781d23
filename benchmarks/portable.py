"""What the portable lowering reaches: every target and dtype compiled, every member run on this CPU, memory against length.

    python benchmarks/portable.py [--json PATH] [--only targets members memory]

Nothing here is about speed. Tables are Markdown; docs/portable.md has them. Needs parallax-compile[mlir].
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from parallax_compile.lowering.mlir.targets import TARGETS
from record import environment
from tabulate import tabulate

import parallax_compile as plx
from parallax_compile.errors import UnsupportedError

CAUSAL = plx.masks.causal()
SPEC = plx.PARALLAX.replace(mask_mod=CAUSAL)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((1, 4, 300, 32), (1, 2, 300, 32), (1, 2, 300, 32), (1, 4, 300, 32))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error by norm."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def targets() -> list[dict[str, Any]]:
    """Each target: the form that every dtype compiles to, with gradients for float32; or why not."""
    rows = []
    for name, target in TARGETS.items():
        row: dict[str, Any] = {"target": name, "product": target.product}
        for dtype in DTYPES:
            begin = time.perf_counter()
            try:
                artifact = plx.compile_portable(SPEC, SHAPES, name, dtype=dtype, backward=dtype == torch.float32)
            except UnsupportedError as reason:
                row[str(dtype).removeprefix("torch.")] = "no"
                row.setdefault("reasons", []).append(str(reason).splitlines()[0][:300])
                continue
            row[str(dtype).removeprefix("torch.")] = artifact.programs["forward"].form
            row.setdefault("notes", []).extend(note.splitlines()[0][:300] for note in artifact.notes)
            if dtype == torch.float32:
                row["gradients"] = artifact.programs["backward"].form
                row["seconds"] = round(time.perf_counter() - begin, 1)
        row["executed"] = "yes" if target.runs_here else "no"
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def members() -> list[dict[str, Any]]:
    """Every member on this CPU in float32: relative errors against float64, output and the largest of its gradients."""
    shapes = [(1, 4, 70, 16), (1, 2, 90, 16), (1, 2, 90, 16), (1, 4, 70, 16)]
    specs = dict(plx.family().items())
    specs |= {"learned, no intercept": plx.PARALLAX.replace(intercept=False)}
    specs |= {"solved, no intercept": plx.LLA.replace(intercept=False)}
    specs |= {"gradient, 2 steps": plx.LLA.replace(probe=plx.Gradient(2))}
    rows = []
    for name, spec in specs.items():
        spec = spec.replace(mask_mod=CAUSAL)
        torch.manual_seed(0)
        given = shapes if spec.probe.kind == "learned" else shapes[:3]
        inputs = [torch.randn(shape) for shape in given]
        artifact = plx.compile_portable(spec, given, backward=True, block_size=32)
        leaves = [tensor.double().requires_grad_() for tensor in inputs]
        out = plx.attention(*leaves, spec=spec, enable_gqa=True)
        grad = torch.randn(out.shape)
        want = torch.autograd.grad(out, leaves, grad.double(), materialize_grads=True)
        _, *got = artifact.run_backward(*inputs, grad_out=grad)
        worst = max(error(a, b) for a, b in zip(got, want, strict=True) if b.norm() > 0)
        row = {"member": name, "forward": artifact.programs["forward"].form}
        row |= {"out": error(artifact.run(*inputs), out.detach()), "gradients": worst}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def memory() -> list[dict[str, Any]]:
    """MiB by which the peak of a process that runs one forward rises from length 16: 4 heads, width 64, float32."""
    opened = [(1, 4, None, 64)] * 4
    artifacts = {form: plx.compile_portable(SPEC, opened, form=form) for form in ("streaming", "dense")}
    least = {form: artifact.peak_memory(16, 16) for form, artifact in artifacts.items()}
    rows = []
    for length in (512, 1024, 2048, 4096):
        row: dict[str, Any] = {"length": length, "operands and result": 5 * 4 * length * 64 * 4 / 2**20}
        row |= {form: (a.peak_memory(length, length) - least[form]) / 2**20 for form, a in artifacts.items()}
        row["one head's scores"] = 4 * length * length / 2**20
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--only", nargs="+", choices=("targets", "members", "memory"), default=["targets", "members", "memory"]
    )
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": environment("cpu")}
    record["environment"] |= {name: version(name) for name in ("torch-mlir", "iree-base-compiler", "iree-base-runtime")}
    record["environment"]["processor"] = platform.processor() or platform.machine()
    for part in arguments.only:
        record[part] = {"targets": targets, "members": members, "memory": memory}[part]()
        shown = [{k: v for k, v in row.items() if k not in ("reasons", "notes")} for row in record[part]]
        print(
            f"\n{tabulate(shown, headers='keys', tablefmt='github', floatfmt='.2g' if part == 'members' else '.0f')}\n"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
