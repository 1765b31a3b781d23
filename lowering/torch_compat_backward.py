"""The kernels of a backward begun while those of its forward are compiled.

AOTAutograd has both graphs when it compiles the forward, and lowers the backward when that is called, so that the two wait for
Triton one after the other. While a process waits for one of our kernels of the forward it has nothing else to do: here it
lowers our operators of the backward, each alone, and begins to compile their kernels. When Inductor lowers the whole backward,
what came of it is in Triton's cache, or on its way there. Inductor finds it if the text of a kernel is the same, and nothing
depends on that; it usually is, because kernels are called after their template, not after the graph around them
(:mod:`.torch_compat_inductor`), and operands have the layouts that eager gives them.

The private symbols are fenced in :mod:`.torch_compat`.
"""

from __future__ import annotations

import copy
import functools
import logging
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .torch_compat import resolve

__all__ = ["begin_backward_of", "follow_partitions", "lowered_alone"]

_log = logging.getLogger(__name__)

lowered_alone: ContextVar[bool] = ContextVar("lowered_alone", default=False)
"""Whether what is lowered is never run, for the sake of its kernels only."""

_backwards: WeakKeyDictionary[fx.GraphModule, fx.GraphModule] = WeakKeyDictionary()


def follow_partitions() -> None:
    """From now on, know the backward of each forward that AOTAutograd hands to Inductor."""
    compile_fx = resolve("torch._inductor.compile_fx")
    partition = compile_fx.partition_fn

    @functools.wraps(partition)
    def partition_fn(*arguments: Any, **named: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = partition(*arguments, **named)
        _backwards[forward] = backward
        return forward, backward

    compile_fx.partition_fn = partition_fn


def begin_backward_of(forward: fx.GraphModule, until: Callable[[], bool]) -> None:
    """Lower our operators in a forward's backward, once, and no more of them when ``until`` says so."""
    backward = _backwards.pop(forward, None)
    config = resolve("torch._inductor.config")
    if backward is None or config.max_autotune or config.cpp_wrapper or config.trace.enabled:
        return  # candidates would be timed twice; other texts; files of the forward's would be written over
    seen: set[str] = set()
    for node in backward.graph.nodes:
        if until():
            return
        if not str(node.target).startswith("parallax"):
            continue
        try:
            if (signature := _signature(node)) not in seen:
                seen.add(signature)
                _lower(node)
        except Exception:  # Inductor lowers it again, and says what is wrong
            _log.debug("%s was not lowered ahead", node, exc_info=True)


def _signature(node: fx.Node) -> str:
    """What the kernels of an operator depend on."""

    def described(argument: fx.Node) -> Any:
        if argument.op == "get_attr":
            return getattr(argument.graph.owning_module, str(argument.target)).code
        value = argument.meta["val"]
        return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value

    return repr((node.target, fx.node.map_arg((node.args, node.kwargs), described)))


def _lower(node: fx.Node) -> None:
    """Generate the kernels of one operator, from its operands or what these are views of."""
    operands = dict.fromkeys(_operands(node))
    results = [user for user in node.users if user.target is operator.getitem]
    values = pytree.tree_leaves([copied.meta.get("val") for copied in (*operands, *results)])
    if any(map(_is_symbolic, values)):
        return  # what is lowered with a symbol adds to its guards
    graph, copies, inputs = fx.Graph(), {}, []
    for source in operands:
        if not (_is_view(source) or source.op == "get_attr"):
            copies[source] = graph.placeholder(source.name)
            copies[source].meta["val"] = source.meta["val"]
            inputs.append(source.meta["val"])
    for copied in (*operands, node, *results):
        if copied not in copies:
            copies[copied] = graph.node_copy(copied, copies.__getitem__)
    graph.output(tuple(copies[result] for result in results or [node]))
    virtual = resolve("torch._inductor.virtualized:V")
    token = lowered_alone.set(True)
    try:
        mods = {str(source.target): source.graph.owning_module for source in operands if source.op == "get_attr"}
        # Lowering simplifies mods in place, after it has looked at them.
        module = fx.GraphModule({name: copy.deepcopy(getattr(owner, name)) for name, owner in mods.items()}, graph)
        alone = resolve("torch._inductor.graph:GraphLowering")(module, example_inputs=inputs, is_backward=True)
        mode = resolve("torch._guards:detect_fake_mode")(inputs)
        with virtual.set_fake_mode(mode), virtual.set_graph_handler(alone):
            alone.run(*inputs)
            alone.codegen()
    finally:
        lowered_alone.reset(token)


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """What a node takes, after what that is a view of."""
    for source in node.all_input_nodes:
        if _is_view(source):
            yield from _operands(source)
        yield source


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False)


def _is_symbolic(value: Any) -> bool:
    sizes = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) for size in sizes)
