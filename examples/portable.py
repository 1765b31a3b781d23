"""A small model as MLIR: its attention decomposed, then opaque, with a kernel put in its place downstream.

    python examples/portable.py [--out FOLDER]        # needs parallax-compile[mlir]; CPU only

The second half plays the compiler downstream: it finds the call that stayed whole, reads its spec from the attribute, makes a
kernel for it (here our own streaming form), links it, compiles the model with IREE and compares with PyTorch.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

import parallax_compile as plx

SPEC = plx.PARALLAX.replace(mask_mod=plx.masks.causal(), covariance_mod=plx.mods.tanh_cap(8.0))
HEADS, LENGTH, WIDTH = 2, 48, 16


class Block(nn.Module):
    """Attention with a learned probe, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(HEADS * WIDTH, HEADS * WIDTH, bias=False) for _ in range(4))
        self.merge = nn.Linear(HEADS * WIDTH, HEADS * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, r = (layer(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for layer in self.project)
        out = plx.attention(q, k, v, r, spec=SPEC)
        return x + self.merge(out.transpose(1, 2).flatten(2))


def kernel_for(declaration: str) -> str:
    """A body for an opaque function: the spec in its attribute, the shapes in its type."""
    text = re.search(r'parallax_compile\.spec = "((?:[^"\\]|\\.)*)"', declaration)[1]
    spec = plx.AttentionSpec.from_dict(json.loads(text.replace("\\22", '"')))
    shapes = [tuple(map(int, shape.split("x"))) for shape in re.findall(r"tensor<([\dx]+)xf32>", declaration)[:-1]]
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    found = plx.inspect(spec, *tensors, emit="mlir", form="streaming", block_size=16, backward=False)
    assert found.forms["forward"] == "streaming", found.notes
    return found.modules["forward"]


def link(model: str) -> str:
    """The model with a kernel in the place of the function that has no body."""
    declaration = re.search(r"^  func\.func private (@parallax_compile_attention_\d+)\(.*$", model, re.MULTILINE)
    kernel = re.sub(r"#map", "#kernel_map", kernel_for(declaration[0]))
    aliases, body = kernel.split("module {\n", 1)
    body = body.rstrip().removesuffix("}").replace("func.func @attention(", f"func.func private {declaration[1]}(")
    return aliases + model.replace(declaration[0], body)


def run(model: str, name: str, *inputs: Tensor) -> Tensor:
    """The function ``name`` of the module on this CPU, by IREE."""
    from iree import compiler, runtime

    flags = ["--iree-llvmcpu-target-cpu=host"]
    binary = compiler.compile_str(model, target_backends=["llvm-cpu"], extra_args=flags)
    config = runtime.Config("local-task")
    context = runtime.SystemContext(config=config)
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, binary))
    arrays = [runtime.asdevicearray(config.device, tensor.numpy()) for tensor in inputs]
    return torch.from_numpy(context.modules.module[name](*arrays).to_host().copy())


def main(out: Path | None = None) -> dict[str, float]:
    """Both ways; returns their relative errors against float64."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(1, LENGTH, HEADS * WIDTH)
    decomposed = plx.export_mlir(model, [x], name="block")
    opaque = plx.export_mlir(model, [x], name="block", opaque=True)
    linked = link(opaque)
    with torch.no_grad():
        want = Block.forward(model.double(), x.double())
    errors = {}
    for name, text in {"decomposed": decomposed, "opaque, linked": linked}.items():
        errors[name] = float((run(text, "block", x).double() - want).norm() / want.norm())
        print(f"{name}: {len(text.splitlines())} lines, relative error {errors[name]:.1e}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in {"decomposed": decomposed, "opaque": opaque, "linked": linked}.items():
            (out / f"{name}.mlir").write_text(text, encoding="utf-8")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args().out)
