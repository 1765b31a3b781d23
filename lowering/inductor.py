"""Inductor lowerings of the operator: a plan's stages as instances of our templates (GPU) or inlined code (CPU)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import templates
from . import cpu, elementwise, inductor_decode  # noqa: F401  (elementwise registers its lowerings)
from .candidates import SPECIALIZED_GROUPS, SPECIALIZED_ROWS, SPECIALIZED_STAGES, padded
from .inductor_shared import (
    LN2,
    LOG2E,
    Mod,
    allocate,
    backward_mod,
    distinct,
    flat,
    forward_mod,
    inline,
    node_layouts,
    precision,
    realized,
    shared_memory_limit,
    tma_possible,
)
from .mod_graphs import digest, is_always_true, is_elementary_mask
from .operator import BlockMaskOperands, attention_backward, attention_forward
from .plan import make_plan
from .plan_solve import asked_direct, solve_method
from .plan_split import split_choice, splits_keys
from .plan_stages import Plan, Problem
from .solve import attention_solve
from .torch_compat_gluon import has_gluon
from .torch_compat_inductor import inductor
from .tuned import ask, offered

# Groups of heads of persistent kernels: larger ones balance better, and past the cache still gain (benchmarks/NOTES.md).
_CACHED_BYTES = 64 * 2**20
_HEADS_IN_CACHE = 16


@inductor.SymbolicGridFn
def _tiles_of_rows(batch: Any, heads: Any, length: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(length, meta["BLOCK_M"]), batch, heads)


@inductor.SymbolicGridFn
def _tiles_of_keys(batch: Any, heads: Any, length: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(length, meta["BLOCK_N"]), batch, heads)


@inductor.SymbolicGridFn
def _persistent(batch: Any, heads: Any, length: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (meta["PROGRAMS"], 1, 1)


_SPECIALIZED = "_specialized"
_TEMPLATES = {
    name: inductor.template(f"parallax_{name}", grid, templates.load(name), gluon=name.endswith(_SPECIALIZED))
    for name, grid in (
        ("core_forward", _tiles_of_rows),
        ("core_forward" + _SPECIALIZED, _persistent),
        ("core_backward_query", _tiles_of_rows),
        ("core_backward_query" + _SPECIALIZED, _persistent),
        ("core_backward_key", _tiles_of_keys),
        ("core_backward_key" + _SPECIALIZED, _persistent),
        ("core_solve", _tiles_of_rows),
        ("core_solve_direct", _tiles_of_rows),
    )
}


# --- what a node says -----------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """Everything that the stages of one node share."""

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
        return self.query.get_device()

    @property
    def block_sparse(self) -> bool:
        return self.block_mask.kv_num_blocks is not None

    @property
    def captured(self) -> list[Any]:
        return [*self.score_mod.buffers, *self.covariance_mod.buffers, *self.mask_buffers]

    def problem(self, needs_grad: tuple[bool, bool, bool, bool] | None) -> Problem:
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


def _call(
    operands: Sequence[Any],
    block_mask: tuple,
    mods: tuple[Mod, Mod],
    mask_buffers: Sequence[Any],
    scale: float,
    intercept: bool,
    options: dict[str, Any],
    adjoint: Any = None,
) -> _Call:
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
    return _Call(
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


_NOT_FOR_KERNELS = ("cache_salt", "tolerance", "max_iterations", "SPLIT_KEYS", "keys")


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


# --- instances of templates -----------------------------------------------------------------------------------------


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _zeros_like(node: Any) -> torch.Tensor:
    return torch.zeros([int(size) for size in node.get_size()], dtype=node.get_dtype(), device=node.get_device())


_STREAMED = ("Q", "K", "V", "R", "R_LOW", "ADJOINT", "ADJOINT_LOW", "GRAD_OUT")


def _specialized_possible(stage: str, call: _Call, problem: Problem, switches: dict[str, Any]) -> bool:
    """Whether a warp-specialised kernel can compute the stage: see the head of its template."""
    blocks = call.block_mask
    rows = blocks.kv_block if SPECIALIZED_STAGES.get(stage) == "block_n" else blocks.q_block
    absent = {name for name, value in switches.items() if name.startswith("NEEDS_") and not value}
    return (
        stage in SPECIALIZED_STAGES
        and has_gluon()
        and torch.cuda.get_device_capability(call.device)[0] == 9
        and problem.dtype in ("bfloat16",) + ("float16",) * (stage == "core_forward" and not problem.has_probe)
        and call.probe_low is None
        and call.adjoint is None
        and absent <= ({"NEEDS_PROBE"} if not problem.has_probe else set())
        and all(map(_specialized_takes, (call.score_mod, call.covariance_mod)))
        and call.scale > 0
        and (not problem.mask or is_elementary_mask(blocks.mask_mod.graph_module))
        and not (call.block_sparse and rows % (SPECIALIZED_GROUPS * SPECIALIZED_ROWS))
    )


# A warp-specialised backward keeps the slope of a mod in float16, which ends at 65504.
_LARGEST_SLOPE = 1024.0


def _specialized_takes(mod: Mod) -> bool:
    return mod.elementary and not mod.mutated and mod.largest_slope <= _LARGEST_SLOPE


def _head_group(problem: Problem) -> int:
    """How many heads a persistent kernel takes at a time: as many as have keys and values that the L2 cache about holds."""
    try:
        length = int(problem.kv_length)
    except TypeError:  # a dynamic length
        return _HEADS_IN_CACHE
    bytes_of_head = length * (problem.width + problem.value_width) * problem.itemsize
    shared = problem.q_heads // problem.kv_heads
    return max(1, _CACHED_BYTES // max(1, bytes_of_head)) * shared


def _instantiate(
    stage: str,
    call: _Call,
    problem: Problem,
    inputs: dict[str, Any],
    layout: Any,
    mutated: list[Any],
    subgraphs: list[Any],
    switches: dict[str, Any],
    *,
    grid: tuple[Any, Any, Any],
    sparse: tuple[str, str],
) -> Any:
    """One kernel: the stage's template with each feasible candidate, of which Inductor takes or times the best.

    ``inputs`` are in the order of the template's ``def_kernel``; ``sparse`` names the two pairs of block lists.
    """
    blocks = call.block_mask
    sizevars = inductor.V.graph.sizevars
    shape: dict[str, Any] = {"width": problem.width, "value_width": problem.value_width, "itemsize": problem.itemsize}
    sparse_sizes: dict[str, Any] = {"q_block": blocks.q_block, "kv_block": blocks.kv_block} if call.block_sparse else {}
    has_full = call.block_sparse and blocks.full_kv_num_blocks is not None
    lists = []
    if call.block_sparse:
        lists += [getattr(blocks, f"{sparse[0]}_num_blocks"), getattr(blocks, f"{sparse[0]}_indices")]
    if has_full:
        lists += [getattr(blocks, f"{sparse[1]}_num_blocks"), getattr(blocks, f"{sparse[1]}_indices")]

    def even(length: Any, block: int, sparse_block: int) -> bool:
        whole = max(block, sparse_block if call.block_sparse else 1)
        return bool(sizevars.statically_known_multiple_of(length, whole))

    common: dict[str, Any] = {
        "SCALE": call.scale,
        "GQA": problem.q_heads // problem.kv_heads,
        "D": problem.width,
        "DV": problem.value_width,
        "D_PAD": padded(problem.width),
        "DV_PAD": padded(problem.value_width),
        "HAS_PROBE": problem.has_probe,
        "PROBE_SPLIT": call.probe_low is not None,
        "HAS_ADJOINT": call.adjoint is not None,
        "INTERCEPT": problem.intercept,
        "SCORE_MOD": problem.score_mod,
        "COVARIANCE_MOD": problem.has_probe and problem.covariance_mod,
        "HAS_MASK": problem.mask,
        "BLOCK_SPARSE": call.block_sparse,
        "HAS_FULL_BLOCKS": has_full,
        "Q_BLOCK": blocks.q_block,
        "KV_BLOCK": blocks.kv_block,
        "PRECISION": precision(),
        "LOG2E": LOG2E,
        "LN2": LN2,
        **switches,
    }
    found = offered(
        ask(
            stage,
            device=call.device,
            dtype=call.query.get_dtype(),
            constants=common,
            lengths=(problem.q_length, problem.kv_length),
            mods=call.digests,
        ),
        **shape,
        row_tiles=len(call.row_tiles),
        shared_memory_limit=shared_memory_limit(call.device),
        tma=tma_possible(call.device, [inputs[name] for name in _STREAMED if name in inputs]),
        specialized=_specialized_possible(stage, call, problem, switches),
        tensor_memory=torch.cuda.get_device_capability(call.device)[0] == 10,
        options=call.options,
        **sparse_sizes,
    )
    if not inductor.config.max_autotune:
        found = found[:1]
    generators = {}
    common["HAS_COUNTER"] = any(candidate.specialized for candidate in found)
    if common["HAS_COUNTER"]:
        # Persistent programs draw their items from it, and leave it at 0.
        generators[len(inputs)] = _zeros_like
        counter = inductor.lowerings[torch.ops.aten.full]([2], 0, dtype=torch.int32, device=call.device)
        inputs = inputs | {"COUNTER": realized([counter])[0]}
        mutated = [*mutated, inputs["COUNTER"]]
    nodes = [*inputs.values(), *lists]
    specialized = {
        "PROGRAMS": _multiprocessors(call.device),
        "HEAD_GROUP": _head_group(problem),
        # Whether the derivative of a mod is something else than 1.
        "SCORE_SLOPE": problem.score_mod and not call.score_mod.additive,
        "COVARIANCE_SLOPE": problem.has_probe and problem.covariance_mod and not call.covariance_mod.additive,
    }
    choices: list[Any] = []
    for candidate in found:
        error = _TEMPLATES[stage + _SPECIALIZED * candidate.specialized].maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            subgraphs=subgraphs,
            mutated_inputs=mutated,
            call_sizes=list(grid),
            BLOCK_M=candidate.block_m,
            BLOCK_N=candidate.block_n,
            num_warps=candidate.num_warps,
            num_stages=candidate.num_stages,
            USE_TMA=candidate.tma,
            HELD_TILES=candidate.held,
            **(
                specialized | {"OVERLAP": candidate.overlap, "STAGES": candidate.num_stages}
                if candidate.specialized
                else {}
            ),
            EVEN_M=even(problem.q_length, candidate.block_m, blocks.q_block),
            EVEN_N=even(problem.kv_length, candidate.block_n, blocks.kv_block),
            **common,
        )
        if error is not None:
            raise error
    for position in range(len(inputs), len(nodes), 2):
        generators[position] = inductor.create_num_blocks_fake_generator(nodes[position + 1])
        generators[position + 1] = inductor.create_indices_fake
    tensors = [node for node in (*nodes, *call.captured, *mutated) if isinstance(node, inductor.ir.IRNode)]
    out = inductor.autotune(f"parallax_{stage}", choices, distinct(tensors), layout, generators)
    # Inductor looks here for the symbols that a kernel's mods use.
    out.data.data.subgraph_inps = call.captured
    out.data.data.subgraph_outs = flat(subgraphs)
    return out


# --- stages ---------------------------------------------------------------------------------------------------------


def _core_forward(call: _Call, plan: Plan, layouts: list[Any]) -> tuple[Any, Any, Any, Any]:
    problem = plan.problem
    out_layout, mean_layout, lse_layout, probe_mean_layout = layouts
    lse, probe_mean, value_mean = map(allocate, (lse_layout, probe_mean_layout, mean_layout))
    if not problem.has_probe:
        zeros = inductor.lowerings[torch.ops.aten.full]
        probe_mean = zeros(probe_mean_layout.size, 0.0, dtype=probe_mean_layout.dtype, device=call.device)
    inputs = {"Q": call.query, "K": call.key, "V": call.value}
    inputs |= call.row_tiles
    if problem.has_probe:
        inputs |= {"PROBE_MEAN": probe_mean}
    inputs |= {"LSE": lse}
    if problem.saves_value_mean:
        inputs |= {"VALUE_MEAN": value_mean}
    written = [inputs[name] for name in ("PROBE_MEAN", "LSE", "VALUE_MEAN") if name in inputs]
    out = _instantiate(
        "core_forward",
        call,
        problem,
        inputs,
        out_layout,
        written,
        [call.score_mod.value, call.covariance_mod.value, call.mask],
        {"SAVE_VALUE_MEAN": problem.saves_value_mean},
        grid=(problem.batch, problem.q_heads, problem.q_length),
        sparse=("kv", "full_kv"),
    )
    return out, value_mean, lse, probe_mean


def _backward_inputs(call: _Call, statistics: dict[str, Any], problem: Problem) -> dict[str, Any]:
    inputs = {"Q": call.query, "K": call.key, "V": call.value}
    inputs |= call.row_tiles
    if problem.has_probe:
        inputs |= {"BETA": statistics["beta"]}
        if problem.intercept:
            inputs |= {"LEVEL": statistics["level"]}
    return inputs | {name.upper(): statistics[name] for name in ("grad_out", "lse2", "offset")}


def _kernel_row_terms(call: _Call, statistics: dict[str, Any]) -> dict[str, Any]:
    """The row terms in the form in which the kernels use them once for each score, so that they do nothing else with them.

    ``lse2``: the LSE in base 2, inf for a row without a key, whose weights are then 0; ``offset``: ``beta - tau`` with an
    intercept, else ``-tau``; ``level``: ``1 + t``. Inductor fuses them into the row sums that come before.
    """
    aten, do = torch.ops.aten, inductor.lowerings
    lse, tau, beta, probe_mean = (statistics[name] for name in ("lse", "tau", "beta", "probe_mean"))
    terms = {"lse2": do[aten.where](do[aten.eq](lse, -math.inf), math.inf, do[aten.mul](lse, LOG2E))}
    if call.probe is not None and call.intercept:
        return terms | {"offset": do[aten.sub](beta, tau), "level": do[aten.add](probe_mean, 1.0)}
    return terms | {"offset": do[aten.neg](tau)}


def _backward_subgraphs(call: _Call) -> list[Any]:
    score, covariance = call.score_mod, call.covariance_mod
    values = [score.value, covariance.value, call.mask]
    return [*values, score.grad, covariance.grad, score.captured_grads, covariance.captured_grads]


def _core_backward_query(call: _Call, plan: Plan, layouts: list[Any], statistics: dict[str, Any]) -> tuple[Any, Any]:
    problem = plan.problem
    assert problem.needs_grad is not None
    need_query, need_probe = problem.needs_grad[0], problem.needs_grad[3] and problem.has_probe
    inputs = _backward_inputs(call, statistics, problem)
    for name, operand in (("QUERY_SUM", "score_grad_sum"), ("PROBE_SUM", "probe_score_grad_sum")):
        if statistics[operand] is not None and problem.has_probe >= (name == "PROBE_SUM"):
            inputs |= {name: statistics[operand]}
    if need_query and need_probe:
        inputs |= {"DR": allocate(layouts[3])}
    primary = _instantiate(
        "core_backward_query",
        call,
        problem,
        inputs,
        layouts[0] if need_query else layouts[3],
        [inputs["DR"]] if "DR" in inputs else [],
        _backward_subgraphs(call),
        {
            "NEEDS_QUERY": need_query,
            "NEEDS_PROBE": need_probe,
            # A mod's derivative lies between the known sums and what is rounded: there the rounding alone is settled.
            "KNOWN_QUERY_SUM": not problem.score_mod or call.score_mod.additive,
            "KNOWN_PROBE_SUM": problem.intercept and (not problem.covariance_mod or call.covariance_mod.additive),
            "HAS_QUERY_SUM": "QUERY_SUM" in inputs,
            "HAS_PROBE_SUM": "PROBE_SUM" in inputs,
        },
        grid=(problem.batch, problem.q_heads, problem.q_length),
        sparse=("kv", "full_kv"),
    )
    return (primary, inputs.get("DR")) if need_query else (None, primary)


def _core_backward_key(call: _Call, plan: Plan, layouts: list[Any], statistics: dict[str, Any]) -> tuple[Any, Any]:
    problem = plan.problem
    assert problem.needs_grad is not None
    # The gradients of captured tensors come from the same score gradients as the key's.
    need_key = problem.needs_grad[1] or problem.captured_grads
    need_value = problem.needs_grad[2]
    inputs = _backward_inputs(call, statistics, problem)
    if need_key and need_value:
        inputs |= {"DV_OUT": allocate(layouts[2])}
    captured = [*call.score_mod.mutated, *call.covariance_mod.mutated]
    primary = _instantiate(
        "core_backward_key",
        call,
        problem,
        inputs,
        (layouts[1] or _dense_layout(call.key)) if need_key else layouts[2],
        ([inputs["DV_OUT"]] if "DV_OUT" in inputs else []) + captured,
        _backward_subgraphs(call),
        {
            "NEEDS_KEY": need_key,
            "NEEDS_VALUE": need_value,
            "SCORE_GRADS": bool(call.score_mod.mutated),
            "COVARIANCE_GRADS": problem.has_probe and bool(call.covariance_mod.mutated),
        },
        grid=(problem.batch, problem.kv_heads, problem.kv_length),
        sparse=("q", "full_q"),
    )
    return (primary, inputs.get("DV_OUT")) if need_key else (None, primary)


def _dense_layout(node: Any) -> Any:
    ir = inductor.ir
    strides = ir.FlexibleLayout.contiguous_strides(node.get_size())
    return ir.FixedLayout(node.get_device(), node.get_dtype(), node.get_size(), strides)


# --- lowerings ------------------------------------------------------------------------------------------------------


@inductor.register_lowering(attention_forward, type_promotion_kind=None)
def _lower_forward(*arguments: Any) -> Any:
    """Inductor's lowering of :data:`~.operator.attention_forward`."""
    query, key, value, probe, score, covariance, block_mask, scale, intercept, saves, options, *buffers = arguments
    device = query.get_device()
    if device.type == "cpu":
        return cpu.lower(cpu.forward, arguments)
    mods = (forward_mod(score, buffers[0], device), forward_mod(covariance, buffers[1], device))
    call = _call((query, key, value, probe), block_mask, mods, buffers[2], scale, intercept, options)
    # Whether a backward follows is all that the forward needs to know of the gradients.
    problem = _few_rows(call, call.problem((True,) * 4 if saves else None), options)
    if splits_keys(problem):
        given = {"Q": call.query, "K": call.key, "V": call.value, "R": probe}
        out, lse, probe_mean = inductor_decode.forward_of_core(
            given, call.block_mask, mods, buffers[2], scale, intercept, options
        )
        return out, allocate(node_layouts()[1]), lse, probe_mean
    return _core_forward(call, make_plan(problem), node_layouts())


def _few_rows(call: _Call, problem: Problem, options: dict[str, Any]) -> Problem:
    """The problem with what the choice to split its keys depends on."""

    def known(length: Any) -> Any:
        return int(length) if getattr(length, "is_number", False) else length

    counts: Any = call.block_mask.kv_num_blocks
    choice = split_choice(options)
    own_lists = False
    if counts is not None:
        one = inductor.V.graph.sizevars.statically_known_equals
        shared = problem.q_heads == problem.kv_heads or one(counts.get_size()[1], 1)
        own_lists = not (shared and one(counts.get_size()[2], 1))
    if choice is None and not inductor.V.graph.is_inference:
        choice = False
    lengths = {"q_length": known(problem.q_length), "kv_length": known(problem.kv_length)}
    return replace(problem, **lengths, split_keys=choice, own_lists=own_lists)


@inductor.register_lowering(attention_backward, type_promotion_kind=None)
def _lower_backward(*arguments: Any) -> Any:
    """Inductor's lowering of :data:`~.operator.attention_backward`."""
    query, key, value, probe, *statistics = arguments[:9]
    forward, joint, block_mask, scale, intercept, needs_grad, options, *buffers = arguments[9:19]
    device = query.get_device()
    if device.type == "cpu":
        return cpu.lower(cpu.backward, arguments)
    mods = tuple(backward_mod(*parts, device) for parts in zip(forward, joint, buffers[:2], strict=True))
    operands = (query, key, value, probe)
    call = _call(operands, block_mask, mods, buffers[2], scale, intercept, options, arguments[21])  # type: ignore[arg-type]
    plan = make_plan(call.problem(tuple(needs_grad)))
    names = ("grad_out", "lse", "probe_mean", "tau", "beta", "score_grad_sum", "probe_score_grad_sum")
    named = dict(zip(names, (*statistics, *arguments[19:21]), strict=True))
    named = {
        name: node if node is None or name == "grad_out" else inductor.to_dtype(node, torch.float32)
        for name, node in named.items()
    }
    named |= _kernel_row_terms(call, named)
    # The kernels index rows densely, and Inductor pads the strides of what it may.
    named = {
        name: node if node is None or name == "grad_out" else inductor.ir.ExternKernel.require_contiguous(node)
        for name, node in named.items()
    }
    named = dict(zip(named, realized(list(named.values())), strict=True))
    layouts = node_layouts()
    grads = dict.fromkeys(("query", "key", "value", "probe"))
    for stage in plan.direction("backward"):
        if stage.name == "core_backward_query":
            grads["query"], grads["probe"] = _core_backward_query(call, plan, layouts, named)
        elif stage.name == "core_backward_key":
            grads["key"], grads["value"] = _core_backward_key(call, plan, layouts, named)
    results = [
        grads[name] if needed else None
        for name, needed in zip(("query", "key", "value", "probe"), needs_grad, strict=True)
    ]
    return (*results, _captured_grads(call.score_mod), _captured_grads(call.covariance_mod))


@inductor.register_lowering(attention_solve, type_promotion_kind=None)
def _lower_solve(*arguments: Any) -> Any:
    """Inductor's lowering of :data:`~.solve.attention_solve`."""
    query, key, value, ridge, grad_out, probe, grad_mean, right, *rest = arguments
    score, block_mask, scale, intercept, solver, *buffers = rest
    if query.get_device().type == "cpu":
        return cpu.lower(cpu.solve, arguments)
    mod = forward_mod(score, buffers[0], query.get_device())
    mods = (mod, Mod(mod.value, [], True))
    operands = (query, key, key if value is None else value, None)
    call = _call(operands, block_mask, mods, buffers[1], scale, intercept, solver)
    plan = make_plan(call.problem(None))

    def dense(node: Any) -> Any:
        return inductor.ir.ExternKernel.require_contiguous(inductor.to_dtype(node, torch.float32))

    layout, out_layout, *row_layouts = node_layouts()
    makes_output = probe is None and value is not None
    rows = {"RIDGE": ridge, "RIGHT": right, "PROBE": probe, "GRAD_MEAN": grad_mean}
    given = {name: dense(node) for name, node in rows.items() if node is not None}
    given |= {} if grad_out is None else {"GRAD_OUT": grad_out}
    given = dict(zip(given, realized(list(given.values())), strict=True))
    row_terms = dict(zip(("FIRST", "SECOND", "ITERATIONS", "RESIDUAL"), map(allocate, row_layouts), strict=True))
    out = allocate(out_layout)
    inputs = {"Q": call.query, "K": call.key, "V": call.value, **given, **row_terms, "OUT": out}
    order = ("Q", "K", "V", "RIGHT", "RIDGE", "PROBE", "GRAD_OUT", "GRAD_MEAN", *row_terms, "OUT")
    absent = ([] if value is not None else ["V"]) + ([] if makes_output else ["OUT"])
    inputs = {name: inputs[name] for name in order if name in inputs and name not in absent}
    problem = plan.problem
    x = _instantiate(
        solve_method(problem.width, problem.kv_length, asked_direct(solver)).stage,
        call,
        plan.problem,
        inputs,
        layout,
        [*row_terms.values(), *([out] if makes_output else [])],
        [mod.value, mod.value, call.mask],
        {
            "ADJOINT": probe is not None,
            "HAS_VALUE": value is not None,
            "HAS_RIGHT": right is not None,
            "HAS_GRAD_MEAN": grad_mean is not None,
            # The reciprocal, because Inductor's description of a choice breaks at the minus of 1e-06.
            "INVERSE_TOLERANCE": round(1.0 / solver["tolerance"]),
            "MAX_ITERATIONS": solver["max_iterations"],
        },
        grid=(plan.problem.batch, plan.problem.q_heads, plan.problem.q_length),
        sparse=("kv", "full_kv"),
    )
    return x, out, *row_terms.values()


def _captured_grads(mod: Mod) -> tuple:
    """Gradients of a mod's captured tensors: summed in float32 by the kernel, cast to the tensors' dtypes."""
    return tuple(
        None if grad is None else inductor.to_dtype(grad, buffer.get_dtype())
        for grad, buffer in zip(mod.joint.captured_grads, mod.buffers, strict=True)
    )
