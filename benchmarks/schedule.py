"""How long a warp needs at least for a step of a Hopper kernel, as ptxas scheduled it. Needs no GPU.

    python benchmarks/schedule.py core_forward [--member PARALLAX] [--width 128] [--options '{"WARP_SPECIALIZED": true}']

Of the kernel's innermost loop with products one line for each stretch up to a wait for products, a branch, a vote or a
barrier: the cycles that its instructions hold the warp by themselves (the stall counts that ptxas writes beside them), how
many they are, and which. Memory, products and the other warps come on top; beside products an instruction takes longer
(benchmarks/NOTES.md, "What a step of the forward waits for"). A stretch with many more cycles than instructions is a chain.
What branches pass by, as masks and multiplications by one, is counted.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from parallax_compile.lowering import codegen, cubin
from tabulate import tabulate

import parallax_compile as plx
from parallax_compile.shapes import Shape

_LABEL = re.compile(r"\s*(LBB\d+):")
_INSTRUCTION = re.compile(r"\s*\S+:\S+:\S+:\S+:([0-9a-f])\s+(?:@!?U?P\d\s+)?(\S+)(.*);")
_BORDERS = ("WARPGROUP.DEPBAR", "BRA", "VOTE", "BAR.SYNC")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its operation with modifiers, its operands, and the cycles until the warp may go on."""

    operation: str
    operands: str
    stall: int

    @property
    def ends_a_stretch(self) -> bool:
        return self.operation.startswith(_BORDERS)


def loops(sass: str) -> Iterator[list[Instruction]]:
    """Bodies of the loops in text of ``triton.tools.disasm.get_sass``, in the order of their ends."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if (label := _LABEL.match(line)) is not None:
            labels[label[1]] = len(found)
        elif (parts := _INSTRUCTION.match(line)) is not None:
            found.append(Instruction(parts[2], parts[3], int(parts[1], 16)))
            target = re.search(r"LBB\d+", parts[3]) if parts[2].startswith("BRA") else None
            if target is not None and target[0] in labels:
                yield found[labels[target[0]] :]


def innermost(sass: str) -> list[Instruction]:
    """The shortest loop with products; where groups of warps have one each, the first of those.

    Raises:
        ValueError: there is none.
    """
    with_products = [body for body in loops(sass) if any("GMMA" in each.operation for each in body)]
    if not with_products:
        raise ValueError("no loop of this kernel has products of warp groups; expected a kernel compiled for sm_90")
    return min(with_products, key=len)


def stretches(body: list[Instruction]) -> Iterator[tuple[str, int, int, str]]:
    """Of each stretch what ends it, its cycles, how many instructions it has, and which most often."""
    stretch: list[Instruction] = []
    for each in body:
        stretch.append(each)
        if each.ends_a_stretch or each is body[-1]:
            names = collections.Counter(one.operation.split(".")[0] for one in stretch)
            mix = ", ".join(f"{count} {name}" for name, count in names.most_common(6))
            yield f"{each.operation}{each.operands}"[:40], sum(one.stall for one in stretch), len(stretch), mix
            stretch = []


def main() -> int:
    """Compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="core_forward, core_backward_query, core_backward_key, ...")
    parser.add_argument("--member", default="PARALLAX", choices=sorted(plx.family()))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--options", type=json.loads, default={"WARP_SPECIALIZED": True}, help="kernel_options")
    arguments = parser.parse_args()
    spec = plx.family()[arguments.member].replace(mask_mod=plx.masks.causal())

    def call(*inputs: Any) -> Any:
        return plx.attention(*inputs, spec=spec, kernel_options=arguments.options)

    inputs = Shape.of((4, 16, 4096, arguments.width)).tensors(spec, torch.bfloat16)
    kernel = codegen.generate(call, inputs, target="sm_90").stage(arguments.stage)
    from triton.tools.disasm import get_sass

    body = innermost(get_sass(cubin.compile_kernel(kernel, "sm_90").asm["cubin"]))
    print(tabulate(stretches(body), headers=["until", "cycles", "instructions", "most of them"]))
    print(f"a step: {sum(each.stall for each in body)} cycles, {len(body)} instructions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
