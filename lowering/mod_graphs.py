"""What a traced mod says about itself, so that a trivial one costs nothing."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.utils._pytree as pytree


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
_OF_SCORES = ("div", "neg", "exp2", "tanh_approx")


def is_elementary_mask(graph: torch.fx.GraphModule) -> bool:
    """Whether a mask only adds, compares and combines its indices and captured tensors read at them."""
    return _consists_of(graph, (*_COMPARISONS, *_LOGIC, *_ARITHMETIC))


def is_elementary_mod(graph: torch.fx.GraphModule) -> bool:
    """Whether a score mod, or its joint graph, is arithmetic of its score, its indices and captured tensors read at them."""
    return _consists_of(graph, (*_ARITHMETIC, *_OF_SCORES))


def _consists_of(graph: torch.fx.GraphModule, names: tuple[str, ...]) -> bool:
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return all(isinstance(call, torch._ops.OpOverload) and call.overloadpacket.__name__ in names for call in calls)


def largest_slope(joint: torch.fx.GraphModule) -> float:
    """A bound on how fast an elementary mod grows with its score, from its joint graph by interval arithmetic; maybe inf."""
    whole = (-math.inf, math.inf)
    found: dict[Any, tuple[float, float]] = {}

    def interval(value: Any) -> tuple[float, float]:
        return found[value] if isinstance(value, torch.fx.Node) else (float(value), float(value))

    def product(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        corners = [x * y if x and y else 0.0 for x in a for y in b]  # 0 times inf: nothing is infinite itself
        return min(corners), max(corners)

    nodes = list(joint.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    for node in nodes:
        if node.op == "placeholder":
            found[node] = (1.0, 1.0) if node is placeholders[_GRAD_OF_SCORE] else whole
        elif node.op == "call_function":
            name, scale = node.target.overloadpacket.__name__, float(node.kwargs.get("alpha", 1.0))
            a, *others = map(interval, node.args[: 1 if name in ("index", "neg", "exp2", "tanh_approx") else 2])
            if name in ("add", "sub"):
                b = product(others[0], (scale, scale) if name == "add" else (-scale, -scale))
                found[node] = (a[0] + b[0], a[1] + b[1])
            elif name == "mul":
                found[node] = product(a, others[0])
            elif name == "div" and others[0][0] == others[0][1] != 0:
                found[node] = product(a, (1 / others[0][0], 1 / others[0][0]))
            elif name == "tanh_approx":
                found[node] = (-1.0, 1.0)
            else:
                found[node] = (-a[1], -a[0]) if name == "neg" else whole
    (outputs,) = nodes[-1].args
    return 0.0 if outputs[0] is None else max(map(abs, interval(outputs[0])))


def is_additive(joint: torch.fx.GraphModule) -> bool:
    """Whether a mod only adds to its score: its derivative, as the joint graph has it, is 1."""
    nodes = list(joint.graph.nodes)
    (outputs,) = nodes[-1].args
    return outputs[0] is [node for node in nodes if node.op == "placeholder"][_GRAD_OF_SCORE]


def is_affine(graph: torch.fx.GraphModule) -> bool:
    """Whether an elementary mod adds to its score a multiple of the row and one of the key, as ALiBi does.

    Then ``f(m, n) = f(m, n0) + f(m0, n) - f(m0, n0)``, so that a tile needs no arithmetic of each pair's indices. Tensors read
    at a row or at a key are not counted: they could hold infinities, too, of which there are no differences.
    """
    score, batch, head, row, key, *captured = (node for node in graph.graph.nodes if node.op == "placeholder")
    # Which indices a value has as summands, or whether as more than that; and how often the score is one.
    found: dict[Any, tuple[frozenset[str], int]] = {
        **dict.fromkeys((batch, head, *captured), (frozenset(), 0)),
        score: (frozenset(), 1),
        row: (frozenset({"row"}), 0),
        key: (frozenset({"key"}), 0),
    }
    mixed = (frozenset({"more"}), 0)

    def kind(value: Any) -> tuple[frozenset[str], int]:
        return found[value] if isinstance(value, torch.fx.Node) else (frozenset(), 0)

    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        name, scale = node.target.overloadpacket.__name__, node.kwargs.get("alpha", 1)
        operands = pytree.tree_leaves(node.args)
        parts, scores = zip(*map(kind, operands), strict=True)
        varying = [part for part in parts if part]
        if name in ("add", "sub") and not (scores[1] and (name == "sub" or scale != 1)):
            found[node] = frozenset().union(*parts), sum(scores)
        elif any(scores) or (varying and name == "index") or len(varying) > 1:
            found[node] = mixed
        elif name in ("mul", "neg") or (name == "div" and not parts[1]) or not varying:
            found[node] = frozenset().union(*parts), 0
        else:
            found[node] = mixed
    (returned,) = list(graph.graph.nodes)[-1].args
    part, times = kind(pytree.tree_leaves(returned)[0])
    return times == 1 and "more" not in part


def fold_factors(graph: torch.fx.GraphModule) -> None:
    """Multiply the constant factors of a product with one another, as no compiler does: it would round otherwise."""

    def is_product(node: Any) -> bool:
        float32 = (
            isinstance(node, torch.fx.Node) and node.op == "call_function" and node.meta["val"].dtype == torch.float32
        )
        return float32 and node.target is torch.ops.aten.mul.Tensor

    def constants(node: torch.fx.Node) -> list[int]:
        """The places of a product's constant factors."""
        return [place for place, factor in enumerate(node.args) if not isinstance(factor, torch.fx.Node)]

    def inner(node: Any) -> torch.fx.Node | None:
        """A product with a constant among the factors of ``node``."""
        if not is_product(node) or len(node.users) > 1:
            return None
        return node if constants(node) else next(filter(None, map(inner, node.args)), None)

    for node in filter(is_product, list(graph.graph.nodes)):
        for place in constants(node):
            rest = node.args[1 - place]
            other = inner(rest)
            if other is None:
                continue
            (at,) = constants(other)
            factor = node.args[place] * other.args[at]  # type: ignore[operator]
            node.replace_all_uses_with(rest)  # type: ignore[arg-type]
            if torch.tensor(factor, dtype=torch.float32) == 1:
                other.replace_all_uses_with(other.args[1 - at])  # type: ignore[arg-type]
            else:
                other.update_arg(at, factor)
    graph.graph.eliminate_dead_code()
    graph.recompile()


_GRAD_OF_SCORE = 5
"""Which argument of a joint graph is the gradient of the mod's value: after score, b, h, m and n."""


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
