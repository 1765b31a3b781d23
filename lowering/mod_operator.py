"""Higher-order operators whose arguments hold mods: everything about them that does not depend on what they compute.

An operator is declared by its dense implementation, its shapes and the places of its mods. From these follow the node that a
tracer records, with each mod as a subgraph and the tensors that it captures as operands, and what functionalization and
selective checkpointing need. Arguments are positional; captured tensors are tuples, one for each mod.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import DispatchKey

from .torch_compat import once_imported
from .torch_compat_dynamo import register_dynamo_operator
from .torch_compat_operator import (
    HigherOrderOperator,
    ProxyTorchDispatchMode,
    UnsupportedAliasMutationException,
    functionalized_mutates,
    redirect_checkpointing_modes,
    register_fake,
    set_original_aten_op,
    trace_mod,
    track_tensor_tree,
    validate_subgraph_args_types,
)

Mod = Callable[..., Any]


def statistics_dtype(query: Tensor) -> torch.dtype:
    """LSE and row means are float32, and float64 for float64 inputs."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def example_arguments(
    query: Tensor, *, score: bool = True, grad: bool = False, requires_grad: bool = False
) -> list[Tensor]:
    """Scalar arguments of a mod: the score (float32, or float64), four indices, and the gradient of a joint graph."""
    dtype = statistics_dtype(query)
    values = [query.new_zeros((), dtype=dtype, requires_grad=requires_grad)] if score else []
    values += [query.new_zeros((), dtype=torch.int) for _ in range(4)]
    if grad:
        values.append(query.new_zeros((), dtype=dtype))
    return values


@dataclass(frozen=True)
class ModPlace:
    """Where an operator holds a mod.

    Attributes:
        name: what the user calls it; the subgraph's name.
        argument: name of the argument; item: position in it, where it is a tuple.
        buffers: name of the argument with the tensors that it captures.
        kind: ``"score"``; ``"forward"`` and ``"joint"``, the two graphs that a backward has of a score mod; ``"mask"``.
    """

    name: str
    argument: str
    item: int | None
    buffers: str
    kind: str = "score"

    def example(self, query: Tensor) -> list[Tensor]:
        """Scalars on which the mod is traced."""
        if self.kind == "mask":
            return example_arguments(query, score=False)
        requires_grad = query.requires_grad if self.kind == "score" else True
        return example_arguments(query, grad=self.kind == "joint", requires_grad=requires_grad)


MASK = ModPlace("mask_mod", "block_mask", -1, "mask_mod_buffers", "mask")
SCORE = ModPlace("score_mod", "score_mod", None, "score_mod_buffers")
COVARIANCE = ModPlace("covariance_mod", "covariance_mod", None, "covariance_mod_buffers")


class ModOperator(HigherOrderOperator):
    """An operator over tensors and mods.

    Args:
        name: of the node.
        dense: its implementation in plain torch, whose signature is the operator's: the first argument is the query.
        fake: the shapes of its results, from the same arguments.
        mods: where its mods are.
    """

    def __init__(self, name: str, dense: Callable[..., Any], fake: Callable[..., Any], mods: tuple[ModPlace, ...]):
        super().__init__(name, cacheable=True)
        self.signature = inspect.signature(dense)
        self.mods = mods
        self._position = {parameter: i for i, parameter in enumerate(self.signature.parameters)}
        self.py_impl(DispatchKey.CompositeExplicitAutograd)(dense)
        register_fake(self)(fake)
        self.py_impl(ProxyTorchDispatchMode)(self._record)
        self.py_functionalize_impl(self._functionalize)
        redirect_checkpointing_modes(self)

    def __call__(self, *arguments: Any) -> Any:
        """Check the operands, fill in what is left out, and dispatch."""
        bound = self.signature.bind(*arguments)
        bound.apply_defaults()
        captured = [bound.arguments[name] for name in dict.fromkeys(place.buffers for place in self.mods)]
        validate_subgraph_args_types(tuple(buffer for buffers in captured for buffer in buffers))
        return super().__call__(*bound.args)

    def _with_mods(self, arguments: Sequence[Any], change: Callable[[ModPlace, Mod, tuple], Mod]) -> list[Any]:
        """``arguments`` with each mod replaced by what ``change(place, mod, captured tensors)`` makes of it."""
        changed = list(arguments)
        for place in self.mods:
            at, buffers = self._position[place.argument], changed[self._position[place.buffers]]
            if place.item is None:
                changed[at] = change(place, changed[at], buffers)
            else:
                items = list(changed[at])
                items[place.item] = change(place, items[place.item], buffers)
                changed[at] = tuple(items)
        return changed

    def _record(self, mode: Any, *arguments: Any) -> Any:
        """Put a call into the graph being traced."""
        from . import register_lowerings

        register_lowerings()  # an exported program reaches Inductor without passing through our Dynamo hook
        example = self(*arguments)
        root = mode.tracer.root

        def traced(place: ModPlace, mod: Mod, buffers: tuple) -> Mod:
            graph = trace_mod(mod, *place.example(arguments[0]), *buffers)
            name = place.name + ("_joint" if place.kind == "joint" else "")
            root.register_module(mode.tracer.get_fresh_qualname(name), graph)
            return graph

        proxies = pytree.tree_map(mode.tracer.unwrap_proxy, tuple(self._with_mods(arguments, traced)))
        with set_original_aten_op(self):
            proxy = mode.tracer.create_proxy("call_function", self, proxies, {})
        return track_tensor_tree(example, proxy, constant=None, tracer=mode.tracer)

    def _functionalize(self, ctx: Any, *arguments: Any) -> Any:
        unwrapped = [
            ctx.unwrap_tensors(argument) if isinstance(argument, (Tensor, tuple)) else argument
            for argument in arguments
        ]
        with ctx.redispatch_to_next():

            def functional(place: ModPlace, mod: Mod, buffers: tuple) -> Mod:
                if place.kind == "score" and functionalized_mutates(ctx, mod, [*place.example(unwrapped[0]), *buffers]):
                    raise UnsupportedAliasMutationException(
                        f"{place.name} writes into a tensor; mods must be pure functions"
                    )
                return ctx.functionalize(mod)

            out = self(*self._with_mods(unwrapped, functional))
        return ctx.wrap_tensors(out)

    def register_dynamo(self) -> None:
        """Let Dynamo trace calls of this operator, whose mods are then plain functions."""
        from . import register_lowerings

        kinds = {"score": "score_mod", "mask": "mask_fn"}
        at = [self._position[place.argument] for place in self.mods]
        register = functools.partial(
            register_dynamo_operator,
            self,
            mods={i: kinds[place.kind] for i, place in zip(at, self.mods, strict=True)},
            names={i: place.name for i, place in zip(at, self.mods, strict=True)},
            on_trace=register_lowerings,
        )
        once_imported("torch._dynamo", register)
