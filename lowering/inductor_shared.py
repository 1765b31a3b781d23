"""What the lowerings of all operators share: mods as templates take them, layouts, buffers, what the target can do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import counters
from .mod_graphs import (
    digest,
    fold_factors,
    is_additive,
    is_affine,
    is_elementary_mod,
    is_identity,
    largest_slope,
)
from .torch_compat_inductor import inductor

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@dataclass
class Mod:
    """A mod as the templates take it: its inlined value, its captured tensors, and in the backward its joint graph.

    Attributes:
        elementary: whether it, and its joint graph, do arithmetic only (:func:`.mod_graphs.is_elementary_mod`).
        affine: whether it adds to its score a multiple of the row and one of the key (:func:`.mod_graphs.is_affine`).
        additive: whether it only adds to its score; known in the backward.
        largest_slope: bound on how fast it grows with its score; known in the backward.
    """

    value: Any
    buffers: list[Any]
    identity: bool
    joint: Any = None
    digest: str = ""
    elementary: bool = True
    affine: bool = False
    additive: bool = True
    largest_slope: float = 1.0

    @property
    def grad(self) -> Any:
        """The gradient of its score, inlined; the value itself where no backward asks."""
        return self.joint.grad_input if self.joint is not None else self.value

    @property
    def captured_grads(self) -> list[Any]:
        """What computes the gradients of its captured tensors."""
        return self.joint.captured_grads_compute if self.joint is not None else []

    @property
    def mutated(self) -> list[Any]:
        """The buffers that those gradients are added to."""
        return self.joint.mutated_grads if self.joint is not None else []


def placeholders(device: torch.device, *, score: bool) -> list[Any]:
    """A mod's scalar arguments."""
    names = ([("score", torch.float32)] if score else []) + [(name, torch.int32) for name in ("b", "h", "m", "n")]
    return [inductor.create_placeholder(name, dtype, device) for name, dtype in names]


def realized(buffers: Sequence[Any]) -> list[Any]:
    """Buffers in memory, with layouts that stay."""
    found = inductor.maybe_realize(list(buffers))
    inductor.freeze_irnodes(found)
    return found


def inline(graph: Any, buffers: Sequence[Any], device: torch.device, *, score: bool) -> Any:
    """A traced mod as code that a template takes in."""
    value = inductor.build_subgraph_buffer(placeholders(device, score=score) + list(buffers), graph)
    inductor.freeze_irnodes(value)
    return value


def forward_mod(graph: Any, buffers: Sequence[Any], device: torch.device) -> Mod:
    """A score mod's value."""
    traced = graph.graph_module
    name, elementary = digest(traced), is_elementary_mod(traced)
    if elementary:
        fold_factors(traced)
    value = inline(graph, buffers, device, score=True)
    return Mod(
        value,
        realized(buffers),
        is_identity(traced),
        digest=name,
        elementary=elementary,
        affine=elementary and is_affine(traced),
    )


def backward_mod(graph: Any, joint: Any, buffers: Sequence[Any], device: torch.device) -> Mod:
    """A score mod's value and its gradients."""
    mod = forward_mod(graph, buffers, device)
    joint.graph_module.graph.eliminate_dead_code()
    mod.elementary = mod.elementary and is_elementary_mod(joint.graph_module)
    if mod.elementary:
        fold_factors(joint.graph_module)
    inductor.validate_joint_graph(joint.graph_module.graph)
    inputs = [*placeholders(device, score=True), inductor.create_placeholder("grad_score_mod", torch.float32, device)]
    outputs = inductor.build_subgraph_buffer(inputs + list(buffers), joint)
    inductor.freeze_irnodes(outputs)
    mod.joint = inductor.process_joint_outputs(outputs, len(inputs))
    mod.additive = is_additive(joint.graph_module)
    mod.largest_slope = largest_slope(joint.graph_module) if mod.elementary else math.inf
    return mod


def node_layouts(results: Any = None) -> list[Any]:
    """The layouts of the node's results as its fake promised them (or of ``results``); None for one that is left out."""

    def expression(size: Any) -> Any:
        return size.node.expr if isinstance(size, torch.SymInt) else size

    def layout(fake: torch.Tensor | None) -> Any:
        if fake is None:
            return None
        ir = inductor.ir
        sizes, strides = map(expression, fake.shape), map(expression, fake.stride())
        # The fakes live on the device of the node, which is not the device that they report when code is generated
        # for a GPU on a machine without one.
        return ir.FixedLayout(fake.device, fake.dtype, list(sizes), list(strides))

    promised = inductor.V.graph.current_node.meta["val"] if results is None else results
    return [layout(fake) for fake in promised if not isinstance(fake, tuple)]


def allocate(layout: Any) -> Any:
    """A buffer of ``layout`` that a kernel writes."""
    return inductor.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device=layout.device)


def has_counters() -> bool:
    """Whether the code that is being generated can ask for :mod:`.counters`: a C++ wrapper, or an artifact, cannot."""
    return counters.has_counters() and not inductor.V.graph.cpp_wrapper


def counters_at_zero(device: torch.device, count: int) -> Any:
    """int32 zeros for a kernel that leaves them at zero: :mod:`.counters`, or where there are none, filled for the call."""
    if not has_counters():
        return inductor.lowerings[torch.ops.aten.full]([count], 0, dtype=torch.int32, device=device)
    device_text = f"device(type={device.type!r}, index={device.index})"
    return inductor.found_at_each_call(
        f"counters({device_text}, get_raw_stream({device.index}), {count})",
        [
            "from torch import device",
            "from parallax_compile.lowering.counters import counters, prepare",
            f"prepare({device_text})",
        ],
        inductor.ir.FixedLayout(device, torch.int32, [count], [1]),
    )


def precision() -> str:
    """Precision of float32 products: what ``torch.set_float32_matmul_precision`` says, as flex_attention has it."""
    return "'ieee'" if torch.get_float32_matmul_precision() == "highest" else "'tf32'"


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block may use on ``device``."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 101376)


def tma_possible(device: torch.device, tensors: Sequence[Any]) -> bool:
    """Whether the target has tensor descriptors and each of ``tensors`` can be read through them.

    That takes contiguous rows of which no two are the same memory, and the base and every other stride at multiples of 16
    bytes. A kernel makes its descriptors in scratch memory, of which a C++ wrapper (AOTInductor's) has none for each block.
    """
    graph = inductor.V.graph
    if torch.cuda.get_device_capability(device) < (9, 0) or graph.cpp_wrapper:
        return False
    multiple = graph.sizevars.statically_known_multiple_of

    def possible(tensor: Any) -> bool:
        itemsize = tensor.get_dtype().itemsize
        *strides, innermost = tensor.get_stride()
        offsets = [*strides, tensor.get_layout().offset]
        return (
            innermost == 1
            and strides[-1] != 0
            and tensor.get_name() not in graph.unaligned_buffers
            and all(multiple(offset * itemsize, 16) for offset in offsets)
        )

    return all(map(possible, tensors))


def distinct(nodes: list[Any]) -> list[Any]:
    """Each node once."""
    seen: dict[int, Any] = {}
    for node in nodes:
        seen.setdefault(id(node), node)
    return list(seen.values())


def flat(subgraphs: list[Any]) -> list[Any]:
    """The subgraphs in one list; some stand for several."""
    found: list[Any] = []
    for subgraph in subgraphs:
        found += subgraph if isinstance(subgraph, (list, tuple)) else [subgraph]
    return found
