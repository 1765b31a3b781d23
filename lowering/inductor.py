"""Inductor lowerings of the operator: a plan's stages as instances of our templates (GPU) or inlined code (CPU)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from . import cpu, elementwise, inductor_decode  # noqa: F401  (elementwise registers its lowerings)
from .inductor_call import Call, call_of
from .inductor_kernels import instantiate
from .inductor_shared import LOG2E, Mod, allocate, backward_mod, forward_mod, node_layouts, realized
from .operator import attention_backward, attention_forward
from .plan import make_plan
from .plan_solve import asked_direct, solve_method
from .plan_split import split_choice, splits_keys
from .plan_stages import Plan, Problem
from .solve import attention_solve
from .torch_compat_inductor import inductor

# --- stages ---------------------------------------------------------------------------------------------------------


def _core_forward(call: Call, plan: Plan, layouts: list[Any]) -> tuple[Any, Any, Any, Any]:
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
    out = instantiate(
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


def _backward_inputs(call: Call, statistics: dict[str, Any], problem: Problem) -> dict[str, Any]:
    inputs = {"Q": call.query, "K": call.key, "V": call.value}
    inputs |= call.row_tiles
    if problem.has_probe:
        inputs |= {"BETA": statistics["beta"]}
        if problem.intercept:
            inputs |= {"LEVEL": statistics["level"]}
    return inputs | {name.upper(): statistics[name] for name in ("grad_out", "lse2", "offset")}


def _kernel_row_terms(call: Call, statistics: dict[str, Any]) -> dict[str, Any]:
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


def _backward_subgraphs(call: Call) -> list[Any]:
    score, covariance = call.score_mod, call.covariance_mod
    values = [score.value, covariance.value, call.mask]
    return [*values, score.grad, covariance.grad, score.captured_grads, covariance.captured_grads]


def _core_backward_query(call: Call, plan: Plan, layouts: list[Any], statistics: dict[str, Any]) -> tuple[Any, Any]:
    problem = plan.problem
    assert problem.needs_grad is not None
    need_query, need_probe = problem.needs_grad[0], problem.needs_grad[3] and problem.has_probe
    inputs = _backward_inputs(call, statistics, problem)
    for name, operand in (("QUERY_SUM", "score_grad_sum"), ("PROBE_SUM", "probe_score_grad_sum")):
        if statistics[operand] is not None and problem.has_probe >= (name == "PROBE_SUM"):
            inputs |= {name: statistics[operand]}
    if need_query and need_probe:
        inputs |= {"DR": allocate(layouts[3])}
    primary = instantiate(
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


def _core_backward_key(call: Call, plan: Plan, layouts: list[Any], statistics: dict[str, Any]) -> tuple[Any, Any]:
    problem = plan.problem
    assert problem.needs_grad is not None
    # The gradients of captured tensors come from the same score gradients as the key's.
    need_key = problem.needs_grad[1] or problem.captured_grads
    need_value = problem.needs_grad[2]
    inputs = _backward_inputs(call, statistics, problem)
    if need_key and need_value:
        inputs |= {"DV_OUT": allocate(layouts[2])}
    captured = [*call.score_mod.mutated, *call.covariance_mod.mutated]
    primary = instantiate(
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
    call = call_of((query, key, value, probe), block_mask, mods, buffers[2], scale, intercept, options)
    # Whether a backward follows is all that the forward needs to know of the gradients.
    problem = _few_rows(call, call.problem((True,) * 4 if saves else None), options)
    if splits_keys(problem):
        given = {"Q": call.query, "K": call.key, "V": call.value, "R": probe}
        out, lse, probe_mean = inductor_decode.forward_of_core(
            given, call.block_mask, mods, buffers[2], scale, intercept, options
        )
        return out, allocate(node_layouts()[1]), lse, probe_mean
    return _core_forward(call, make_plan(problem), node_layouts())


def _few_rows(call: Call, problem: Problem, options: dict[str, Any]) -> Problem:
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
    call = call_of(operands, block_mask, mods, buffers[2], scale, intercept, options, arguments[21])  # type: ignore[arg-type]
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
    call = call_of(operands, block_mask, mods, buffers[1], scale, intercept, solver)
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
    x = instantiate(
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
