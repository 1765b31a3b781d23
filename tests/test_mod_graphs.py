"""What a traced mod says about itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallax_compile.lowering.mod_graphs import fold_factors, is_affine
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import parallax_compile as plx

_SLOPES, _BY_KEY = torch.linspace(0.1, 1.0, 4), torch.linspace(-1.0, 1.0, 64)
_INDEX = torch.ops.aten.index.Tensor


def traced(function: Callable[..., Tensor], *more: Any) -> torch.fx.GraphModule:
    indices = [torch.zeros((), dtype=torch.int32) for _ in range(4)]
    return make_fx(function, tracing_mode="fake")(torch.zeros(()), *indices, *more)


@pytest.mark.parametrize(
    "mod, captured, affine",
    [
        (plx.mods.alibi(4), None, True),
        (lambda s, b, h, q, k, c: s - _INDEX(c, [h]) * (q - k) * 0.1, _SLOPES, True),
        (lambda s, b, h, q, k: (q * 0.5 + s) - k / 8, None, True),
        (lambda s, b, h, q, k: s + b, None, True),
        (lambda s, b, h, q, k: 2.0 * s + q, None, False),
        (lambda s, b, h, q, k: q - s, None, False),
        (lambda s, b, h, q, k: s + s, None, False),
        (lambda s, b, h, q, k: s + q * k, None, False),
        (lambda s, b, h, q, k: s + q * q, None, False),
        (lambda s, b, h, q, k: s + torch.exp2(q * 0.1), None, False),
        (lambda s, b, h, q, k: s + torch.abs(q - k), None, False),
        (lambda s, b, h, q, k, c: s + _INDEX(c, [k]), _BY_KEY, False),  # may hold infinities
        (lambda s, b, h, q, k: s + 1.0 / (q + 1), None, False),
        (lambda s, b, h, q, k: q - k * 0.5, None, False),
    ],
)
def test_affine_mods(mod: Any, captured: Tensor | None, affine: bool) -> None:
    assert is_affine(traced(mod, *([] if captured is None else [captured]))) == affine


def test_factors_of_a_product_are_folded() -> None:
    def slope(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (s * 20.0) * (1.0 - s * s) * 0.05, (s * 3.0) * 2.0, s * 4.0, (h * 3) * 2

    graph = traced(slope)
    x, h = torch.tensor(0.3), torch.tensor(5, dtype=torch.int32)
    before = graph(x, h, h, h, h)
    fold_factors(graph)
    assert all(torch.allclose(*pair) for pair in zip(before, graph(x, h, h, h, h), strict=True))
    factors = [
        argument
        for node in graph.graph.nodes
        if node.target is torch.ops.aten.mul.Tensor
        for argument in node.args
        if not isinstance(argument, torch.fx.Node)
    ]
    assert sorted(factors) == [2, 3, 4.0, 6.0]  # 20 and 0.05 are gone; whole numbers stay as they are
