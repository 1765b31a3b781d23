"""Every member of the family compiled: values, gradients, the solver's report, and what only these members promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import leaves, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx
from parallax_compile.errors import InputError

CAUSAL = plx.masks.causal()
MEMBERS = {
    **plx.family(),
    "learned, no intercept": plx.PARALLAX.replace(intercept=False),
    "solved, no intercept": plx.LLA.replace(intercept=False),
    "solved, ridge on the sum": plx.LLA.replace(probe=plx.Solved(0.3, ridge_scale="sum")),
    "gradient": plx.LLA.replace(probe=plx.Gradient(3, ridge=0.2)),
    "gradient, infinite, no intercept": plx.MESA.replace(probe=plx.Gradient(2, step_size=0.1)),
    "gradient, no intercept": plx.LLA.replace(probe=plx.Gradient(2), intercept=False),
}


def operands(spec: plx.AttentionSpec, rows: int = 41, columns: int | None = None, width: int = 12) -> list[Tensor]:
    columns = rows if columns is None else columns

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, width, dtype=torch.float64)

    found = [normal(4, rows), normal(2, columns), normal(2, columns)]
    return [*found, normal(4, rows)] if spec.probe.kind == "learned" else found


def difference(call: Any, inputs: list[Tensor], backend: str, captured: Any = ()) -> list[float]:
    """Relative differences of the compiled call from the reference, output and gradients, in float64."""
    # Leaves that the member ignores (the keys of an average) have no gradient in the reference.
    connected = lambda *x: call(*x) + sum(tensor.sum() * 0.0 for tensor in x)
    want = with_gradients(connected, leaves(inputs, torch.float64), captured)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    got = with_gradients(
        lambda *x: compiled(*x) + sum(tensor.sum() * 0.0 for tensor in x), leaves(inputs, torch.float64), captured
    )
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_graph_of_every_member(name: str) -> None:
    spec = MEMBERS[name].replace(mask_mod=CAUSAL)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True)
    assert max(difference(call, operands(spec), "aot_eager")) < 1e-12


# The solver of infinite bandwidth is compiled in test_scan.py.
@pytest.mark.parametrize("name", ["LLA", "AFFINE_LINEAR"])
def test_members_on_cpu(name: str) -> None:
    spec = MEMBERS[name].replace(mask_mod=CAUSAL)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True)
    # More than one chunk of rows, and conjugate gradients within: a loop in a loop.
    assert max(difference(call, operands(spec, rows=150), "inductor")) < 1e-10


def test_score_mod_captured_gradients_ridge_gradient_and_rows_without_a_key() -> None:
    slope = torch.rand(4, dtype=torch.float64, requires_grad=True)
    ridge = torch.rand(4, 1, dtype=torch.float64).add(0.1).requires_grad_()
    spec = plx.LLA.replace(mask_mod=plx.masks.causal(offset=-5))

    def call(*x: Tensor) -> Tensor:
        return plx.attention(
            *x, spec=spec, enable_gqa=True, ridge=ridge,
            score_mod=lambda s, b, h, q, k: s - slope[h] * (q - k) * 0.1,
            covariance_mod=lambda s, b, h, q, k: torch.tanh(s),
        )  # fmt: skip

    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        assert max(difference(call, operands(spec, rows=30), backend, [slope, ridge])) < 1e-9


def test_a_mod_that_ignores_its_score() -> None:
    slope = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def call(*x: Tensor) -> Tensor:
        return plx.attention(*x, enable_gqa=True, score_mod=lambda s, b, h, q, k: slope[h] * (k - q) * 0.1)

    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        assert max(difference(call, operands(plx.PARALLAX), backend, [slope])) < 1e-12


def test_the_solver_reports_iterations_and_residual() -> None:
    inputs = operands(plx.LLA)
    request = plx.AuxRequest(iterations=True, residual=True)
    call = lambda *x: plx.attention(*x, spec=plx.LLA, enable_gqa=True, return_aux=request)
    _, aux = torch.compile(call, fullgraph=True)(*inputs)
    assert aux.iterations.shape == aux.residual.shape == (2, 4, 41)
    assert aux.iterations.dtype == torch.int32
    assert int(aux.iterations.min()) >= 2 and int(aux.iterations.max()) <= 4 * 12
    assert float(aux.residual.max()) < 1e-9


def test_no_keys_take_no_iterations() -> None:
    q, empty = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 0, 4)
    request = plx.AuxRequest(iterations=True, residual=True)
    call = torch.compile(lambda *x: plx.attention(*x, spec=plx.LLA, return_aux=request), fullgraph=True)
    out, aux = call(q, empty, empty)
    assert not out.any() and not aux.iterations.any() and not aux.residual.any()


def test_lse_at_infinite_bandwidth_counts_keys() -> None:
    spec = plx.AFFINE_LINEAR.replace(mask_mod=CAUSAL)
    call = torch.compile(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, return_lse=True), fullgraph=True)
    _, lse = call(*operands(spec))
    torch.testing.assert_close(lse[0, 0], torch.arange(1, 42, dtype=torch.float64).log())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_affine_map_is_recovered_at_the_edge_of_the_keys(backend: str) -> None:
    """FAMILY, property 6: an oracle that shares no formula with the solver."""
    spec = plx.LLA.replace(probe=plx.Solved(1e-9))
    key = torch.rand(1, 1, 64, 3, dtype=torch.float64)
    query = torch.cat([torch.zeros(1, 1, 1, 3), torch.ones(1, 1, 1, 3), torch.full((1, 1, 1, 3), 2.0)], 2).double()
    matrix, shift = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    call = torch.compile(lambda *x: plx.attention(*x, spec=spec), fullgraph=True, backend=backend)
    out = call(query, key, key @ matrix + shift)
    assert relative_error(out, query @ matrix + shift) < 1e-6
    assert (
        relative_error(plx.attention(query, key, key @ matrix + shift, spec=plx.SOFTMAX), query @ matrix + shift) > 0.05
    )


def test_a_large_ridge_leaves_the_zero_probe() -> None:
    """FAMILY, property 8."""
    inputs = operands(plx.LLA)
    far = plx.LLA.replace(probe=plx.Solved(1e9))
    compiled = lambda spec: torch.compile(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True), backend="aot_eager")
    assert relative_error(compiled(far)(*inputs), compiled(plx.SOFTMAX)(*inputs)) < 1e-6
    assert float(compiled(far.replace(intercept=False))(*inputs).abs().max()) < 1e-6


def test_translating_keys_at_infinite_bandwidth_changes_nothing() -> None:
    """FAMILY, property 3, for the learned probe, and with the queries for the solved one."""
    for spec in (plx.AFFINE_LINEAR, plx.AFFINE_MESA):
        q, k, v, *r = operands(spec)
        shift = 10 * torch.randn(12, dtype=torch.float64)
        torch._dynamo.reset()
        call = torch.compile(lambda *x, spec=spec: plx.attention(*x, spec=spec, enable_gqa=True), backend="aot_eager")
        assert relative_error(call(q + shift, k + shift, v, *r), call(q, k, v, *r)) < 1e-9


def test_a_cap_on_iterations() -> None:
    for most, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_iterations"):
            plx.Solved(max_iterations=most)
    spec = plx.MESA.replace(mask_mod=CAUSAL, probe=plx.Solved(0.01, max_iterations=3))
    assert plx.AttentionSpec.from_json(spec.to_json()) == spec
    request = plx.AuxRequest(iterations=True, residual=True)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, return_aux=request)
    _, aux = torch.compile(call, backend="aot_eager", fullgraph=True)(*operands(spec))
    assert int(aux.iterations.max()) == 3 and float(aux.residual.max()) > 1e-3


def test_a_ridge_that_is_no_ridge() -> None:
    inputs = operands(plx.LLA)
    for ridge, message in ((0.0, "positive"), (torch.ones(7), "broadcast")):
        with pytest.raises(InputError, match=message):
            torch.compile(lambda *x, ridge=ridge: plx.attention(*x, spec=plx.LLA, enable_gqa=True, ridge=ridge))(
                *inputs
            )


def test_the_layer_takes_members_that_find_their_probe() -> None:
    layer = plx.nn.ParallaxAttention(16, 2, spec=plx.LLA, dtype=torch.float64)
    assert layer.r_proj is None
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_explain_counts_the_stage_in_front() -> None:
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    plan = plx.explain(plx.LLA.replace(mask_mod=CAUSAL), q, q, q, target="sm_90").plan
    assert [(stage.name, stage.direction) for stage in plan.stages] == [
        ("core_solve", "forward"),
        ("core_solve", "backward"),
        ("core_backward_query", "backward"),
        ("core_backward_key", "backward"),
    ]
    mesa = plx.explain(plx.MESA.replace(mask_mod=CAUSAL), q, q, q, target="sm_90", backward=False)
    assert [stage.name for stage in mesa.plan.stages] == [
        "scan_totals", "scan_states", "scan_systems", "scan_totals", "scan_product",
    ]  # fmt: skip
    longer = torch.randn(1, 2, 128, 16)
    twice = plx.explain(plx.MESA.replace(mask_mod=CAUSAL), longer, longer, longer, target="sm_90", backward=False)
    for one, two in zip(mesa.stages, twice.stages, strict=True):
        assert two.cost.flops == 2 * one.cost.flops
    windowed = plx.AFFINE_LINEAR.replace(mask_mod=plx.masks.sliding_window(8))
    uniform = plx.explain(windowed, q, q, q, q, target="sm_90", backward=False).plan.stages[0]
    assert uniform.products == (1, 2)
