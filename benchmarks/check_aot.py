"""Ahead of time, checked where it ends: artifacts of another machine, and a model in AOTInductor's package, on this GPU.

    python benchmarks/check_aot.py --build DIR [--target sm_90]     anywhere with triton
    python benchmarks/check_aot.py --check DIR [--json PATH]        on the GPU

``--build`` compiles members at odd and round lengths, forward and backward. ``--check`` runs them without a compiler, compares
with the float64 reference, repeats each, and then packages a small model by AOTInductor and compares it with itself run eagerly
in float64. Where ``CXX`` links libstdc++ statically, torch's loader of such packages ends in a segmentation fault, for
``nn.Linear`` too: set ``CXX=g++`` then.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import environment
from torch import Tensor, nn

import parallax_compile as plx
from parallax_compile.shapes import Shape

CAUSAL = plx.masks.causal()
CASES: dict[str, tuple[plx.AttentionSpec, str]] = {
    "parallax": (plx.PARALLAX.replace(mask_mod=CAUSAL), "2,4:2,1000,128"),
    "parallax, D = 64": (plx.PARALLAX.replace(mask_mod=CAUSAL), "1,2,512,64"),
    "parallax, ALiBi": (plx.PARALLAX.replace(mask_mod=CAUSAL, score_mod=plx.mods.alibi(4)), "1,4,300,64"),
    "softmax": (plx.SOFTMAX.replace(mask_mod=CAUSAL), "1,4,777,128"),
    "affine linear": (plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL), "1,2,1000,64"),
    "lla": (plx.LLA.replace(mask_mod=CAUSAL, probe=plx.Solved(ridge=1.0)), "1,2,512,64"),
}
ALLOWED = 6e-3
"""Relative error, by norm, of out and of every gradient in bfloat16: twice what the members have."""


def build(folder: Path, target: str) -> None:
    """One artifact a case."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (spec, shape) in CASES.items():
        start = time.perf_counter()
        path = plx.aot(spec, shape, target=target).save(folder / f"{name}.plxa")
        print(f"{name}: {path} after {time.perf_counter() - start:.0f} s", flush=True)


def errors(results: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative, by norm; of what should be zero, absolute."""
    pairs = [(a.double() - b, float(b.norm())) for a, b in zip(results, wanted, strict=True)]
    return [float(off.norm()) / (size or 1.0) for off, size in pairs]


def check_artifact(path: Path, spec: plx.AttentionSpec, shape: str) -> dict[str, Any]:
    """Errors of an artifact's call, the milliseconds of its first, and whether it repeats."""
    torch.manual_seed(0)
    inputs = [
        torch.randn_like(x, device="cuda").requires_grad_() for x in Shape.of(shape).tensors(spec, torch.bfloat16)
    ]
    attend = plx.load_aot(path)

    def results() -> list[Tensor]:
        out = attend(*inputs)
        torch.manual_seed(1)
        return [out.detach(), *torch.autograd.grad(out, inputs, torch.randn_like(out))]

    start = time.perf_counter()
    found = results()
    torch.cuda.synchronize()
    first = (time.perf_counter() - start) * 1e3
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = plx.attention(*exact, spec=spec, enable_gqa=True)
    torch.manual_seed(1)
    grad = torch.randn_like(found[0]).double()
    wanted = [out.detach(), *torch.autograd.grad(out, exact, grad)]
    repeats = all(torch.equal(a, b) for a, b in zip(found, results(), strict=True))
    return {"errors": errors(found, wanted), "first_ms": first, "same_bits": repeats}


class Block(nn.Module):
    """A model as small as they come: two layers of Parallax between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.layers = nn.ModuleList(plx.nn.ParallaxAttention(64, 4) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.r_proj.weight, std=0.1)  # a fresh layer's probe is zero

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def check_package() -> dict[str, Any]:
    """Error of a model packaged by AOTInductor for this GPU."""
    torch.manual_seed(0)
    model = Block().cuda().bfloat16().eval()
    x = torch.randn(2, 300, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        exported = torch.export.export(model, (x,), strict=True)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/model.pt2")
        packaged = torch._inductor.aoti_load_package(package)
        start = time.perf_counter()
        found = packaged(x)
        torch.cuda.synchronize()
        first = (time.perf_counter() - start) * 1e3
        repeats = torch.equal(found, packaged(x))
        wanted = model.double()(x.double())
    return {"errors": errors([found], [wanted]), "first_ms": first, "same_bits": repeats}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR")
    parser.add_argument("--check", type=Path, metavar="DIR")
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build, arguments.target)
    if not arguments.check:
        return 0
    jobs = {name: lambda n=name: check_artifact(arguments.check / f"{n}.plxa", *CASES[n]) for name in CASES}
    jobs["a model by AOTInductor"] = check_package
    found: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        start = time.perf_counter()
        try:
            case = job()
        except Exception as error:  # the others are checked all the same
            case = {"failed": f"{type(error).__name__}: {error}"[:300]}
        case["passed"] = all(error <= ALLOWED for error in case.get("errors", [float("inf")])) and case["same_bits"]
        found[name] = case
        told = case.get("failed") or (
            f"errors {' '.join(f'{x:.1e}' for x in case['errors'])}, first call {case['first_ms']:.0f} ms, "
            f"{'the same' if case['same_bits'] else 'DIFFERENT'} bits again"
        )
        verdict = "passed" if case["passed"] else "FAILED"
        print(f"{verdict} {name}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)
    if arguments.json:
        record = {"environment": environment("cuda"), "allowed": ALLOWED, "cases": found}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(case["passed"] for case in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
