"""The state of a member of infinite bandwidth: which of its parts there are, their shapes, and the checks of a given one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .errors import InputError, InputTypeError
from .lowering.scan import State
from .lowering.torch_compat_errors import raise_input
from .spec import AttentionSpec


def part_shapes(
    spec: AttentionSpec, batch: Any, kv_heads: Any, width: Any, value_width: Any
) -> dict[str, tuple[Any, ...]]:
    """Name of a part -> its shape, of the parts that the member's state has."""
    shapes: dict[str, tuple[Any, ...]] = {"count": (batch,), "value_sum": (batch, kv_heads, value_width)}
    if spec.probe.kind != "zero":
        shapes["key_sum"] = (batch, kv_heads, width)
        shapes["key_value"] = (batch, kv_heads, width, value_width)
    if spec.probe.kind in ("solved", "gradient"):
        shapes["key_key"] = (batch, kv_heads, width, width)
    return shapes


def check_parts(name: str, state: Any, spec: AttentionSpec, key: Tensor, value: Tensor) -> None:
    """``state``, an argument of that ``name``, has the member's parts, in their shapes, on the keys' device."""
    if not isinstance(state, State):
        raise_input(InputTypeError, f"{name} must be a plx.State, but got {type(state).__name__}.")
    shapes = part_shapes(spec, key.size(0), key.size(1), key.size(3), value.size(3))
    for part_name, shape in shapes.items():
        part = getattr(state, part_name)
        if not isinstance(part, Tensor):
            raise_input(
                InputError,
                f"{name}.{part_name} must be a tensor {shape} for this spec, but got {type(part).__name__}.",
            )
        if tuple(part.shape) != shape:
            raise_input(InputError, f"{name}.{part_name} must have shape {shape}, but got {tuple(part.shape)}.")
        if part.device != key.device:
            raise_input(
                InputError, f"{name}.{part_name} must be on query's device {key.device}, but got {part.device}."
            )
