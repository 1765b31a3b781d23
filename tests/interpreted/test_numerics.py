"""Where low precision goes wrong in other kernels: keys with a large common offset, float16's range, odd memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import interpreter
from support.oracle import budget, leaves, low_precision, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")


def operands(rows: int = 96, width: int = 32, offset: float = 0.0, probe_scale: float = 1.0) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    q, k, v, r = (normal(1, 2, rows, width) for _ in range(4))
    return [q, k + offset * normal(1, 1, 1, width), v, r * probe_scale]


def errors(inputs: list[Tensor], dtype: torch.dtype, mask: bool) -> tuple[list[float], list[float]]:
    """Errors of the generated kernels, and of the independent computation, output and gradients, against float64."""
    keep = torch.ones(inputs[0].size(2), inputs[1].size(2), dtype=torch.bool).tril() if mask else None
    spec = plx.PARALLAX.replace(mask_mod=plx.masks.causal()) if mask else plx.PARALLAX
    rounded = [tensor.to(dtype) for tensor in inputs]
    oracle = lambda *x: low_precision(*x, mask=keep)
    want = with_gradients(oracle, leaves(rounded, torch.float64))
    rough = with_gradients(oracle, leaves(rounded, dtype))
    got = with_gradients(interpreter.interpreted(lambda *x: plx.attention(*x, spec=spec)), leaves(rounded, dtype))
    compare = lambda found: [relative_error(a, b) for a, b in zip(found, want, strict=True)]
    return compare(got), compare(rough)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [True, False])
def test_keys_offset_by_ten_sigma_cost_no_accuracy(dtype: torch.dtype, mask: bool) -> None:
    _, plain = errors(operands(), dtype, mask)
    shifted, naive = errors(operands(offset=10.0), dtype, mask)
    # The budget is that of keys without an offset; the independent computation breaks it many times over with one.
    for mine, theirs in zip(shifted, plain, strict=True):
        assert mine <= budget(theirs, dtype)
    assert max(naive) > 3 * max(shifted)


def test_probe_scores_past_the_range_of_float16() -> None:
    inputs = operands(probe_scale=6000.0)
    got, _ = errors(inputs, torch.float16, mask=False)
    _, plain = errors(operands(), torch.float16, mask=False)
    scores = inputs[3] @ inputs[1].mT
    assert scores.abs().max() > 65504
    assert max(got) <= budget(max(plain), torch.float16)


def test_rows_without_a_key_get_no_gradient_from_any_output() -> None:
    inputs = operands()
    spec = plx.PARALLAX.replace(mask_mod=plx.masks.causal(-20))

    def call(*x: Tensor) -> Tensor:
        out, aux = plx.attention(*x, spec=spec, return_aux=plx.AuxRequest(lse=True, probe_mean=True))
        lse = torch.where(aux.lse.isinf(), 0.0, aux.lse)
        return out + lse[..., None] + aux.probe_mean[..., None]

    for dtype in (torch.float32, torch.bfloat16):
        want = with_gradients(call, leaves([x.to(dtype) for x in inputs], torch.float64))
        got = with_gradients(interpreter.interpreted(call), leaves(inputs, dtype))
        for position in (1, 4):  # query and probe
            assert not got[position][:, :, :20].any()
            assert relative_error(got[position], want[position]) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_views_expanded_inputs_and_gradients_of_a_sum() -> None:
    base = [torch.randn(2, 50, heads, 16).transpose(1, 2) for heads in (4, 1, 1, 4)]

    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        out = plx.attention(q, k.expand(2, 4, 50, 16), v.expand(2, 4, 50, 16), r)
        return out.sum(dim=(1, 2, 3))

    want = with_gradients(call, leaves(base, torch.float64))
    got = with_gradients(interpreter.interpreted(call), leaves(base, torch.float32))
    assert max(map(relative_error, got, want)) < 1e-5


@pytest.mark.unpoisoned
def test_offsets_past_two_to_the_thirty_one() -> None:
    # A [B, L, H, D] slice whose heads lie far apart: the addresses, not the data, are large. What lies between is not touched.
    stride = 2**30 + 16
    backing = torch.empty(0)
    try:
        backing = torch.empty(3 * stride, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("not enough memory")
    wide = backing.as_strided((1, 3, 20, 16), (3 * stride, stride, 16, 1))
    wide.copy_(torch.randn(1, 3, 20, 16))
    rest = [torch.randn(1, 3, 20, 16, dtype=torch.float16) for _ in range(3)]

    def call(*x: Any) -> Tensor:
        return plx.attention(*x)

    got = interpreter.interpreted(call)(rest[0], wide, rest[1], rest[2])
    want = call(rest[0].double(), wide.double(), rest[1].double(), rest[2].double())
    assert relative_error(got, want) < 2e-3
