"""The warp-specialised kernels as generated, their partitions run as threads on the CPU (support/gluon_interpreter.py)."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from parallax_compile.lowering import inductor_kernels
from support import gluon_interpreter, interpreter
from support.oracle import budget, leaves, low_precision, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

SPECS = {"parallax": plx.PARALLAX, "no-intercept": plx.PARALLAX.replace(intercept=False), "softmax": plx.SOFTMAX}
SPECIALIZED = {"WARP_SPECIALIZED": True}
STAGES = ("core_forward", "core_backward_query", "core_backward_key")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two persistent programs, so that each takes several items; and Gluon in a process that cannot compile it."""
    monkeypatch.setattr(inductor_kernels, "has_gluon", lambda: True)
    monkeypatch.setattr(inductor_kernels, "_multiprocessors", lambda device: 2)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each product of a group."""
    found: list[int] = []
    product = gluon_interpreter._Machine.product
    counted = lambda *x, **more: (found.append(1), product(*x, **more))[1]
    monkeypatch.setattr(gluon_interpreter._Machine, "product", counted)
    return found


def operands(probe: bool, rows: int, keys: int, width: int, value_width: int, offset: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = lambda heads, length, size: torch.randn(1, heads, length, size, generator=generator, dtype=torch.float64)
    q, k, v, r = (
        make(4, rows, width),
        make(2, keys, width) + offset,
        make(2, keys, value_width),
        make(4, rows, width) * 0.3,
    )
    return [tensor.to(torch.bfloat16) for tensor in ((q, k, v, r) if probe else (q, k, v))]


def compute(function: Any, inputs: list[Tensor], dtype: torch.dtype, grads: bool) -> list[Tensor]:
    if grads:
        return with_gradients(function, leaves(inputs, dtype))
    with torch.no_grad():
        return [function(*(tensor.to(dtype) for tensor in inputs))]


@pytest.mark.parametrize(
    "spec, mask, sizes, grads",
    [
        ("parallax", "causal", (300, 300, 64, 64), True),
        ("parallax", "window", (130, 264, 80, 48), True),
        ("no-intercept", "causal", (130, 130, 128, 128), True),  # weights kept in 16 bits, in the backward
        ("softmax", "documents", (300, 300, 64, 64), True),
        ("softmax", "none", (70, 140, 96, 40), True),
        ("parallax", "none", (129, 65, 128, 128), False),
    ],
)
def test_the_specialised_kernels(spec: str, mask: str, sizes: tuple, grads: bool) -> None:
    rows, keys = sizes[:2]
    index, other = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    documents = torch.arange(max(rows, keys)) // 70
    mask_mod, keep = {
        "causal": (plx.masks.causal(), index >= other),
        "window": (plx.masks.sliding_window(50), (index >= other) & (index - other < 50)),
        "documents": (plx.masks.document(documents), documents[:rows, None] == documents[None, :keys]),
        "none": (None, None),
    }[mask]
    declared = SPECS[spec].replace(mask_mod=mask_mod)
    inputs = operands(spec != "softmax", *sizes)

    def oracle(q: Tensor, k: Tensor, v: Tensor, r: Tensor | None = None) -> Tensor:
        return low_precision(q, k, v, r, mask=keep, intercept=declared.intercept)

    call = interpreter.interpreted(
        lambda *x: plx.attention(*x, spec=declared, enable_gqa=True, kernel_options=SPECIALIZED)
    )
    want = compute(oracle, inputs, torch.float64, grads)
    rough = compute(oracle, inputs, torch.bfloat16, grads)
    got = compute(call, inputs, torch.bfloat16, grads)
    for mine, exact, theirs in zip(got, want, rough, strict=True):
        assert relative_error(mine, exact) <= budget(relative_error(theirs, exact), torch.bfloat16)
    for stage in STAGES if grads else STAGES[:1]:
        kernel = call.code.stage(stage)
        assert "@gluon.jit" in kernel.source
        assert kernel.name in call.launches


_BIAS = torch.linspace(-1.0, 1.0, 4)


def _captured_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + _BIAS[h] * 0.1 * (q - k)


@pytest.mark.parametrize(
    "spec, score, covariance, width",
    [
        ("parallax", plx.mods.alibi(4), plx.mods.tanh_cap(2.0, approx=True), 128),  # slopes kept in 16 bits
        ("no-intercept", plx.mods.tanh_cap(2.0, approx=True), plx.mods.scale_by(0.5), 64),
        ("parallax", _captured_bias, lambda s, b, h, q, k: s + 0.01 * q, 128),  # nothing but sums: no slopes
        ("softmax", plx.mods.tanh_cap(2.0, approx=True), None, 128),
    ],
)
def test_mods_of_arithmetic(spec: str, score: Any, covariance: Any, width: int) -> None:
    declared = SPECS[spec].replace(mask_mod=plx.masks.causal())
    inputs = operands(spec != "softmax", 150, 150, width, width)
    index, other = torch.arange(150)[:, None], torch.arange(150)[None, :]

    def oracle(q: Tensor, k: Tensor, v: Tensor, r: Tensor | None = None) -> Tensor:
        return low_precision(
            q, k, v, r, mask=index >= other, intercept=declared.intercept, score=score, covariance=covariance
        )

    call = interpreter.interpreted(
        lambda *x: plx.attention(
            *x, spec=declared, score_mod=score, covariance_mod=covariance, enable_gqa=True, kernel_options=SPECIALIZED
        )
    )
    want = compute(oracle, inputs, torch.float64, True)
    rough = compute(oracle, inputs, torch.bfloat16, True)
    got = compute(call, inputs, torch.bfloat16, True)
    for mine, exact, theirs in zip(got, want, rough, strict=True):
        assert relative_error(mine, exact) <= budget(relative_error(theirs, exact), torch.bfloat16)
    assert all("@gluon.jit" in call.code.stage(stage).source for stage in STAGES)


@pytest.mark.parametrize(
    "spec, width, dtype, score, growth",
    [
        ("parallax", 64, torch.bfloat16, None, 0.3),  # no more than the limit; the others grow past it
        ("softmax", 64, torch.float16, None, 1.0),
        ("parallax", 64, torch.bfloat16, None, 2.0),
        ("parallax", 128, torch.bfloat16, plx.mods.alibi(4), 2.0),
        ("softmax", 128, torch.bfloat16, None, 2.0),
    ],
)
def test_weights_may_be_above_one_until_their_level_follows(
    spec: str, width: int, dtype: torch.dtype, score: Any, growth: float, products: list[int]
) -> None:
    """Maxima that grow from block to block: so little that each row keeps its first block's level, and by more."""
    length = 259
    q, k, *rest = operands(spec != "softmax", length, length, width, width)
    q, k = q.abs(), k.abs() * (1.0 + growth * torch.arange(length)[:, None] / 64).to(k.dtype)
    inputs = [tensor.to(dtype) for tensor in (q, k, *rest)]

    def attend(*x: Tensor) -> tuple[Tensor, Any]:
        request = plx.AuxRequest(lse=True)
        options = {"score_mod": score, "return_aux": request, "kernel_options": SPECIALIZED}
        return plx.attention(*x, spec=SPECS[spec], enable_gqa=True, **options)

    call = interpreter.interpreted(attend)
    with torch.no_grad():
        out, aux = call(*inputs)
        exact, exact_aux = attend(*(tensor.double() for tensor in inputs))
        rough = low_precision(*inputs, score=score)
    # Tiles of 128 rows of four heads, groups, products of a step: and scores that were made again.
    steps = -(-length // call.code.stage("core_forward").parameters["BLOCK_N"])
    again = len(products) - 3 * 4 * 2 * (4 if spec == "parallax" else 2) * steps
    assert again == 0 if growth < 1.0 else again > 0
    assert relative_error(aux.lse, exact_aux.lse) < 1e-5
    assert relative_error(out, exact) <= budget(relative_error(rough, exact), dtype)


def test_no_block_of_a_window_is_multiplied_twice(products: list[int]) -> None:
    """Each row has a key in the first step, and with it a level that holds."""
    spec = plx.PARALLAX.replace(mask_mod=plx.masks.sliding_window(200))
    call = interpreter.interpreted(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, kernel_options=SPECIALIZED))
    with torch.no_grad():
        call(*operands(True, 512, 512, 64, 64))
    distance = torch.arange(512)[:, None] - torch.arange(512)
    blocks = int(((distance >= 0) & (distance < 200)).view(4, 128, 4, 128).any(3).any(1).sum())
    steps = blocks * 128 // call.code.stage("core_forward").parameters["BLOCK_N"]
    # Heads, groups, products.
    assert len(products) == 4 * 2 * 4 * steps


def test_a_row_without_a_key_and_the_statistics() -> None:
    inputs = operands(True, 140, 140, 64, 64)
    spec = plx.PARALLAX.replace(mask_mod=plx.masks.causal(offset=-10))
    request = plx.AuxRequest(lse=True, probe_mean=True)
    call = interpreter.interpreted(
        lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, return_aux=request, kernel_options=SPECIALIZED)
    )
    with torch.no_grad():
        out, aux = call(*inputs)
        exact, exact_aux = plx.attention(*(t.double() for t in inputs), spec=spec, enable_gqa=True, return_aux=request)
    assert (out[:, :, :10] == 0).all()
    assert (aux.lse[:, :, :10] == float("-inf")).all()
    assert (aux.probe_mean[:, :, :10] == 0).all()
    assert relative_error(aux.lse[:, :, 10:], exact_aux.lse[:, :, 10:]) < 1e-5
    assert relative_error(aux.probe_mean, exact_aux.probe_mean) < 1e-5
    assert relative_error(out, exact) < 4e-3


def test_a_row_without_a_key_has_no_gradient_and_a_key_without_a_row_neither() -> None:
    spec = plx.PARALLAX.replace(mask_mod=plx.masks.causal(offset=-70))
    call = interpreter.interpreted(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, kernel_options=SPECIALIZED))
    out, dq, dk, dv, dr = with_gradients(call, leaves(operands(True, 200, 200, 64, 64), torch.bfloat16))
    assert out.isfinite().all()
    for grad, rows in ((dq, slice(None, 70)), (dr, slice(None, 70)), (dk, slice(130, None)), (dv, slice(130, None))):
        assert grad.isfinite().all()
        assert (grad[:, :, rows] == 0).all()
        assert (grad.abs().sum(-1) > 0).any()


def test_a_tile_of_queries_without_a_step_has_no_gradient() -> None:
    """Queries that padding masks: whole tiles of them, which come first, before any tile has visited a key."""
    spec = plx.PARALLAX.replace(mask_mod=lambda b, h, q, k: (q >= k) & (q < 100))
    call = interpreter.interpreted(lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, kernel_options=SPECIALIZED))
    found = with_gradients(call, leaves(operands(True, 200, 200, 64, 64), torch.bfloat16))
    assert all(tensor.isfinite().all() for tensor in found)
    out, dq, _, _, dr = found
    for tensor in (out, dq, dr):
        assert (tensor[:, :, 100:] == 0).all()
        assert (tensor[:, :, 1:100].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("spec, probes", [("parallax", 1.0), ("parallax", 300.0), ("no-intercept", 1e-3)])
def test_what_waits_in_16_bits_costs_no_accuracy(spec: str, probes: float) -> None:
    """Nor where weights times probe scores are large (a tenth of the limit), or small, as in the first steps of training."""
    q, k, v, r = operands(True, 192, 192, 128, 128)
    inputs = [q, k, v, r * probes]
    attend = functools.partial(plx.attention, spec=SPECS[spec], enable_gqa=True)
    want = with_gradients(attend, leaves(inputs, torch.float64))

    def errors(specialized: bool) -> list[float]:
        options = {"bwd_WARP_SPECIALIZED": specialized}
        call = interpreter.interpreted(lambda *x: attend(*x, kernel_options=options))
        got = with_gradients(call, leaves(inputs, torch.bfloat16))
        return [relative_error(mine, exact) for mine, exact in zip(got, want, strict=True)]

    for mine, triton in zip(errors(True), errors(False), strict=True):
        assert mine <= 1.08 * triton


@pytest.mark.parametrize("width", [64, 128])
def test_keys_with_an_offset_cost_no_accuracy(width: int) -> None:
    """Above a quarter of their deviation the kernel takes back what rounding leaves in a row; below, that is nothing to see."""

    def errors(offset: float) -> list[float]:
        inputs = operands(True, 128, 128, width, width, offset)
        call = interpreter.interpreted(lambda *x: plx.attention(*x, enable_gqa=True, kernel_options=SPECIALIZED))
        want = with_gradients(lambda *x: plx.attention(*x, enable_gqa=True), leaves(inputs, torch.float64))
        got = with_gradients(call, leaves(inputs, torch.bfloat16))
        return [relative_error(mine, exact) for mine, exact in zip(got, want, strict=True)]

    near = errors(0.0)
    for offset in (0.2, 10.0):
        assert all(far <= 1.5 * close for far, close in zip(errors(offset), near, strict=True)), offset


def test_an_offset_of_one_number_costs_no_accuracy() -> None:
    """The gradient of the query's own number has no share in the whole one's norm that would show it."""
    q, k, v, r = operands(True, 128, 128, 64, 64)
    k[..., 3] = 2 + 0.1 * k[..., 3]
    inputs = [q, k, v, r]
    want = with_gradients(lambda *x: plx.attention(*x, enable_gqa=True), leaves(inputs, torch.float64))[1]

    def error(specialized: bool) -> float:
        options = {"bwd_WARP_SPECIALIZED": specialized}
        call = interpreter.interpreted(lambda *x: plx.attention(*x, enable_gqa=True, kernel_options=options))
        return relative_error(with_gradients(call, leaves(inputs, torch.bfloat16))[1][..., 3], want[..., 3])

    assert error(True) <= 1.5 * error(False)


@pytest.mark.parametrize(
    "mask, ridge, intercept, sizes, also",
    [
        ("causal", 0.01, True, (130, 130, 64, 48), ""),  # with the adjoint's refinement
        ("window", 0.1, True, (130, 130, 128, 128), "mean"),
        ("none", 0.1, False, (70, 140, 40, 64), "score"),
        ("causal", 1.0, True, (100, 100, 32, 32), "covariance"),  # no output here: the solution's gradient is given
    ],
)
def test_the_solver(mask: str, ridge: float, intercept: bool, sizes: tuple, also: str) -> None:
    """Output and gradients of the solver for Hopper, forward and adjoint, with what else can be asked of it."""
    mask_mod = {"causal": plx.masks.causal(), "window": plx.masks.sliding_window(50), "none": None}[mask]
    spec = plx.LLA.replace(probe=plx.Solved(ridge), mask_mod=mask_mod, intercept=intercept)
    mods: dict[str, Any] = {"score_mod": plx.mods.alibi(2)} if also == "score" else {}
    mods |= {"covariance_mod": plx.mods.tanh_cap(9.0)} if also == "covariance" else {}
    query, *rest = operands(False, *sizes)
    inputs = [query[:, :2], *(tensor[:, :1] for tensor in rest)]

    def attend(*x: Tensor) -> Tensor:
        options = {"solve_WARP_SPECIALIZED": True}
        request = plx.AuxRequest(lse=True, probe_mean=True)
        found = plx.attention(*x, spec=spec, enable_gqa=True, kernel_options=options, return_aux=request, **mods)
        out, aux = found
        return out + (aux.lse + aux.probe_mean)[..., None].to(out.dtype) if also == "mean" else out

    call = interpreter.interpreted(attend)
    want = compute(attend, inputs, torch.float64, True)
    got = compute(call, inputs, torch.bfloat16, True)
    # The solver stops at the residual of a tolerance: what is left are two roundings to bfloat16, of weights and of the result.
    assert max(relative_error(mine, exact) for mine, exact in zip(got, want, strict=True)) < 2 * 2.0**-8
    solvers = [kernel for kernel in call.code.kernels if kernel.stage == "core_solve"]
    assert len(solvers) == 2 and all("@gluon.jit" in kernel.source for kernel in solvers)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"score_mod": plx.mods.tanh_cap(9.0)}, "WARP_SPECIALIZED"),
        ({"scale": -1.0}, "WARP_SPECIALIZED"),
        ({"kernel_options": {"fwd_WARP_SPECIALIZED": True, "fwd_BLOCK_M": 128}}, "must be 64"),
        ({"kernel_options": {"bwd_key_WARP_SPECIALIZED": True, "bwd_key_BLOCK_N": 32}}, "must be 64"),
        ({"kernel_options": {"bwd_WARP_SPECIALIZED": True}, "score_mod": plx.mods.tanh_cap(9.0)}, "WARP_SPECIALIZED"),
    ],
)
def test_what_it_cannot_compute_raises(change: dict[str, Any], message: str) -> None:
    call = interpreter.interpreted(
        lambda *x: plx.attention(*x, **({"enable_gqa": True, "kernel_options": SPECIALIZED} | change))
    )
    with pytest.raises(Exception, match=message):
        call(*leaves(operands(False, 64, 64, 32, 32), torch.bfloat16)).sum().backward()


@pytest.mark.parametrize("only", ["key", "value", "probe"])
def test_a_backward_of_one_gradient_is_left_to_triton(only: str) -> None:
    names = ("query", "key", "value", "probe")
    inputs = [
        tensor.requires_grad_(name == only) for tensor, name in zip(operands(True, 64, 64, 32, 32), names, strict=True)
    ]
    stage = "query" if only == "probe" else "key"
    call = interpreter.interpreted(
        lambda *x: plx.attention(*x, enable_gqa=True, kernel_options={f"bwd_{stage}_WARP_SPECIALIZED": True})
    )
    with pytest.raises(Exception, match="all gradients that a backward stage computes"):
        call(*inputs).sum().backward()
