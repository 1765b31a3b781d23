"""What a traced mod says about itself, so that a trivial one costs nothing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def is_identity(graph: Any) -> bool:
    """Whether a score mod returns its score as it came; of plain code we cannot know."""
    if not isinstance(graph, torch.fx.GraphModule):
        return False
    nodes = list(graph.graph.nodes)
    (returned,) = nodes[-1].args
    if isinstance(returned, (list, tuple)):
        (returned,) = returned
    return returned is nodes[0]


def is_always_true(graph: Any) -> bool:
    """Whether a mask reads neither its indices nor a tensor: it only makes a constant (ours makes True)."""
    if not isinstance(graph, torch.fx.GraphModule):
        return False
    made: tuple[Any, ...] = (
        torch.ops.aten.new_ones.default,
        torch.ops.aten.ones.default,
        torch.ops.aten.full.default,
    )
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return len(calls) == 1 and calls[0].target in made


_COMPARISONS = ("ge", "gt", "le", "lt", "eq", "ne")
_LOGIC = (
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "bitwise_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "logical_not",
)
_ARITHMETIC = ("add", "sub", "mul", "index")


def is_elementary(graph: torch.fx.GraphModule) -> bool:
    """Whether a mask only adds, compares and combines its indices and captured tensors read at them."""
    known = {*_COMPARISONS, *_LOGIC, *_ARITHMETIC}
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return all(isinstance(call, torch._ops.OpOverload) and call.overloadpacket.__name__ in known for call in calls)


def differentiated_buffers(joint: torch.fx.GraphModule) -> tuple[bool, ...]:
    """For each tensor that a mod captures, whether its joint graph gives a gradient for it."""
    (outputs,) = list(joint.graph.nodes)[-1].args
    return tuple(output is not None for output in outputs[5:])


def digest(graph: torch.fx.GraphModule) -> str:
    """What a mod computes, as a short text that is the same in every process: operations and constants.

    Captured tensors count by their position only, so that two mods that differ in captured values agree.
    """
    numbers: dict[torch.fx.Node, int] = {}

    def plain(value: Any) -> str:
        # Devices are left out: a graph traced on a CPU for a GPU has that machine's.
        return "device" if isinstance(value, torch.device) else str(value)

    lines = []
    for number, node in enumerate(graph.graph.nodes):
        numbers[node] = number
        arguments = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda used: f"%{numbers[used]}")
        target = node.target if node.op == "call_function" else ""
        lines.append(f"{node.op} {target} {torch.fx.node.map_aggregate(arguments, plain)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
