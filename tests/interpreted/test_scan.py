"""The scan's kernels in the interpreter, against the float64 reference; budgets from an independent computation."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from parallax_compile.lowering import inductor_scan
from support import interpreter
from support.oracle import budget, leaves, low_precision, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

CAUSAL = plx.masks.causal()
IDS = torch.tensor([0] * 40 + [1] * 5 + [2] * 60 + [3] * 45)
DOCUMENTS = CAUSAL & plx.masks.document(IDS, contiguous=True)


def operands(
    dtype: torch.dtype, length: int = 150, rows: int = 150, offset: float = 0.0, scale: float = 1.0
) -> list[Tensor]:
    def normal(heads: int, n: int, width: int = 20) -> Tensor:
        return torch.randn(1, heads, n, width, dtype=torch.float64)

    found = [normal(4, rows), scale * normal(2, length) + offset * normal(1, 1), normal(2, length, 24), normal(4, rows)]
    return [tensor.to(dtype) for tensor in found]


def in_segments(count: int) -> Any:
    return mock.patch.object(inductor_scan, "scan_segments", lambda *sizes: count)


def compare(spec: plx.AttentionSpec, inputs: list[Tensor], segments: int, keep: Tensor) -> None:
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True) + x[0].sum() * 0.0
    uniform = lambda *x: low_precision(*x, mask=keep, scale=0.0, intercept=spec.intercept)
    want = with_gradients(uniform, leaves(inputs, torch.float64))
    rough = with_gradients(uniform, leaves(inputs, inputs[0].dtype))
    generated = interpreter.interpreted(call)
    with in_segments(segments):
        got = with_gradients(generated, leaves(inputs, inputs[0].dtype))
    ran = {kernel.stage for kernel in generated.code.kernels if kernel.name in generated.launches}
    assert ran >= {"scan_product"} | ({"scan_totals"} if segments > 1 else set())
    for mine, theirs, exact in zip(got, rough, want, strict=True):
        assert relative_error(mine, exact) <= budget(relative_error(theirs, exact), inputs[0].dtype)


@pytest.mark.parametrize(
    ("mask", "segments", "intercept"),
    [(CAUSAL, 1, True), (CAUSAL, 3, False), (DOCUMENTS, 3, True), (DOCUMENTS, 2, False), (None, 3, True)],
    ids=["causal", "segments", "documents", "linear documents", "no mask"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_backward(mask: Any, segments: int, intercept: bool, dtype: torch.dtype) -> None:
    rows = 77 if mask is None else 150
    keep = torch.ones(rows, 150, dtype=torch.bool)
    if mask is not None:
        keep = keep.tril()
    if mask is DOCUMENTS:
        keep = keep & (IDS[:, None] == IDS)
    spec = (plx.AFFINE_LINEAR if intercept else plx.LINEAR).replace(mask_mod=mask)
    compare(spec, operands(dtype, rows=rows), segments, keep)


def test_keys_with_an_offset_cost_nothing() -> None:
    spec = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True)
    inputs = operands(torch.bfloat16, offset=10.0)
    plain = operands(torch.bfloat16)
    keep = torch.ones(150, 150, dtype=torch.bool).tril()
    rough = relative_error(
        low_precision(*plain, mask=keep, scale=0.0),
        low_precision(*(tensor.double() for tensor in plain), mask=keep, scale=0.0),
    )
    with torch.no_grad(), in_segments(2):
        got = interpreter.interpreted(call)(*inputs)
        assert relative_error(got, call(*(tensor.double() for tensor in inputs))) <= budget(rough, torch.bfloat16)


def test_float16_does_not_overflow() -> None:
    """Sums of products pass 65504 long before they are averaged."""
    spec = plx.LINEAR.replace(mask_mod=CAUSAL)
    inputs = operands(torch.float16, scale=500.0)
    compare(spec, inputs, 2, torch.ones(150, 150, dtype=torch.bool).tril())


def test_a_state_goes_from_call_to_call() -> None:
    spec = plx.AFFINE_LINEAR.replace(mask_mod=DOCUMENTS)
    tail = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL & plx.masks.document(IDS[110:], contiguous=True))
    head = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL & plx.masks.document(IDS[:110], contiguous=True))
    request = plx.AuxRequest(state=True)

    def call(*inputs: Tensor) -> Tensor:
        before, after = inputs[:4], inputs[4:]
        first, aux = plx.attention(*before, spec=head, enable_gqa=True, return_aux=request)
        rest = plx.attention(*after, spec=tail, enable_gqa=True, initial_state=aux.state)
        return torch.cat([first, rest], 2) + (before[0].sum() + after[0].sum()) * 0.0

    parts = [tensor.split([110, 40], 2) for tensor in operands(torch.float32)]
    inputs = [part[0] for part in parts] + [part[1] for part in parts]
    joined = lambda *x: [torch.cat(pair, 2) for pair in zip(x[:4], x[4:], strict=True)]
    whole = lambda *x: plx.attention(*joined(*x), spec=spec, enable_gqa=True)
    want = with_gradients(whole, leaves(inputs, torch.float64))
    with in_segments(2):
        got = with_gradients(interpreter.interpreted(call), leaves(inputs, torch.float32))
    keep = torch.ones(150, 150, dtype=torch.bool).tril() & (IDS[:, None] == IDS)
    uniform = lambda *x: low_precision(*joined(*x), mask=keep, scale=0.0)
    rough = with_gradients(uniform, leaves(inputs, torch.float32))
    for mine, theirs, exact in zip(got, rough, want, strict=True):
        assert relative_error(mine, exact) <= budget(relative_error(theirs, exact), torch.float32)


@pytest.mark.parametrize(
    ("mask", "segments", "intercept", "dtype"),
    [
        (CAUSAL, 2, True, torch.bfloat16),
        (DOCUMENTS, 2, False, torch.bfloat16),
        (DOCUMENTS, 1, True, torch.float32),
        (None, 2, True, torch.bfloat16),
    ],
    ids=["causal", "MesaNet documents", "float32 documents", "no mask"],
)
def test_mesa(mask: Any, segments: int, intercept: bool, dtype: torch.dtype) -> None:
    """Solved probes against the definition in float64."""
    spec = (plx.AFFINE_MESA if intercept else plx.MESA).replace(mask_mod=mask, probe=plx.Solved(1.0))
    rows = 77 if mask is None else 150
    q, k, v, _ = operands(dtype, rows=rows, offset=0.5)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = plx.attention(
            q, k, v, spec=spec, enable_gqa=True, return_aux=plx.AuxRequest(iterations=True, residual=True)
        )
        return out + 0.0 * (aux.iterations.sum() + aux.residual.sum())

    reference = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True)
    want = with_gradients(reference, leaves([q, k, v], torch.float64))
    generated = interpreter.interpreted(call)
    with in_segments(segments):
        got = with_gradients(generated, leaves([q, k, v], dtype))
    ran = {kernel.stage for kernel in generated.code.kernels if kernel.name in generated.launches}
    assert ran >= {"scan_systems", "scan_product"} | ({"scan_states"} if mask is not None else set())
    errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
    # The products round as those of the affine linear member do; the gradient of the keys is a difference of two of them.
    assert max(errors) <= (2.2 * 2.0**-8 if dtype == torch.bfloat16 else 1e-5)


def test_gradients_of_mesanet_are_rounded_once() -> None:
    """Of the value's gradient the last rounding is all; the query's has the weights of its chunk beside it, and no sums."""
    spec = plx.MESA.replace(mask_mod=CAUSAL, probe=plx.Solved(1.0))
    call = lambda q, k, v: plx.attention(q, k, v, spec=spec, enable_gqa=True)
    q, k, v, _ = operands(torch.bfloat16)
    grad = torch.randn(1, 4, 150, 24).to(torch.bfloat16)

    def gradients(call: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        given = leaves([q, k, v], dtype)
        return torch.autograd.grad(call(*given), given, grad.to(dtype))

    query, _, value = gradients(call, torch.float64)
    with in_segments(3):
        dquery, _, dvalue = gradients(interpreter.interpreted(call), torch.bfloat16)

    def roundings(got: Tensor, exact: Tensor) -> float:
        return relative_error(got, exact) / relative_error(exact.to(torch.bfloat16), exact)

    # Errors of n roundings add up to the root of n: 2 is 1.41, 3 is 1.73.
    assert roundings(dvalue, value) <= 1.25
    assert roundings(dquery, query) <= 1.5


def test_the_keys_gradient_of_mesanet_on_plain_inputs() -> None:
    """The first keys' comes from rows of fewer keys than columns, whose values a small ridge all but reproduces: two parts, of
    the core and of the systems, that take each other away but for a thirtieth."""
    spec = plx.MESA.replace(mask_mod=CAUSAL, probe=plx.Solved(0.1))
    call = lambda q, k, v: plx.attention(q, k, v, spec=spec)
    *inputs, grad = (torch.randn(1, 2, 140, 64).to(torch.bfloat16) for _ in range(4))

    def found(call: Any, dtype: torch.dtype) -> list[Tensor]:
        given = leaves(inputs, dtype)
        out = call(*given)
        return [out.detach(), *torch.autograd.grad(out, given, grad.to(dtype))]

    want = found(call, torch.float64)
    with in_segments(3):
        got = found(interpreter.interpreted(call), torch.bfloat16)
    errors = [relative_error(mine, exact) for mine, exact in zip(got, want, strict=True)]
    once = [relative_error(exact.to(torch.bfloat16), exact) for exact in want]
    assert all(error <= budget(rough, torch.bfloat16) for error, rough in zip(errors, once, strict=True)), errors
    # The states of the output and of the probe's gradient are in two terms, and so are the weights of the latter: of n
    # roundings the errors add up to the root of n, 3 is 1.73.
    assert errors[0] <= 1.6 * once[0]
    assert errors[1] <= 1.25 * once[1]


def test_means_of_the_probe_are_exact() -> None:
    """Sums of keys are multiplied in three terms: float32. Two would err by 2^-20 here."""
    spec = plx.LINEAR.replace(mask_mod=CAUSAL)
    request = plx.AuxRequest(probe_mean=True)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, return_aux=request)[1].probe_mean
    inputs = operands(torch.bfloat16, offset=4.0)
    with in_segments(3), torch.no_grad():
        got = interpreter.interpreted(call)(*inputs)
    assert relative_error(got, call(*(tensor.double() for tensor in inputs))) <= 2.0**-22


@pytest.mark.parametrize("exponent", [20, -20])
def test_systems_of_keys_of_any_size(exponent: int) -> None:
    """Keys beyond what float16 holds: as ``2^e`` of them with ``4^e`` of the ridge, a probe is ``2^-e`` of what it was."""
    q, k, v, _ = operands(torch.bfloat16)
    # In every document keys of another size too: a chunk of which all are small, or one that is large.
    k[:, :, 45:105] *= 2.0**-6
    found = []
    for by in (1.0, 2.0**exponent):
        spec = plx.MESA.replace(mask_mod=DOCUMENTS, probe=plx.Solved(0.5 * by * by))
        call = lambda q, k, v, spec=spec: plx.attention(q, k, v, spec=spec, enable_gqa=True)
        with in_segments(2), torch.no_grad():
            found.append(interpreter.interpreted(call)(by * q, by * k, v))
        assert found[-1].isfinite().all()
    assert relative_error(found[1], found[0].double()) <= 2.0**-8  # of the last rounding


@pytest.mark.parametrize("spec, length", [(plx.MESA, 70), (plx.AFFINE_MESA, 70), (plx.AFFINE_MESA, 1)])
def test_systems_of_keys_that_are_zero(spec: plx.AttentionSpec, length: int) -> None:
    """Padding before a sequence, or one key, which is its own mean: the ridge is all that such rows have."""
    spec = spec.replace(mask_mod=CAUSAL, probe=plx.Solved(4.0))
    q, k, v, _ = operands(torch.bfloat16, length=length, rows=length)
    if length > 64:
        k[:, :, :64] = 0.0
    want = with_gradients(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True), leaves([q, k, v], torch.float64))
    call = interpreter.interpreted(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True))
    with in_segments(1):
        got = with_gradients(call, leaves([q, k, v], torch.bfloat16))
    for mine, exact in zip(got, want, strict=True):
        assert mine.isfinite().all()
        assert float((mine.double() - exact).norm()) <= 2.2 * 2.0**-8 * max(
            float(exact.norm()), float(v.double().norm())
        )


def test_a_given_state_that_is_no_sum_of_squares() -> None:
    """Its entries pass its diagonal: rows keep what they have found, and none is inf or NaN."""
    spec = plx.MESA.replace(mask_mod=CAUSAL, probe=plx.Solved(1.0))
    q, k, v, _ = operands(torch.bfloat16, length=70, rows=70)
    matrix = 1e9 * (1.0 - torch.eye(20)).expand(1, 2, 20, 20)
    state = plx.State(
        torch.full((1,), 3.0), torch.zeros(1, 2, 20, 24), torch.zeros(1, 2, 20), torch.zeros(1, 2, 24), matrix
    )
    call = lambda q, k, v: plx.attention(q, k, v, spec=spec, enable_gqa=True, initial_state=state)
    with in_segments(1), torch.no_grad():
        assert interpreter.interpreted(call)(q, k, v).isfinite().all()


def test_a_state_goes_into_the_systems() -> None:
    """Two calls, the second from the first one's state, in documents of which one goes on: as one call in float64."""
    spec = plx.AFFINE_MESA.replace(probe=plx.Solved(0.5))
    request = plx.AuxRequest(state=True)
    head, tail = (CAUSAL & plx.masks.document(ids, contiguous=True) for ids in (IDS[:110], IDS[110:]))

    def call(*x: Tensor) -> Tensor:
        first, aux = plx.attention(*x[:3], spec=spec.replace(mask_mod=head), enable_gqa=True, return_aux=request)
        rest = plx.attention(*x[3:], spec=spec.replace(mask_mod=tail), enable_gqa=True, initial_state=aux.state)
        return torch.cat([first, rest], 2)

    def whole(*x: Tensor) -> Tensor:
        joined = [torch.cat(pair, 2) for pair in zip(x[:3], x[3:], strict=True)]
        return plx.attention(*joined, spec=spec.replace(mask_mod=DOCUMENTS), enable_gqa=True)

    parts = [tensor.split([110, 40], 2) for tensor in operands(torch.float32)[:3]]
    inputs = [part[0] for part in parts] + [part[1] for part in parts]
    want = with_gradients(whole, leaves(inputs, torch.float64))
    with in_segments(2):
        got = with_gradients(interpreter.interpreted(call), leaves(inputs, torch.float32))
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
