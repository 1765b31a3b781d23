"""The direct solve of narrow heads: generated kernels in the interpreter, against float64 and plain ridge regressions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import interpreter
from support.oracle import ROUNDING, leaves, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

DIRECT = {"DIRECT": True}
STAGES = ["core_solve_direct", "core_solve_direct", "core_backward_query", "core_backward_key"]


def operands(rows: int, columns: int, width: int, value_width: int, dtype: torch.dtype, offset: float = 0.0) -> list:
    def normal(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(1, heads, length, width, dtype=torch.float64)

    key = normal(1, columns, width) + offset * normal(1, 1, width)
    return [tensor.to(dtype) for tensor in (normal(2, rows, width), key, normal(1, columns, value_width))]


def run(spec: plx.AttentionSpec, inputs: list[Tensor], **call: Any) -> tuple[list[Tensor], list[Tensor], Any, list]:
    """Output and gradients (inputs, a ridge for each head), generated and in float64; aux output; the stages that ran."""
    request, aux = plx.AuxRequest(iterations=True, residual=True), []
    ridge = torch.tensor([1.0, 1.5])[:, None] * spec.probe.ridge  # type: ignore[union-attr]

    def function(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> tuple[Tensor, Any]:
        more = {"spec": spec, "enable_gqa": True, "return_aux": request, "kernel_options": DIRECT}
        return plx.attention(q, k, v, ridge=ridge, **more, **call)

    generated = interpreter.interpreted(function)

    def keeping_aux(*x: Tensor) -> Tensor:
        out, found = generated(*x)
        aux.append(found)
        return out

    wide = leaves([*inputs, ridge], torch.float64)
    want = with_gradients(lambda *x: function(*x)[0], wide)
    got = with_gradients(keeping_aux, [*leaves(inputs, inputs[0].dtype), ridge.clone().requires_grad_()])
    stages = {kernel.name: kernel.stage for kernel in generated.code.kernels}
    return got, want, aux[0], [stages[name] for name in generated.launches if stages[name]]


def regressions(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, ridge: Tensor) -> Tensor:
    """At each query, the prediction of the weighted ridge regression of values on keys, by QR of its stacked equations."""
    k, v = k.expand(-1, q.size(1), -1, -1), v.expand(-1, q.size(1), -1, -1)
    weights = torch.softmax((q @ k.mT / q.size(3) ** 0.5).masked_fill(~keep, -float("inf")), -1).sqrt()[..., None]
    inputs = k[:, :, None] - q[:, :, :, None]
    design = torch.cat([weights, weights * inputs], -1)
    penalty = torch.cat([torch.zeros(q.size(3), 1), torch.eye(q.size(3))], 1).to(q) * ridge[..., None, None].sqrt()
    design = torch.cat([design, penalty.expand(*design.shape[:3], -1, -1)], -2)
    labels = torch.nn.functional.pad(weights * v[:, :, None], (0, 0, 0, q.size(3)))
    return torch.linalg.lstsq(design, labels).solution[..., 0, :]


@pytest.mark.parametrize(
    ("dtype", "ridge"),
    [(torch.bfloat16, 0.01), (torch.float16, 1.0), (torch.float32, 1e-3)],
    ids=str,
)
def test_it_is_the_ridge_regression_whatever_the_ridge(dtype: torch.dtype, ridge: float) -> None:
    """A head width that is no power of two, values wider than the keys, rows with fewer keys than widths."""
    spec = plx.LLA.replace(probe=plx.Solved(ridge), mask_mod=plx.masks.causal())
    inputs = operands(70, 70, 13, 20, dtype)
    got, want, aux, stages = run(spec, inputs)
    assert stages == STAGES
    keep = torch.ones(70, 70, dtype=torch.bool).tril()
    exact = regressions(*(t.double() for t in inputs), keep, torch.tensor([[ridge], [1.5 * ridge]]).double())
    assert relative_error(want[0], exact) < 1e-9
    # One rounding of the weights. In float32 rows with fewer keys than widths magnify a rounding by their condition.
    allowed = 1.2 * ROUNDING[dtype] if dtype != torch.float32 else 4 * ROUNDING[dtype] / ridge
    errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
    # The matrices are as good as float32: 16-bit inputs need no refinement.
    assert dtype == torch.float32 or not aux.iterations.any()
    assert float(aux.residual.max()) < 1e-3
    assert max(errors) <= allowed


def test_keys_far_from_zero_rows_without_keys_and_mods() -> None:
    """Keys offset by 10 sigma, whose rows differ in their means; the first five rows see none; a score_mod; several tiles."""
    spec = plx.LLA.replace(probe=plx.Solved(0.1), mask_mod=plx.masks.causal(offset=-5), score_mod=plx.mods.alibi(2))
    inputs = operands(150, 150, 16, 16, torch.bfloat16, offset=10.0)
    got, want, aux, stages = run(spec, inputs)
    assert stages == STAGES
    assert not got[0][:, :, :5].any() and not got[1][:, :, :5].any()
    errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
    assert not aux.iterations.any() and float(aux.residual.max()) < 1e-2
    assert max(errors) <= 1.2 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("intercept", [True, False])
def test_the_core_makes_the_output_of_a_covariance_mod(intercept: bool) -> None:
    """The solve without values, its adjoint with a right-hand side from elsewhere; with and without intercept; no mask."""
    spec = plx.AttentionSpec(probe=plx.Solved(0.1), intercept=intercept, covariance_mod=plx.mods.tanh_cap(4.0))
    inputs = operands(40, 50, 16, 16, torch.bfloat16)
    got, want, _, stages = run(spec, inputs)
    assert stages.count("core_solve_direct") == 2 and "core_forward" in stages
    errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= 2 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("intercept", [True, False])
def test_a_system_that_cannot_be_solved(intercept: bool) -> None:
    """An indefinite system leaves the zero probe and a residual that says so; a singular one is finite too."""
    spec = plx.AttentionSpec(probe=plx.Solved(), intercept=intercept, mask_mod=plx.masks.causal())
    ridge = torch.where(torch.arange(40) % 3 == 0, -50.0, 1.0)
    ridge[1] = 0.0  # two keys: a matrix of rank 1, or 2
    request = plx.AuxRequest(residual=True)
    call = lambda *x: plx.attention(
        *x, spec=spec, enable_gqa=True, ridge=ridge, return_aux=request, kernel_options=DIRECT
    )
    inputs = leaves(operands(40, 40, 16, 16, torch.bfloat16), torch.bfloat16)
    generated = interpreter.interpreted(call)
    out, aux = generated(*inputs)
    bad = slice(3, None, 3)
    assert "core_solve_direct" in {
        kernel.stage for kernel in generated.code.kernels if kernel.name in generated.launches
    }
    assert float(aux.residual[:, :, bad].min()) > 0.5 and float(aux.residual[:, :, 4::3].max()) < 1e-3
    softmax = plx.attention(*inputs, spec=plx.SOFTMAX.replace(mask_mod=plx.masks.causal()), enable_gqa=True)
    want = softmax if intercept else torch.zeros_like(out)
    assert relative_error(out[:, :, bad], want[:, :, bad]) < 2.0**-6 if intercept else not out[:, :, bad].any()
    assert float(out[:, :, 1].abs().max()) < 10.0
    out.float().sum().backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in inputs)
