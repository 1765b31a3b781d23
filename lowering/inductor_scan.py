"""Inductor lowerings of the scan and its solver: four templates (GPU), or plain torch code inlined (CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import templates
from . import scan, scan_products, scan_solve
from .candidates import padded
from .inductor_shared import allocate, distinct, node_layouts, precision, shared_memory_limit
from .plan_scan import CHUNK, scan_segments
from .plan_stages import Direction, log_choice
from .scan_step import scan_step  # noqa: F401  (its lowering is here)
from .torch_compat_inductor import inductor
from .torch_compat_inlining import inline_in_lowering
from .tuned import ask, offered


@inductor.SymbolicGridFn
def _segments(batch: Any, heads: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (meta["PARTS"] * meta["SLICES"], batch, heads)


@inductor.SymbolicGridFn
def _rows(batch: Any, heads: Any, length: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
    return (cdiv(length, meta["BLOCK_M"]), batch, heads)


_TEMPLATES = {
    name: inductor.template(f"parallax_{name}", grid, templates.load(name))
    for name, grid in (
        ("scan_totals", _segments),
        ("scan_product", _segments),
        ("scan_states", _segments),
        ("scan_systems", _rows),
    )
}


def _operand(node: Any) -> Any:
    """A node that a kernel reads by its strides."""
    (node,) = inductor.maybe_realize([node])
    inductor.freeze_irnodes([node])
    return node


def _dense(node: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A node that a kernel indexes densely."""
    (node,) = inductor.maybe_realize([inductor.ir.ExternKernel.require_contiguous(inductor.to_dtype(node, dtype))])
    return node


def _instantiate(
    stage: str,
    operands: dict[str, Any],
    dense: dict[str, Any],
    written: dict[str, Any],
    layout: Any,
    switches: dict[str, Any],
    grid: tuple[Any, ...],
    length: Any,
    tf32: bool = False,
) -> Any:
    """One kernel. ``operands`` are read by their strides; ``dense`` and ``written`` (results but the first) may hold None."""
    device = operands["K"].get_device()
    guard = inductor.V.graph.sizevars.guard_int
    width = guard(operands["K"].get_size()[3])
    value_width = guard(operands["V"].get_size()[3]) if "V" in operands else width
    inputs = {name: _operand(node) for name, node in operands.items()}
    inputs |= {
        name: _dense(node, {"STARTS": torch.int32, "MATRIX": node.get_dtype()}.get(name, torch.float32))
        for name, node in dense.items()
        if node is not None
    }
    outputs = {name: allocate(given) for name, given in written.items() if given is not None}
    dot, exact = _products(stage, tf32, "WEIGHT" in inputs, {name: node.get_dtype() for name, node in operands.items()})
    constants = {"D": width, "DV": value_width, "PRECISION": exact, "HAS_STARTS": "STARTS" in inputs, **switches}
    dtype = operands["V" if "V" in operands else "K"].get_dtype()
    found = offered(
        ask(stage, device=device, dtype=dtype, constants=constants, lengths=(length, length)),
        width=width,
        value_width=value_width,
        itemsize=4 if dot == "tl.float32" else 2,
        crowded=stage == "scan_systems" and switches["INTERCEPT"] and torch.cuda.get_device_capability(device)[0] < 9,
        tf32=exact == "'tf32'",
        row_tiles=1,
        shared_memory_limit=shared_memory_limit(device),
        options=None,
    )
    if not inductor.config.max_autotune:
        found = found[:1]
    nodes = [*inputs.values(), *outputs.values()]
    choices: list[Any] = []
    for candidate in found:
        block_n = min(candidate.block_n, padded(value_width))
        error = _TEMPLATES[stage].maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            mutated_inputs=list(outputs.values()),
            call_sizes=list(grid),
            BLOCK_M=candidate.block_m,
            BLOCK_N=block_n,
            num_warps=candidate.num_warps,
            num_stages=candidate.num_stages,
            SLICES=-(-value_width // block_n),
            EVEN_M=bool(inductor.V.graph.sizevars.statically_known_multiple_of(length, candidate.block_m)),
            D=width,
            DV=value_width,
            D_PAD=padded(width),
            CHUNK=CHUNK,
            DOT=dot,
            PRECISION=exact,
            HAS_STARTS="STARTS" in inputs,
            USE_TMA=False,
            **switches,
        )
        if error is not None:
            raise error
    result = inductor.autotune(f"parallax_{stage}", choices, distinct(nodes), layout, {})
    return result, outputs


def _products(stage: str, tf32: bool, weighed: bool, dtypes: dict[str, torch.dtype]) -> tuple[str, str]:
    """Dtype and precision of a kernel's products; ``weighed``: of numbers that are first divided by a number of keys."""
    # X, if wider, comes in two terms, and the right sides of systems are not multiplied.
    found = {dtype for name, dtype in dtypes.items() if name not in ("X", "RIGHT")}
    if found == {torch.bfloat16}:
        return "tl.bfloat16", precision()
    if found == {torch.float16} and stage != "scan_product" and not weighed:
        return "tl.float16", precision()
    # float16 ends at 65504, which sums over a sequence pass, and a solution in float32 beside 16-bit operands must not be
    # rounded to theirs: both are multiplied as TF32, which has the bits of float16.
    mixed = any(dtype.itemsize == 2 for dtype in dtypes.values())
    return "tl.float32", "'tf32'" if tf32 or mixed else precision()


@inductor.register_lowering(torch.ops.parallax.scan_totals.default, type_promotion_kind=None)
def _lower_totals(
    key: Any,
    value: Any,
    key_level: Any,
    value_level: Any,
    weight: Any,
    starts: Any,
    heads: int,
    segments: int,
    last: bool,
    backward: bool,
    tf32: bool = False,
) -> Any:
    """Inductor's lowering of :data:`~.scan_products.scan_totals`."""
    layout, first, second = node_layouts()
    guard = inductor.V.graph.sizevars.guard_int
    batch, key_heads, length, _ = key.get_size()
    parts = segments - int(not last)
    matrix, outputs = _instantiate(
        "scan_totals",
        {"K": key, "V": value},
        {"KEY_LEVEL": key_level, "VALUE_LEVEL": value_level, "WEIGHT": weight, "STARTS": starts},
        {"FIRST": first, "SECOND": second},
        layout,
        {
            "GROUP": guard(key_heads) // heads,
            "SEGMENTS": segments,
            "PARTS": parts,
            "BACKWARD": backward,
            "TRANSPOSED": False,
            "HAS_WEIGHT": weight is not None,
            "HAS_KEY_LEVEL": key_level is not None,
            "HAS_VALUE_LEVEL": value_level is not None,
            "HAS_FIRST": not backward or key_level is not None,
            "HAS_SECOND": not backward or value_level is not None,
        },
        (batch, heads),
        length,
        tf32,
    )
    return matrix, outputs["FIRST"], outputs["SECOND"]


@inductor.register_lowering(torch.ops.parallax.scan_product.default, type_promotion_kind=None)
def _lower_product(x: Any, key: Any, value: Any, inverse: Any, starts: Any, level: Any, *rest: Any) -> Any:
    """Inductor's lowering of :data:`~.scan_products.scan_product`."""
    direction: Direction = "backward" if inductor.V.graph.is_backward else "forward"
    log_choice(
        "scan_product", direction, "chunked scan", f"{rest[6]}: the sums run along the sequence: linear in the length"
    )
    sums, initial = rest[:3], rest[3:6]
    role, intercept, moment, save_state, whole, _ = rest[6:]
    backward, transposed = scan_products.ROLES[role].backward, scan_products.ROLES[role].transposed
    guard = inductor.V.graph.sizevars.guard_int
    layout, found_layout, *state_layouts = node_layouts()
    batch, heads, length, _ = x.get_size()
    x_heads, key_heads = guard(heads), guard(key.get_size()[1])
    total_segments = 0 if sums[0] is None else guard(sums[0].get_size()[2])
    segments = total_segments + 1
    if whole:
        segments = scan_segments(_size(batch), x_heads, _size(length), guard(value.get_size()[3]))
    has_moment = scan_products.has_moment(role, intercept, moment)
    solution = role == "out" and x.get_dtype().itemsize > value.get_dtype().itemsize
    gradient = role == "probe" and layout.dtype.itemsize > key.get_dtype().itemsize
    # K's sum and V's are the other way round where the sums lie transposed.
    order = (0, 2, 1) if transposed else (0, 1, 2)

    def named(prefix: str, values: Any) -> dict[str, Any]:
        suffixes = ("", "_FIRST", "_SECOND")
        return {prefix + suffix: values[i] for suffix, i in zip(suffixes, order, strict=True)}

    y, outputs = _instantiate(
        "scan_product",
        {"X": x, "K": key, "V": value},
        {
            "WEIGHT" if backward else "INVERSE": inverse,
            "STARTS": starts,
            "LEVEL": level,
            **named("TOTAL", sums),
            **named("INITIAL", initial),
        },
        {
            "MOMENT": found_layout if has_moment else None,
            **named("FINAL", state_layouts if save_state else (None,) * 3),
        },
        layout,
        {
            "GQA": 1 if backward else x_heads // key_heads,
            "GROUP": key_heads // x_heads if backward else 1,
            "SEGMENTS": segments,
            "PARTS": segments,
            "TOTAL_SEGMENTS": total_segments,
            "BACKWARD": backward,
            "TRANSPOSED": transposed,
            "WHOLE": whole,
            "INTERCEPT": intercept,
            # A solution in float32 beside 16-bit values: it and the state in two terms; the gradient of one: state and weights.
            "X_SPLIT": solution,
            "STATE_SPLIT": solution or gradient,
            "HAS_WEIGHT": backward and inverse is not None,
            "HAS_LEVEL": level is not None,
            "HAS_TOTALS": sums[0] is not None,
            "HAS_INITIAL": initial[0] is not None,
            "HAS_MOMENT": has_moment,
            "SAVE_STATE": save_state,
            "HAS_KEY_LEVEL": False,
            "HAS_VALUE_LEVEL": backward and level is not None,
            "HAS_FIRST": not backward and (has_moment or save_state),
            "HAS_SECOND": level is not None or (not backward and (intercept or save_state)),
        },
        (batch, heads),
        length,
    )
    names = ("MOMENT", "FINAL", *(("FINAL_SECOND", "FINAL_FIRST") if transposed else ("FINAL_FIRST", "FINAL_SECOND")))
    layouts = (found_layout, *state_layouts)
    return (y, *(outputs.get(name) or allocate(empty) for name, empty in zip(names, layouts, strict=True)))


@inductor.SymbolicGridFn
def _heads(batch: Any, heads: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (batch, heads, 1)


_STEP = inductor.template("parallax_scan_step", _heads, templates.load("scan_step"))


@inductor.register_lowering(torch.ops.parallax.scan_step.default, type_promotion_kind=None)
def _lower_step(
    matrix: Any, first: Any, second: Any, count: Any, key: Any, value: Any, probe: Any, intercept: bool, salt: str
) -> Any:
    """Inductor's lowering of :data:`~.scan_step.scan_step`."""
    if key.get_device().type == "cpu":
        step = torch.ops.parallax.scan_step.default
        arguments = (matrix, first, second, count, key, value, probe, intercept, salt)
        return inductor.fallback_handler(step, add_to_fallback_set=False)(*arguments)
    guard = inductor.V.graph.sizevars.guard_int
    (layout,) = node_layouts([inductor.V.graph.current_node.meta["val"]])
    batch, heads, length, width = key.get_size()
    length, width, value_width = guard(length), guard(width), guard(value.get_size()[3])
    group = guard(probe.get_size()[1]) // guard(heads)
    sums = [_operand(node) for node in (matrix, first, second)]
    nodes = [*(_operand(node) for node in (key, value, probe, count)), *sums]
    choices: list[Any] = []
    error = _STEP.maybe_append_choice(
        choices,
        input_nodes=nodes,
        layout=layout,
        mutated_inputs=sums,
        call_sizes=[batch, heads],
        # The whole state in registers: 64 numbers a thread.
        num_warps=max(1, min(16, padded(width) * padded(value_width) // 2048)),
        num_stages=1,
        ROWS=1 << (length * group - 1).bit_length(),
        LENGTH=length,
        GQA=group,
        D=width,
        DV=value_width,
        D_PAD=padded(width),
        DV_PAD=padded(value_width),
        INTERCEPT=intercept,
    )
    if error is not None:
        raise error
    return inductor.autotune("parallax_scan_step", choices, distinct(nodes), layout, {})


def _size(size: Any) -> Any:
    return int(size) if getattr(size, "is_number", isinstance(size, int)) else size


@inductor.register_lowering(torch.ops.parallax.scan_states.default, type_promotion_kind=None)
def _lower_states(
    key: Any, starts: Any, total: Any, total_first: Any, initial: Any, initial_first: Any, dtype: torch.dtype
) -> Any:
    """Inductor's lowering of :data:`~.scan_solve.scan_states`."""
    layout, units, first = node_layouts()
    batch, heads, length, _ = key.get_size()
    total_segments = 0 if total is None else inductor.V.graph.sizevars.guard_int(total.get_size()[2])
    matrix, outputs = _instantiate(
        "scan_states",
        {"K": key},
        {
            "STARTS": starts,
            "TOTAL": total,
            "TOTAL_FIRST": total_first,
            "INITIAL": initial,
            "INITIAL_FIRST": initial_first,
        },
        {"UNITS": units, "FIRST": first},
        layout,
        {
            "SEGMENTS": total_segments + 1,
            "PARTS": total_segments + 1,
            "TOTAL_SEGMENTS": total_segments,
            "BACKWARD": False,
            "TRANSPOSED": False,
            "WHOLE": False,
            "HAS_TOTALS": total is not None,
            "HAS_INITIAL": initial is not None,
            "HAS_KEY_LEVEL": False,
            "HAS_VALUE_LEVEL": False,
            "HAS_FIRST": True,
            "HAS_SECOND": False,
            "INVERSE_LEAST_SQUARE": round(1.0 / scan_solve.LEAST_SQUARE),
        },
        (batch, heads),
        length,
    )
    return matrix, outputs["UNITS"], outputs["FIRST"]


@inductor.register_lowering(torch.ops.parallax.scan_systems.default, type_promotion_kind=None)
def _lower_systems(
    right: Any,
    key: Any,
    ridge: Any,
    inverse: Any,
    starts: Any,
    center: Any,
    matrix: Any,
    units: Any,
    first: Any,
    own: bool,
    intercept: bool,
    whole: bool,
    tolerance: float,
    max_iterations: int,
) -> Any:
    """Inductor's lowering of :data:`~.scan_solve.scan_systems`."""
    layout, along, iterations, residual = node_layouts()
    guard = inductor.V.graph.sizevars.guard_int
    batch, heads, length, _ = right.get_size()
    x, outputs = _instantiate(
        "scan_systems",
        {"RIGHT": right, "K": key},
        {
            "RIDGE": ridge,
            "INVERSE": inverse,
            "STARTS": starts,
            "CENTER": center,
            "MATRIX": matrix,
            "UNITS": units,
            "FIRST": first if intercept else None,
        },
        {"ALONG": along if intercept else None, "ITERATIONS": iterations, "RESIDUAL": residual},
        layout,
        {
            "GQA": guard(heads) // guard(key.get_size()[1]),
            "OWN": own,
            "INTERCEPT": intercept,
            "WHOLE": whole,
            "HAS_CENTER": center is not None,
            # The reciprocal, because Inductor's description of a choice breaks at the minus of 1e-06.
            "INVERSE_TOLERANCE": round(1.0 / tolerance),
            "MAX_ITERATIONS": max_iterations,
        },
        (batch, heads, length),
        length,
    )
    return x, outputs.get("ALONG") or allocate(along), outputs["ITERATIONS"], outputs["RESIDUAL"]


_SCAN_KERNELS = scan.Kernels(
    torch.ops.parallax.scan_totals, torch.ops.parallax.scan_product, lambda *sizes: scan_segments(*sizes)
)
_SOLVE_KERNELS = scan_solve.Kernels(
    _SCAN_KERNELS,
    torch.ops.parallax.scan_states,
    torch.ops.parallax.scan_systems,
    # float16 has three bits more than bfloat16, and the sums have units of their own.
    lambda dtype: torch.float16 if dtype.itemsize == 2 else torch.float32,
)


def _lowered(plain: Any, kernels: Any, direction: str) -> Callable[..., Any]:
    """The lowering of an operator that is made of the kernels'."""

    def lower(*arguments: Any) -> Any:
        tensor = next(argument for argument in arguments if isinstance(argument, inductor.ir.IRNode))
        chosen = plain if tensor.get_device().type == "cpu" else kernels
        return inline_in_lowering(getattr(chosen, direction), arguments)

    return lower


for _op, _plain, _kernels, _direction in (
    (torch.ops.parallax.scan, scan.PLAIN, _SCAN_KERNELS, "forward"),
    (torch.ops.parallax.scan_backward, scan.PLAIN, _SCAN_KERNELS, "backward"),
    (torch.ops.parallax.scan_solve, scan_solve.PLAIN, _SOLVE_KERNELS, "forward"),
    (torch.ops.parallax.scan_solve_backward, scan_solve.PLAIN, _SOLVE_KERNELS, "backward"),
):
    inductor.register_lowering(_op.default, type_promotion_kind=None)(_lowered(_plain, _kernels, _direction))
