"""The members beyond the core's own two: generated kernels in the interpreter, against the float64 reference.

Budgets are relative to Parallax with the exact solution as its probe, computed independently in the tested dtype.
"""

from __future__ import annotations

import pytest
import torch
from support import interpreter
from support.oracle import budget, leaves, low_precision, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx
from parallax_compile import reference

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

CAUSAL = plx.masks.causal()


def operands(rows: int, columns: int, width: int, probe: bool, dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, width, dtype=torch.float64)

    found = [normal(2, rows), normal(1, columns) + offset * normal(1, 1), normal(1, columns)]
    return [tensor.to(dtype) for tensor in ([*found, normal(2, rows)] if probe else found)]


def run(spec: plx.AttentionSpec, inputs: list[Tensor], stages: set[str]) -> list[float]:
    """Errors of the generated kernels, output and gradients; asserts that the stages ran."""
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True)
    want = with_gradients(lambda *x: call(*x) + sum(t.sum() * 0.0 for t in x), leaves(inputs, torch.float64))
    generated = interpreter.interpreted(call)
    got = with_gradients(lambda *x: generated(*x) + sum(t.sum() * 0.0 for t in x), leaves(inputs, inputs[0].dtype))
    ran = {kernel.stage for kernel in generated.code.kernels if kernel.name in generated.launches}
    assert stages <= ran
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


def test_uniform_weights() -> None:
    """Under a mask that is not known to be a prefix the core streams, with weights that are all the same."""
    spec = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL & plx.masks.document(torch.zeros(70, dtype=torch.int32)))
    inputs = operands(70, 70, 20, True, torch.bfloat16)
    errors = run(spec, inputs, {"core_forward", "core_backward_query", "core_backward_key"})
    keep = torch.ones(70, 70, dtype=torch.bool).tril()
    # With scores of 0 the independent computation weighs every key the same.
    uniform = lambda *x: low_precision(*x, mask=keep, scale=0.0)
    want = with_gradients(uniform, leaves(inputs, torch.float64))
    rough = with_gradients(uniform, leaves(inputs, torch.bfloat16))
    for mine, theirs, exact in zip(errors, rough, want, strict=True):
        assert mine <= budget(relative_error(theirs, exact), torch.bfloat16)


def solved_budget(spec: plx.AttentionSpec, inputs: list[Tensor]) -> float:
    """Error of the output when the exact probe is given and everything else is done in the inputs' dtype."""
    q, k, v = (tensor.double() for tensor in inputs)
    keep = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    exact = reference.attention(q, k, v, spec=spec, mask=keep)
    keys = k.expand(-1, q.size(1), -1, -1)
    weights = torch.softmax((q @ keys.mT / q.size(3) ** 0.5).masked_fill(~keep, -float("inf")), -1)
    mean = weights @ keys
    centred = keys[:, :, None] - mean[:, :, :, None]
    matrix = centred.mT @ (weights[..., None] * centred) + spec.probe.ridge * torch.eye(q.size(3), dtype=q.dtype)  # type: ignore[union-attr]
    rho = torch.linalg.solve(matrix, (mean - q)[..., None])[..., 0]
    rounded = low_precision(*inputs, rho.to(inputs[0].dtype), mask=keep)
    return budget(relative_error(rounded, exact.out), inputs[0].dtype)


@pytest.mark.parametrize(
    ("dtype", "ridge"), [(torch.bfloat16, 1.0), (torch.bfloat16, 0.1), (torch.float32, 0.1)], ids=str
)
def test_local_linear_attention(dtype: torch.dtype, ridge: float) -> None:
    spec = plx.LLA.replace(probe=plx.Solved(ridge), mask_mod=CAUSAL)
    inputs = operands(70, 70, 20, False, dtype)
    out, *grads = run(spec, inputs, {"core_solve", "core_backward_query", "core_backward_key"})
    # In float32 the solve itself, which the budget takes as exact, costs as much as the rest. In bfloat16 the budget's probe is
    # rounded, which the solution never is, forward and backward: one rounding of the weights is what may be left.
    allowed = 2 * solved_budget(spec, inputs) if dtype == torch.float32 else 1.2 * 2.0**-8
    assert max(out, *grads) <= allowed


def test_the_solver_is_centred() -> None:
    """Keys that share a large offset cost the solver no accuracy."""
    spec = plx.AFFINE_MESA.replace(probe=plx.Solved(1.0))
    inputs = operands(33, 50, 16, False, torch.bfloat16, offset=10.0)
    with torch.no_grad():
        inputs[0] = (inputs[0] + inputs[1].mean(2, keepdim=True)).to(torch.bfloat16)
        call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True)
        want = call(*(tensor.double() for tensor in inputs))
        got = interpreter.interpreted(call)(*inputs)
    assert relative_error(got, want) < 2 * 2.0**-8


def test_gradient_steps() -> None:
    spec = plx.LLA.replace(probe=plx.Gradient(2, ridge=0.2), mask_mod=CAUSAL)
    errors = run(spec, operands(40, 40, 16, False, torch.bfloat16), {"core_forward"})
    assert max(errors) < 4 * 2.0**-8


@pytest.mark.parametrize("spec", [plx.LLA, plx.MESA], ids=["LLA", "MESA"])
def test_a_system_that_cannot_be_solved(spec: plx.AttentionSpec) -> None:
    """A ridge that makes a system indefinite leaves the zero probe, a residual that says so, and no NaN anywhere."""
    spec = spec.replace(mask_mod=CAUSAL)
    request = plx.AuxRequest(residual=True)
    ridge = torch.where(torch.arange(40) % 3 == 0, -50.0, 1.0)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, ridge=ridge, return_aux=request)
    inputs = leaves(operands(40, 40, 16, False, torch.bfloat16), torch.bfloat16)
    out, aux = interpreter.interpreted(call)(*inputs)
    bad = slice(3, None, 3)
    assert float(aux.residual[:, :, bad].min()) > 0.5 and float(aux.residual[:, :, 4::3].max()) < 0.5
    fallback = plx.SOFTMAX.replace(mask_mod=CAUSAL)
    want = plx.attention(*inputs, spec=fallback, enable_gqa=True) if spec.intercept else torch.zeros_like(out)
    assert relative_error(out[:, :, bad], want[:, :, bad]) < 2.0**-6 if spec.intercept else not out[:, :, bad].any()
    out.float().sum().backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in inputs)
