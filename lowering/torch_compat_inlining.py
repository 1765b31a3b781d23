"""Plain torch code traced and lowered in a node's place, as the CPU path is (private torch: :mod:`.torch_compat`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .torch_compat import resolve
from .torch_compat_inductor import inductor, length_hint

__all__ = ["in_memory", "inline_in_lowering", "traced_while_loop"]


def traced_while_loop(
    condition: Callable[..., Tensor], body: Callable[..., tuple], carried: Sequence[Tensor], operands: Sequence[Any]
) -> Any:
    """Torch's ``while_loop`` with explicit operands, as a node of the graph being traced."""
    while_loop_op = resolve("torch._higher_order_ops.while_loop:while_loop_op")
    given = len(carried) + len(operands)
    # A body whose operand has the size s + 1 must be told s: where no operand has that size, s is one more operand.
    needed, alone = _symbols_of([*carried, *operands])
    symbols = [_inlined_symbols[s] for s in needed if s not in alone and s in _inlined_symbols]
    return while_loop_op(
        lambda *state: condition(*state[:given]),
        lambda *state: body(*state[:given]),
        tuple(carried),
        (*operands, *symbols),
    )


_inlined_symbols: dict[Any, torch.SymInt] = {}
"""The symbols in sizes of the node that is being inlined, as numbers of its graph."""


def _symbols_of(values: Sequence[Any]) -> tuple[list[Any], set[Any]]:
    """The symbols of sizes, strides and numbers among ``values``, in order, and those of them that are one of these alone."""
    numbers = [value for value in values if isinstance(value, torch.SymInt)]
    for value in values:
        if isinstance(value, Tensor):
            numbers += [n for n in (*value.shape, *value.stride()) if isinstance(n, torch.SymInt)]
    expressions = [number.node.expr for number in numbers]
    symbols = {symbol for expression in expressions for symbol in expression.free_symbols}
    return sorted(symbols, key=str), {expression for expression in expressions if expression.is_Symbol}


def inline_in_lowering(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Trace ``function`` on the fake tensors of the node being lowered and lower the result in the node's place.

    Args:
        function: plain torch code with the node's arguments; mods arrive as FX graphs.
        arguments: the node's arguments as the lowering got them.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import process_subgraph_nodes
    from torch.fx.experimental.proxy_tensor import make_fx

    graph, ir = inductor.V.graph, inductor.ir
    root = graph.module

    def fake(argument: Any) -> Any:
        if not isinstance(argument, torch.fx.Node):
            return argument
        if argument.op == "get_attr" and isinstance(getattr(root, str(argument.target), None), torch.fx.GraphModule):
            return getattr(root, str(argument.target))
        return argument.meta["val"]

    given, structure = pytree.tree_flatten(
        list(arguments), is_leaf=lambda leaf: isinstance(leaf, (ir.Subgraph, ir.IRNode))
    )
    node_arguments = pytree.tree_leaves(
        list(graph.current_node.args), is_leaf=lambda leaf: leaf is None or isinstance(leaf, torch.fx.Node)
    )
    fakes = [fake(argument) for argument in node_arguments]
    fake_mode = next(leaf.fake_mode for leaf in fakes if isinstance(leaf, Tensor))
    names, _ = _symbols_of(fakes)
    symbols = [fake_mode.shape_env.create_symintnode(symbol, hint=None) for symbol in names]
    dynamic = [i for i, leaf in enumerate(fakes) if isinstance(leaf, (Tensor, torch.SymInt, torch.SymFloat))]

    def call(*values: Any) -> Any:
        leaves = list(fakes)
        for position, leaf in zip(dynamic, values[: len(dynamic)], strict=True):
            leaves[position] = leaf
        _inlined_symbols.clear()
        _inlined_symbols.update(zip(names, values[len(dynamic) :], strict=True))
        return function(*pytree.tree_unflatten(leaves, structure))

    with fake_mode, inductor.V.set_fake_mode(fake_mode):
        traced = make_fx(call, decomposition_table=select_decomp_table())(*[fakes[i] for i in dynamic], *symbols)
    _lift_subgraphs(traced, root)
    _views_as_reshapes(traced)
    _strides_as_numbers(traced)
    with _no_donated_buffers():
        return process_subgraph_nodes(traced, [*(given[i] for i in dynamic), *names])


def in_memory(tensor: Tensor) -> Tensor:
    """``tensor``, which Inductor is to keep in memory and not to compute where it is read, while it inlines.

    For chunks that are read as rows and cut to a length: on a CPU Inductor splits a loop whose index it divides by the chunk
    into whole chunks, and loses the rows that are left (``CppScheduling.try_loop_split``, torch 2.11 to 2.13).
    """
    if not isinstance(tensor, resolve("torch._subclasses.fake_tensor:FakeTensor")):
        return tensor
    found: Tensor = resolve("torch._inductor.inductor_prims:force_stride_order")(tensor, tensor.stride())
    return found


@contextlib.contextmanager
def _no_donated_buffers() -> Iterator[None]:
    """Keep loop bodies from overwriting their operands.

    AOTAutograd lists by position which inputs of the *backward graph* may be overwritten, and Inductor reads the list for
    the inputs of each loop body too.
    """
    context = resolve("torch._guards:TracingContext").try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        yield
        return
    donated, metadata.bw_donated_idxs = metadata.bw_donated_idxs, None
    try:
        yield
    finally:
        metadata.bw_donated_idxs = donated


def _lift_subgraphs(traced: torch.fx.GraphModule, root: torch.fx.GraphModule) -> None:
    """Hang the loop bodies of an inlined graph on the graph that Inductor lowers, where it looks for them."""
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            name = f"parallax_inlined_{len(root._modules)}_{node.target}"
            value = getattr(traced, node.target)
            if isinstance(value, torch.fx.GraphModule):
                _views_as_reshapes(value)
            setattr(root, name, value)
            node.target = name


def _views_as_reshapes(traced: torch.fx.GraphModule) -> None:
    """Views become reshapes: Inductor chooses layouts that the traced strides do not foresee."""
    resolve("torch._inductor.fx_passes.post_grad:view_to_reshape")(traced)


def _strides_as_numbers(traced: torch.fx.GraphModule) -> None:
    """The strides of :func:`in_memory` become numbers: only their order is read, which torch 2.11 finds not among symbols."""
    keep = resolve("torch._inductor.inductor_prims:force_stride_order")
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is keep:
            strides = [stride.meta["val"] if isinstance(stride, torch.fx.Node) else stride for stride in node.args[1]]
            numbers = [length_hint(getattr(getattr(stride, "node", None), "expr", stride)) for stride in strides]
            node.args = (node.args[0], numbers)
