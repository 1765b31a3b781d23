"""``replace_sdpa``: the calls of a model computed by another member, with everything they asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.oracle import relative_error
from torch import Tensor, nn

import parallax_compile as plx
from parallax_compile.errors import InputError, InputTypeError, UnsupportedError


def inputs(rows: int = 12, columns: int = 17, heads: int = 4, kv_heads: int = 4) -> list[Tensor]:
    shapes = ((heads, rows), (kv_heads, columns), (kv_heads, columns))
    return [torch.randn(2, h, length, 8, dtype=torch.float64, requires_grad=True) for h, length in shapes]


BOOL = torch.rand(12, 17, generator=torch.Generator().manual_seed(0)) > 0.3
CALLS: dict[str, dict[str, Any]] = {
    "causal, other lengths": {"is_causal": True, "scale": 0.2},
    "bool mask": {"attn_mask": BOOL},
    "float mask": {"attn_mask": torch.randn(2, 1, 12, 17, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", CALLS)
def test_softmax_in_its_own_place_changes_nothing(name: str) -> None:
    tensors, options = inputs(), CALLS[name]
    call = lambda *x: F.scaled_dot_product_attention(*x, **options)
    want = call(*tensors)
    got = plx.parallax_compile(call, fullgraph=True, replace_sdpa=plx.SOFTMAX)(*tensors)
    assert relative_error(got, want) < 1e-12
    weights = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, tensors, weights), torch.autograd.grad(want, tensors, weights), strict=True
    ):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("name", CALLS)
def test_local_linear_attention_in_its_place(name: str) -> None:
    tensors, options = inputs(kv_heads=2), CALLS[name]
    call = lambda *x: F.scaled_dot_product_attention(*x, **options, enable_gqa=True)
    got = plx.parallax_compile(call, fullgraph=True, replace_sdpa=plx.LLA)(*tensors)
    keep = options.get("attn_mask", torch.ones(12, 17, dtype=torch.bool).tril())
    bias = torch.where(keep, 0.0, -float("inf")) if keep.dtype == torch.bool else keep
    want = plx.attention(
        *tensors, spec=plx.LLA, enable_gqa=True, scale=options.get("scale"), score_mod=_added(bias.expand(2, 4, 12, 17))
    )
    assert relative_error(got, want) < 1e-10


def _added(bias: Tensor) -> Any:
    return lambda s, b, h, i, j: s + bias[b, h, i, j]


def test_a_bool_mask_at_infinite_bandwidth() -> None:
    tensors = inputs()
    call = lambda *x: F.scaled_dot_product_attention(*x, attn_mask=BOOL)
    got = plx.parallax_compile(call, replace_sdpa=plx.VALUE_AVERAGE)(*tensors)
    weights = BOOL.double() / BOOL.sum(-1, keepdim=True)
    assert relative_error(got, weights @ tensors[2]) < 1e-12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_module_keeps_its_weights_and_its_own_forward() -> None:
    layer = Attention()
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    plain = layer(x)
    softmax = plx.parallax_compile(layer, replace_sdpa=plx.SOFTMAX)
    linear = plx.parallax_compile(layer, replace_sdpa=plx.LLA)
    assert list(linear.state_dict()) == list(layer.state_dict())
    assert relative_error(softmax(x), plain) < 1e-12
    assert relative_error(linear(x), plain) > 1e-3
    assert torch.equal(layer(x), plain)


def test_three_dimensions() -> None:
    tensors = [tensor[:, 0] for tensor in inputs()]
    call = lambda *x: F.scaled_dot_product_attention(*x, attn_mask=BOOL)
    assert relative_error(plx.parallax_compile(call, replace_sdpa=plx.SOFTMAX)(*tensors), call(*tensors)) < 1e-12


def test_refusals() -> None:
    with pytest.raises(InputError, match="needs no new weights"):
        plx.parallax_compile(lambda x: x, replace_sdpa=plx.PARALLAX)
    with pytest.raises(InputTypeError, match="AttentionSpec or None"):
        plx.parallax_compile(lambda x: x, replace_sdpa="lla")  # type: ignore[call-overload]
    dropping = lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.1)
    with pytest.raises(UnsupportedError, match="cannot keep dropout"):
        plx.parallax_compile(dropping, fullgraph=True, replace_sdpa=plx.LLA)(*inputs())
    biased = lambda *x: F.scaled_dot_product_attention(*x, attn_mask=torch.zeros(12, 17, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="infinite bandwidth"):
        plx.parallax_compile(biased, fullgraph=True, replace_sdpa=plx.MESA)(*inputs())
    attention = plx.parallax_compile(nn.MultiheadAttention(16, 2), fullgraph=True, replace_sdpa=plx.LLA)
    x = torch.randn(3, 9, 16)
    with pytest.raises(UnsupportedError, match="does not reach into nn"):
        attention(x, x, x, need_weights=False)
