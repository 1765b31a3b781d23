"""Infinite bandwidth in linear time: values, gradients and states of the scan, against the dense reference and definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parallax_compile.lowering import scan, scan_products
from parallax_compile.lowering.plan_scan import scan_segments
from support.oracle import relative_error
from torch import Tensor

import parallax_compile as plx
from parallax_compile import masks
from parallax_compile.errors import InputError, InputTypeError, UnsupportedError

CAUSAL = plx.masks.causal()
IDS = torch.tensor([0] * 40 + [1] * 5 + [2] * 75 + [3] * 70)
DOCUMENTS = CAUSAL & plx.masks.document(IDS, contiguous=True)
MEMBERS = {
    "value average": plx.VALUE_AVERAGE,
    "affine linear": plx.AFFINE_LINEAR,
    "linear": plx.LINEAR,
    "affine MesaNet": plx.AFFINE_MESA,
    "MesaNet": plx.MESA,
    "gradient": plx.AFFINE_MESA.replace(probe=plx.Gradient(2, ridge=0.3)),
    "gradient, no intercept": plx.MESA.replace(probe=plx.Gradient(2, ridge=0.3)),
}


def operands(spec: plx.AttentionSpec, length: int = 190, rows: int | None = None) -> list[Tensor]:
    def normal(heads: int, n: int, width: int, offset: float = 0.0) -> Tensor:
        return torch.randn(2, heads, n, width, dtype=torch.float64) + offset

    rows = length if rows is None else rows
    found = [normal(4, rows, 6), normal(2, length, 6, 2.0), normal(2, length, 5)]
    return [*found, normal(4, rows, 6)] if spec.probe.kind == "learned" else found


def everything(call: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of ``call``, and gradients of a sum of them all with fixed weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = [output for output in call(*leaves) if output is not None]
    generator = torch.Generator().manual_seed(5)
    loss = sum(tensor.sum() * 0.0 for tensor in leaves)
    for output in outputs:
        if output.is_floating_point() and output.requires_grad:
            loss = loss + (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("mask", [CAUSAL, DOCUMENTS, None], ids=["causal", "documents", "none"])
@pytest.mark.parametrize("name", MEMBERS)
def test_the_scan_is_the_reference(name: str, mask: Any) -> None:
    spec = MEMBERS[name].replace(mask_mod=mask)
    learned = spec.probe.kind == "learned"
    request = plx.AuxRequest(lse=True, value_mean=True, probe_mean=learned)

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, aux = plx.attention(*inputs, spec=spec, enable_gqa=True, return_aux=request)
        return out, aux.lse, aux.value_mean, aux.probe_mean

    inputs = operands(spec, rows=None if mask is not None else 33)
    want = everything(call, inputs)
    # The narrowest heads are what Inductor makes of a causal mask alone. A solver's scan has all that the others' have.
    by_inductor = (name, mask) in [("MesaNet", DOCUMENTS), ("affine linear", None)]
    backends = ["aot_eager", *(["inductor"] if by_inductor else [])]
    for backend in backends:
        torch._dynamo.reset()
        got = everything(torch.compile(call, backend=backend, fullgraph=True), inputs)
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-11


def test_the_narrowest_heads() -> None:
    """Rows are then the only index, of which Inductor lost those past the last whole chunk."""
    spec = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL)
    inputs = [torch.randn(1, 2, 150, 1, dtype=torch.float64) for _ in range(4)]
    call = lambda *x: (plx.attention(*x, spec=spec),)
    want = everything(call, inputs)
    got = everything(torch.compile(call, fullgraph=True), inputs)
    assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-11


@pytest.mark.parametrize("mask", [CAUSAL, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_sequence_in_two_calls(name: str, mask: Any) -> None:
    """The state of the first part makes the second what it is in one call, with gradients through the state."""
    cut, spec = 130, MEMBERS[name]
    request = plx.AuxRequest(state=True)

    def run(inputs: tuple[Tensor, ...], ids: Tensor, state: Any) -> Any:
        own = CAUSAL if mask is CAUSAL else CAUSAL & plx.masks.document(ids, contiguous=True)
        return plx.attention(
            *inputs, spec=spec.replace(mask_mod=own), enable_gqa=True, initial_state=state, return_aux=request
        )

    def once(*inputs: Tensor) -> tuple:
        out, aux = run(inputs, IDS, None)
        return out, *aux.state

    def twice(*inputs: Tensor) -> tuple:
        first, aux = run(tuple(tensor[:, :, :cut] for tensor in inputs), IDS[:cut], None)
        second, aux = run(tuple(tensor[:, :, cut:] for tensor in inputs), IDS[cut:], aux.state)
        return torch.cat([first, second], 2), *aux.state

    inputs = operands(spec)
    want = everything(once, inputs)
    for call in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        got = everything(call, inputs)
        assert max(relative_error(a, b) for a, b in zip(got, want, strict=True)) < 1e-11


def test_conventions_of_fla() -> None:
    """fla's recurrences, from their definitions: sums, not means, and a ridge on the sum."""
    q, k, v = operands(plx.LINEAR, length=50)[:3]
    q = q[:, :2]
    matrix, products = torch.zeros(2, 2, 6, 5).double(), torch.zeros(2, 2, 6, 6).double()
    linear, mesa = [], []
    for t in range(50):
        matrix = matrix + k[:, :, t, :, None] * v[:, :, t, None, :]
        products = products + k[:, :, t, :, None] * k[:, :, t, None, :]
        linear.append((q[:, :, t, None] @ matrix)[:, :, 0])
        solved = torch.linalg.solve(products + 0.7 * torch.eye(6).double(), q[:, :, t])
        mesa.append((solved[:, :, None] @ matrix)[:, :, 0])
    count = torch.arange(1, 51, dtype=torch.float64)[:, None]
    request = plx.AuxRequest(state=True)
    call = torch.compile(lambda *x: plx.attention(*x, spec=plx.LINEAR.replace(mask_mod=CAUSAL), return_aux=request))
    out, aux = call(q, k, v, q)
    torch.testing.assert_close(out * count, torch.stack(linear, 2))
    torch.testing.assert_close(aux.state.key_value, matrix)
    spec = plx.MESA.replace(mask_mod=CAUSAL, probe=plx.Solved(0.7, ridge_scale="sum"))
    torch.testing.assert_close(plx.attention(q, k, v, spec=spec), torch.stack(mesa, 2))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_sums_of_segments(backward: bool, last: bool) -> None:
    """Two chunks of 64 rows a segment, the third a chunk; what is left out without ``last`` is where the sums end."""
    sizes = ((1, 2, 300, 3), (1, 2, 300, 4), (2, 1, 2, 300), (1, 300))
    key, value, levels, weight = (torch.randn(size, dtype=torch.float64) for size in sizes)
    found = scan_products.totals(key, value, *levels, weight, None, 1, 3, last, backward)
    weighed = value * weight[:, None, :, None]
    want = []
    for rows in (slice(0, 128), slice(128, 256), slice(256, 300)):
        k, v = key[:, :, rows], weighed[:, :, rows]
        first, second = (
            (part * level[:, :, rows, None]).sum((1, 2)) for part, level in zip((k, v), levels, strict=True)
        )
        want.append((torch.einsum("bhld,bhle->bde", k, v), first, second))
    want = want if last else want[1:] if backward else want[:-1]
    for position, part in enumerate(found):
        torch.testing.assert_close(part[:, 0], torch.stack([sums[position] for sums in want], 1))


def test_segments_fill_the_device_once() -> None:
    """Two programs for each of 132 multiprocessors, 64 columns of the values a program; segments of 256 rows at least."""
    sizes = {
        (4, 16, 4096, 128): 2,
        (1, 16, 16384, 128): 8,
        (8, 16, 2048, 64): 2,
        (1, 1, 65536, 128): 16,
        (1, 1, 300, 16): 2,
    }
    assert {size: scan_segments(*size) for size in sizes} == sizes
    assert scan_segments(16, 16, 4096, 128) == 1


def test_the_query_is_not_read_and_its_gradient_takes_no_memory() -> None:
    q, k, v, r = (tensor.float().requires_grad_() for tensor in operands(plx.LINEAR.replace(probe=plx.Learned()), 40))
    call = lambda *x: plx.attention(*x, spec=plx.LINEAR.replace(mask_mod=CAUSAL), enable_gqa=True)
    out = torch.compile(call, fullgraph=True)(q, k, v, r)
    found, _ = torch.autograd.grad(out.sum(), [q, r])
    assert found.shape == q.shape and found.dtype == q.dtype and not found.any()
    assert found.untyped_storage().nbytes() == q.element_size()


def test_a_dynamic_length() -> None:
    spec = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL)
    call = torch.compile(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True), dynamic=True, fullgraph=True)
    for length in (90, 190, 301):
        inputs = operands(spec, length)
        assert relative_error(call(*inputs), plx.attention(*inputs, spec=spec, enable_gqa=True)) < 1e-12


def test_which_masks_are_a_prefix() -> None:
    assert masks.prefix(None, 5, 9) == scan.Prefix(whole=True)
    assert masks.prefix(CAUSAL, 9, 9) == scan.Prefix(whole=False)
    assert masks.prefix(CAUSAL, 5, 9) is None
    assert masks.prefix(plx.masks.causal(offset=1), 9, 9) is None
    assert masks.prefix(plx.masks.sliding_window(3), 9, 9) is None
    assert masks.prefix(lambda b, h, q, k: q >= k, 9, 9) is None
    assert masks.prefix(CAUSAL & plx.masks.document(torch.zeros(9).int()), 9, 9) is None  # not known to be contiguous
    ids = torch.tensor([[3, 3, 1, 1, 1, 2]])
    found = masks.prefix(CAUSAL & plx.masks.document(ids, contiguous=True), 6, 6)
    assert found is not None and found.starts is not None
    assert found.starts.tolist() == [[0, 0, 2, 2, 2, 5]]


def test_a_covariance_mod_streams() -> None:
    """A nonlinear function of the probe score has no state; the member stays right."""
    spec = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL, covariance_mod=plx.mods.tanh_cap(2.0))
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True)
    inputs = operands(spec, 40)
    assert relative_error(torch.compile(call, backend="aot_eager")(*inputs), call(*inputs)) < 1e-12


def test_kernel_options_are_not_ignored() -> None:
    spec = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, kernel_options={"BLOCK_M": 32})
    with pytest.raises(UnsupportedError, match="do not reach the scan"):
        torch.compile(call, backend="eager", fullgraph=True)(*operands(spec, 20))


def test_bad_states() -> None:
    q, k, v, r = operands(plx.AFFINE_LINEAR, length=20)
    request = plx.AuxRequest(state=True)
    causal = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL)
    _, aux = plx.attention(q, k, v, r, spec=causal, enable_gqa=True, return_aux=request)

    def attempt(error: type[Exception], match: str, spec: plx.AttentionSpec = causal, **given: Any) -> None:
        probe = r if spec.probe.kind == "learned" else None
        call = lambda: plx.attention(q, k, v, probe, spec=spec, enable_gqa=True, **given)
        for run in (call, torch.compile(call, backend="eager", fullgraph=True)):
            with pytest.raises(error, match=match):
                run()

    attempt(InputError, "infinite bandwidth", plx.PARALLAX, return_aux=request)
    attempt(InputError, "causal prefix", causal.replace(mask_mod=plx.masks.sliding_window(4)), return_aux=request)
    mesa = plx.MESA.replace(mask_mod=CAUSAL)
    attempt(InputError, "key_key must be a tensor", mesa, initial_state=aux.state)
    attempt(InputTypeError, "plx.State", initial_state=(1, 2))
    attempt(
        InputError, "key_value must have shape", initial_state=aux.state._replace(key_value=torch.zeros(2, 2, 6, 6))
    )
    attempt(InputError, "key_sum must be a tensor", initial_state=aux.state._replace(key_sum=None))
