"""The call as one operator that stays whole, for compilers downstream that bring a kernel of their own.

``parallax_compile::attention(query, key, value, probe, spec, scale)`` and its ``attention_backward``: the spec travels as its
canonical JSON, so that whoever lowers the operator needs nothing else. Outside of MLIR the operator runs the reference.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...spec import AttentionSpec
from .programs import Declared, dense

__all__ = ["CALLEE", "NAMES", "as_custom_calls", "attention", "register"]

NAMES = ("parallax_compile.attention", "parallax_compile.attention_backward")
CALLEE = "@parallax_compile_attention"
"""How the names of the functions begin that stand for the operators where torch's dialect ends."""


def attention(call: Declared, *, own_mods: bool) -> Tensor:
    """``out [B, Hq, Lq, Dv]`` by the opaque operator.

    Args:
        call: the call; its mods must be the spec's.
        own_mods: whether the call adds mods or masks to the spec's.

    Raises:
        UnsupportedError: the call is not told by its spec alone, or the spec has no JSON.
    """
    if own_mods or call.ridge is not None:
        raise UnsupportedError(
            "an opaque attention carries its spec and nothing else, but the call has mods, a block_mask or a ridge of its "
            "own. Put them into the spec, or decompose it (opaque=False)."
        )
    try:
        text = call.spec.to_json()
    except ValueError as error:
        raise UnsupportedError(f"an opaque attention carries its spec as JSON: {error}") from None
    return register()(call.query, call.key, call.value, call.probe, text, call.scale)


def _declared(
    query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, spec: str, scale: float | None
) -> Declared:
    parsed = AttentionSpec.from_json(spec)
    mods = (parsed.score_mod, parsed.covariance_mod, parsed.mask_mod)
    return Declared(query, key, value, probe, parsed, *mods, scale, None)


@functools.cache
def register() -> Any:
    """The operator, registered with torch at the first call."""

    @torch.library.custom_op("parallax_compile::attention", mutates_args=())
    def forward(
        query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, spec: str, scale: float | None
    ) -> Tensor:
        return dense(_declared(query, key, value, probe, spec, scale)).out

    @forward.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, spec: str, scale: float | None) -> Tensor:
        return query.new_empty((*query.shape[:3], value.size(3)))

    @torch.library.custom_op("parallax_compile::attention_backward", mutates_args=())
    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, spec: str, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = (query, key, value) if probe is None else (query, key, value, probe)

        def run(*tensors: Tensor) -> Tensor:
            query, key, value, *learned = tensors
            return dense(_declared(query, key, value, learned[0] if learned else None, spec, scale)).out

        grads = torch.func.vjp(run, *tensors)[1](grad)
        return (*grads[:3], grads[3] if probe is not None else query.new_empty(0))

    @backward.register_fake
    def _(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, probe: Tensor | None, spec: str, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        last = query.new_empty(0) if probe is None else torch.empty_like(probe)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), last

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.spec, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        probe = ctx.saved_tensors[3]
        grads = backward(grad.contiguous(), *ctx.saved_tensors, ctx.spec, ctx.scale)
        return (*grads[:3], None if probe is None else grads[3], None, None)

    forward.register_autograd(differentiate, setup_context=save)
    return forward


def as_custom_calls(text: str) -> str:
    """The module with its calls of opaque functions as ``stablehlo.custom_call``, spec and scale as JSON in the call itself."""
    declaration = re.compile(rf"^ *func\.func private ({CALLEE}\w*)\(.*attributes \{{(.*)\}}\n", re.MULTILINE)
    for found in list(declaration.finditer(text)):
        callee, attributes = found.groups()
        told = [
            ("spec", r'parallax_compile\.spec = "((?:[^"\\]|\\.)*)"'),
            ("scale", r"parallax_compile\.scale = ([-+.\w]+) :"),
        ]
        matches = [(name, re.search(pattern, attributes)) for name, pattern in told]
        config = ", ".join(f"\\22{name}\\22: {match[1]}" for name, match in matches if match is not None)
        target = re.sub(r"_\d+$", "", callee).replace("parallax_compile_", "parallax_compile.")
        call = re.compile(rf"\bcall {callee}(\([^)]*\)) :")
        text = call.sub(
            lambda m, target=target, config=config: (  # type: ignore[misc]
                f'stablehlo.custom_call {target}{m[1]} {{backend_config = "{{{config}}}"}} :'
            ),
            text,
        )
    return declaration.sub("", text)
