"""What a node of the operator says, in Inductor's terms: its operands, mods, mask and options as the stages take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .inductor_shared import Mod, inline, realized
from .mod_graphs import digest, is_always_true
from .operator import BlockMaskOperands
from .plan_stages import Problem
from .torch_compat_inductor import inductor

__all__ = ["Call", "call_of", "two_terms"]

_NOT_FOR_KERNELS = ("cache_salt", "tolerance", "max_iterations", "SPLIT_KEYS", "keys")


@dataclass
class Call:
    """Everything that the stages of one node share.

    Attributes:
        query, key, value, probe: the operands, realised; None for no probe.
        block_mask, score_mod, covariance_mod: of the node.
        mask: the inlined mask_mod; ``has_mask`` says whether it hides anything.
        mask_buffers: what it captures.
        scale, intercept: of the node.
        options: kernel options that templates and candidates know.
        digests: mod -> what tells it from others, for the store.
        probe_low: what float32 rows leave of a 16-bit probe; None where there is one term.
        adjoint, adjoint_low: the adjoint of a solve, likewise.
    """

    query: Any
    key: Any
    value: Any
    probe: Any
    block_mask: BlockMaskOperands
    score_mod: Mod
    covariance_mod: Mod
    mask: Any
    mask_buffers: list[Any]
    has_mask: bool
    scale: float
    intercept: bool
    options: dict[str, Any]
    digests: dict[str, str]
    probe_low: Any = None
    adjoint: Any = None
    adjoint_low: Any = None

    @property
    def row_tiles(self) -> dict[str, Any]:
        """The tensors beside the query of which a kernel reads a tile of rows, by the templates' names."""
        named = {"R": self.probe, "R_LOW": self.probe_low, "ADJOINT": self.adjoint, "ADJOINT_LOW": self.adjoint_low}
        return {name: node for name, node in named.items() if node is not None}

    @property
    def device(self) -> torch.device:
        """Of all operands."""
        return self.query.get_device()

    @property
    def block_sparse(self) -> bool:
        """Whether lists say which blocks are visited."""
        return self.block_mask.kv_num_blocks is not None

    @property
    def captured(self) -> list[Any]:
        """The tensors that mods and mask capture."""
        return [*self.score_mod.buffers, *self.covariance_mod.buffers, *self.mask_buffers]

    def problem(self, needs_grad: tuple[bool, bool, bool, bool] | None) -> Problem:
        """What the plan depends on; lengths and batch may be symbols. ``needs_grad``: of query, key, value, probe."""
        batch, q_heads, q_length, width = self.query.get_size()
        _, kv_heads, kv_length, value_width = self.value.get_size()
        guard = inductor.V.graph.sizevars.guard_int
        dtype = self.query.get_dtype()
        return Problem(
            batch=batch,
            q_heads=guard(q_heads),
            kv_heads=guard(kv_heads),
            q_length=q_length,
            kv_length=kv_length,
            width=guard(width),
            value_width=guard(value_width),
            dtype=str(dtype).removeprefix("torch."),
            itemsize=dtype.itemsize,
            device=self.device.type,
            has_probe=self.probe is not None,
            intercept=self.intercept,
            score_mod=not self.score_mod.identity,
            covariance_mod=not self.covariance_mod.identity,
            mask=self.has_mask,
            block_sparse=self.block_sparse,
            needs_grad=needs_grad,
            captured_grads=bool(self.score_mod.mutated or self.covariance_mod.mutated),
        )


def call_of(
    operands: Sequence[Any],
    block_mask: tuple,
    mods: tuple[Mod, Mod],
    mask_buffers: Sequence[Any],
    scale: float,
    intercept: bool,
    options: dict[str, Any],
    adjoint: Any = None,
) -> Call:
    """The call that a node's arguments make: operands and mask realised, their layouts frozen, float32 probes in two terms."""
    query, key, value, probe, *blocks = inductor.maybe_realize([*operands, *block_mask[:8]])
    # float32 rows beside 16-bit queries are two terms.
    low = query.get_dtype()
    if probe is None or probe.get_dtype() == low:
        probe_low = adjoint_low = None
    else:
        probe, probe_low = two_terms(probe, low)
        adjoint, adjoint_low = (None, None) if adjoint is None else two_terms(adjoint, low)
    (adjoint,) = inductor.maybe_realize([adjoint])
    inductor.freeze_irnodes([query, key, value, probe, probe_low, adjoint, adjoint_low])
    device = query.get_device()
    guard = inductor.V.graph.sizevars.guard_int
    mask_graph = block_mask[-1]
    return Call(
        query,
        key,
        value,
        probe,
        BlockMaskOperands(*blocks, guard(block_mask[8]), guard(block_mask[9]), mask_graph),  # type: ignore[call-arg]
        *mods,
        mask=inline(mask_graph, mask_buffers, device, score=False),
        mask_buffers=realized(mask_buffers),
        has_mask=not is_always_true(mask_graph.graph_module),
        scale=scale,
        intercept=intercept,
        options={name: option for name, option in options.items() if name not in _NOT_FOR_KERNELS},
        digests={"score": mods[0].digest, "covariance": mods[1].digest, "mask": digest(mask_graph.graph_module)},
        probe_low=probe_low,
        adjoint=adjoint,
        adjoint_low=adjoint_low,
    )


def two_terms(node: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """``node`` (float32) as the sum of two dense buffers of a 16-bit ``dtype``."""
    aten, do = torch.ops.aten, inductor.lowerings
    # The first term by clearing the bits that it has not: Inductor keeps 16-bit numbers in float32 within a kernel, where a
    # conversion there and back would round nothing.
    bits = -(1 << (23 - 7)) if dtype == torch.bfloat16 else -(1 << (23 - 10))
    high = do[aten.view.dtype](do[aten.bitwise_and](do[aten.view.dtype](node, torch.int32), bits), torch.float32)
    terms = [high, do[aten.sub](node, high)]
    dense = [inductor.ir.ExternKernel.require_contiguous(inductor.to_dtype(term, dtype)) for term in terms]
    first, second = inductor.maybe_realize(dense)
    return first, second
