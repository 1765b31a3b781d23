"""Inductor lowerings of the scan: two templates (GPU), or plain torch code inlined (CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import templates
from . import scan, scan_products
from .candidates import padded
from .inductor import allocate, distinct, node_layouts, precision, shared_memory_limit
from .plan import CHUNK, scan_segments
from .torch_compat import inductor, inline_in_lowering
from .tuned import ask, offered


@inductor.SymbolicGridFn
def _segments(batch: Any, heads: Any, meta: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (meta["SEGMENTS"] * meta["SLICES"], batch, heads)


_TEMPLATES = {
    name: inductor.template(f"parallax_{name}", _segments, templates.load(name))
    for name in ("scan_totals", "scan_product")
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
    grid: tuple[Any, Any],
    length: Any,
) -> Any:
    """One kernel. Operands are ``X``, ``K``, ``V``; ``dense`` and ``written`` (results beside the first) may hold None."""
    device = operands["K"].get_device()
    guard = inductor.V.graph.sizevars.guard_int
    width, value_width = guard(operands["K"].get_size()[3]), guard(operands["V"].get_size()[3])
    inputs = {name: _operand(node) for name, node in operands.items()}
    inputs |= {
        name: _dense(node, torch.int32 if name == "STARTS" else torch.float32)
        for name, node in dense.items()
        if node is not None
    }
    outputs = {name: allocate(given) for name, given in written.items() if given is not None}
    dtypes = {node.get_dtype() for node in operands.values()}
    low = torch.bfloat16 in dtypes
    # float16 ends at 65504, which sums over a sequence pass: its numbers are multiplied as TF32, which has as many bits.
    exact = "'tf32'" if torch.float16 in dtypes else precision()
    constants = {"D": width, "DV": value_width, "PRECISION": exact, "HAS_STARTS": "STARTS" in inputs, **switches}
    found = offered(
        ask(stage, device=device, dtype=operands["V"].get_dtype(), constants=constants, lengths=(length, length)),
        width=width,
        value_width=value_width,
        itemsize=2 if low else 4,
        has_probe=True,
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
            DOT="tl.bfloat16" if low else "tl.float32",
            PRECISION=exact,
            HAS_STARTS="STARTS" in inputs,
            USE_TMA=False,
            **switches,
        )
        if error is not None:
            raise error
    result = inductor.autotune(f"parallax_{stage}", choices, distinct(nodes), layout, {})
    return result, outputs


@inductor.register_lowering(torch.ops.parallax.scan_totals.default, type_promotion_kind=None)
def _lower_totals(
    key: Any, value: Any, key_level: Any, value_level: Any, starts: Any, heads: int, segments: int, backward: bool
) -> Any:
    """Inductor's lowering of :data:`~.scan_products.scan_totals`."""
    layout, first, second = node_layouts()
    guard = inductor.V.graph.sizevars.guard_int
    batch, key_heads, length, _ = key.get_size()
    matrix, outputs = _instantiate(
        "scan_totals",
        {"K": key, "V": value},
        {"KEY_LEVEL": key_level, "VALUE_LEVEL": value_level, "STARTS": starts},
        {"FIRST": first, "SECOND": second},
        layout,
        {
            "GROUP": guard(key_heads) // heads,
            "SEGMENTS": segments,
            "BACKWARD": backward,
            "TRANSPOSED": False,
            "HAS_KEY_LEVEL": key_level is not None,
            "HAS_VALUE_LEVEL": value_level is not None,
            "HAS_FIRST": not backward or key_level is not None,
            "HAS_SECOND": not backward or value_level is not None,
        },
        (batch, heads),
        length,
    )
    return matrix, outputs["FIRST"], outputs["SECOND"]


@inductor.register_lowering(torch.ops.parallax.scan_product.default, type_promotion_kind=None)
def _lower_product(x: Any, key: Any, value: Any, inverse: Any, starts: Any, level: Any, *rest: Any) -> Any:
    """Inductor's lowering of :data:`~.scan_products.scan_product`."""
    sums, initial = rest[:3], rest[3:6]
    role, intercept, moment, save_state, whole, _ = rest[6:]
    backward, transposed = scan_products.ROLES[role].backward, scan_products.ROLES[role].transposed
    guard = inductor.V.graph.sizevars.guard_int
    layout, found_layout, *state_layouts = node_layouts()
    batch, heads, length, _ = x.get_size()
    x_heads, key_heads = guard(heads), guard(key.get_size()[1])
    total_segments = 1 if sums[0] is None else guard(sums[0].get_size()[2])
    has_moment = scan_products.has_moment(role, intercept, moment)
    # K's sum and V's are the other way round where the sums lie transposed.
    order = (0, 2, 1) if transposed else (0, 1, 2)

    def named(prefix: str, values: Any) -> dict[str, Any]:
        suffixes = ("", "_FIRST", "_SECOND")
        return {prefix + suffix: values[i] for suffix, i in zip(suffixes, order, strict=True)}

    y, outputs = _instantiate(
        "scan_product",
        {"X": x, "K": key, "V": value},
        {
            "INVERSE": None if backward else inverse,
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
            "SEGMENTS": scan_segments(_size(batch), x_heads, _size(length)) if whole else total_segments,
            "TOTAL_SEGMENTS": total_segments,
            "BACKWARD": backward,
            "TRANSPOSED": transposed,
            "WHOLE": whole,
            "INTERCEPT": intercept,
            "SCALED": role == "out",
            "X_SPLIT": x.get_dtype() == torch.float32 and torch.bfloat16 in (key.get_dtype(), value.get_dtype()),
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


def _size(size: Any) -> Any:
    return int(size) if getattr(size, "is_number", isinstance(size, int)) else size


_KERNELS = scan.Kernels(torch.ops.parallax.scan_totals, torch.ops.parallax.scan_product, scan_segments)


def _lowered(direction: str) -> Callable[..., Any]:
    """The lowering of an operator that is made of the kernels' two."""

    def lower(*arguments: Any) -> Any:
        tensor = next(argument for argument in arguments if isinstance(argument, inductor.ir.IRNode))
        kernels = scan.PLAIN if tensor.get_device().type == "cpu" else _KERNELS
        return inline_in_lowering(getattr(kernels, direction), arguments)

    return lower


inductor.register_lowering(torch.ops.parallax.scan.default, type_promotion_kind=None)(_lowered("forward"))
inductor.register_lowering(torch.ops.parallax.scan_backward.default, type_promotion_kind=None)(_lowered("backward"))
