"""The generated kernels themselves, on the CPU: what Inductor would launch on a GPU, executed by Triton's interpreter.

Run as ``TRITON_INTERPRET=1 pytest tests/interpreted``: the interpreter must be chosen before triton is imported. Forward and
backward kernels run as autograd chains them, in poisoned and guarded memory, and are compared with an independent
computation in float64; the budget is the error of that computation in the tested dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import interpreter
from support.oracle import budget, leaves, low_precision, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

NO_INTERCEPT = plx.PARALLAX.replace(intercept=False)
SPECS = {"parallax": plx.PARALLAX, "no-intercept": NO_INTERCEPT, "softmax": plx.SOFTMAX}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STAGES = ["core_forward", "core_backward_query", "core_backward_key"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a call."""

    batch: int = 1
    q_heads: int = 2
    kv_heads: int = 2
    q_length: int = 128
    kv_length: int = 128
    width: int = 64
    value_width: int = 64

    def __str__(self) -> str:
        heads = f"H{self.q_heads}-{self.kv_heads}"
        return f"B{self.batch}-{heads}-L{self.q_length}-{self.kv_length}-D{self.width}-{self.value_width}"

    def operands(self, dtype: torch.dtype, probe: bool) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int, length: int, width: int) -> Tensor:
            return torch.randn(self.batch, heads, length, width, generator=generator).to(dtype)

        query = normal(self.q_heads, self.q_length, self.width)
        key = normal(self.kv_heads, self.kv_length, self.width)
        value = normal(self.kv_heads, self.kv_length, self.value_width)
        rho = 0.2 * normal(self.q_heads, self.q_length, self.width) if probe else None
        return [query, key, value, rho]


EVEN = Shape()
ODD = Shape(batch=2, q_heads=4, q_length=63, kv_length=111, width=60, value_width=36)
PADDED = Shape(batch=2, q_heads=4, kv_heads=4, q_length=333, kv_length=96, width=16, value_width=16)
BLOCKS = Shape(kv_heads=1, q_length=200, kv_length=200, width=32, value_width=32)  # 2 x 2 mask blocks

Mod = Callable[..., Tensor]
Make = Callable[..., tuple[Mod | None, Mod | None]]


def no_mods(*captured: Tensor) -> tuple[None, None]:
    return None, None


def captured_mods(slope: Tensor, gain: Tensor) -> tuple[Mod, Mod]:
    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + slope[h] * (q - k) * 0.02

    def covariance(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 4.0 * torch.tanh(s * 0.25) * gain[h, k]

    return score, covariance


def check(
    shape: Shape,
    spec: plx.AttentionSpec,
    dtype: torch.dtype,
    *,
    mods: Make = no_mods,
    captured: tuple[Tensor, ...] = (),
    mask: Any = None,
    stages: list[str] = STAGES,
    kernel_options: dict[str, Any] | None = None,
    **options: Any,
) -> interpreter.Interpreted:
    """Outputs and all gradients of the generated kernels within budget of float64."""
    inputs = shape.operands(dtype, spec.probe.kind != "zero")
    keep = None
    if mask is not None:
        index = torch.arange(shape.q_length)[:, None], torch.arange(shape.kv_length)
        keep = mask(torch.zeros((), dtype=torch.int), torch.zeros((), dtype=torch.int), *index)

    def oracle(kind: torch.dtype) -> list[Tensor]:
        own = leaves(captured, torch.float64 if kind == torch.float64 else torch.float32)
        score, covariance = mods(*own)
        plain = {"score": score, "covariance": covariance, "mask": keep, "intercept": spec.intercept}
        return with_gradients(lambda *x: low_precision(*x, **plain), leaves(inputs, kind), own)

    own = leaves(captured, torch.float32)
    score, covariance = mods(*own)

    def call(*tensors: Any) -> Tensor:
        return plx.attention(
            *tensors,
            spec=spec.replace(mask_mod=mask),
            score_mod=score,
            covariance_mod=covariance if spec.probe.kind != "zero" else None,
            enable_gqa=True,
            kernel_options=kernel_options,
        )

    compiled = interpreter.interpreted(call, **options)
    got = with_gradients(compiled, leaves(inputs, dtype), own)
    want, rough = oracle(torch.float64), oracle(dtype)
    names = [name for name, tensor in zip("qkvr", inputs, strict=True) if tensor is not None]
    for name, mine, exact, theirs in zip(("out", *names, "slope", "gain"), got, want, rough, strict=False):
        allowed = budget(relative_error(theirs, exact), dtype)
        if name in ("slope", "gain"):
            # Scattered with atomics, one pair after the other in float32; the oracle sums pairwise.
            allowed += 2.0**-23 * (shape.q_length * shape.kv_length) ** 0.5
        assert relative_error(mine, exact) <= allowed, f"{name}: {relative_error(mine, exact):.2e} > {allowed:.2e}"
    ran = [kernel.stage for name in compiled.launches for kernel in compiled.code.kernels if kernel.name == name]
    assert [stage for stage in ran if stage is not None] == stages
    return compiled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_members_in_every_dtype(spec: str, dtype: str) -> None:
    check(EVEN, SPECS[spec], DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_odd_sizes_shared_heads_and_cross_attention(spec: str, dtype: str) -> None:
    check(ODD, SPECS[spec], DTYPES[dtype])


def test_lengths_whose_rows_inductor_would_pad() -> None:
    # On a GPU Inductor pads strides of 1024 elements and more to multiples of 16; kernels index row terms densely.
    check(PADDED, SPECS["parallax"], torch.float32)  # which has them all


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    # The factor of the scores moves into the exponent, and past the maximum, only where it is positive.
    inputs = BLOCKS.operands(torch.float32, True)
    spec = plx.PARALLAX.replace(mask_mod=plx.masks.causal())

    def call(*tensors: Any) -> Tensor:
        return plx.attention(*tensors, spec=spec, scale=scale, enable_gqa=True)

    got = with_gradients(interpreter.interpreted(call), leaves(inputs, torch.float32), [])
    want = with_gradients(call, leaves(inputs, torch.float64), [])
    rough = with_gradients(call, leaves(inputs, torch.float32), [])
    for mine, theirs, exact in zip(got, rough, want, strict=True):
        if scale == 0.0 and not exact.any():  # the gradient of query
            assert not mine.any()
        else:
            assert relative_error(mine, exact) <= budget(relative_error(theirs, exact), torch.float32)


MASKS = {
    "causal": plx.masks.causal(),
    "offset": plx.masks.causal(offset=-40),
    "window": plx.masks.sliding_window(70),
    "prefix": plx.masks.prefix_lm(140),
    "documents": plx.masks.document((torch.arange(200) // 70).to(torch.int32)),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_visit_the_right_blocks(mask: str) -> None:
    # float32 shows every wrong pair; larger tiles than its own, which the interpreter runs faster.
    check(BLOCKS, plx.PARALLAX, torch.float32, mask=MASKS[mask], kernel_options={"BLOCK_M": 64, "BLOCK_N": 64})


@pytest.mark.parametrize("spec", ["parallax", "no-intercept"])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_mods_and_the_gradients_of_what_they_capture(spec: str, mask: str | None) -> None:
    shape = Shape(kv_heads=1, q_length=90, kv_length=90, width=32, value_width=32)
    captured = (torch.randn(2), torch.randn(2, 90))
    check(shape, SPECS[spec], torch.float32, mods=captured_mods, captured=captured, mask=MASKS[mask] if mask else None)


@pytest.mark.parametrize("candidate", [1, 2, 3])
def test_other_candidates(candidate: int) -> None:
    check(EVEN, plx.PARALLAX, torch.bfloat16, candidate=candidate)


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_other_targets(target: str) -> None:
    check(EVEN, plx.PARALLAX, torch.bfloat16, target=target)


def test_symbolic_lengths_serve_other_lengths_without_new_code() -> None:
    compiled = check(ODD, plx.PARALLAX, torch.float32, dynamic=True)
    longer = Shape(batch=2, q_heads=4, q_length=77, kv_length=130, width=60, value_width=36)
    inputs = longer.operands(torch.float32, True)
    got = with_gradients(compiled, leaves(inputs, torch.float32))
    want = with_gradients(lambda *x: low_precision(*x), leaves(inputs, torch.float64))
    assert max(map(relative_error, got, want)) < 1e-5
    assert len(compiled.code.graphs) == 2


def test_run_generated_gives_outputs_and_gradients_in_one_call() -> None:
    inputs = EVEN.operands(torch.float32, True)
    run = interpreter.run_generated(lambda *x: plx.attention(*x), inputs)
    exact = leaves(inputs, torch.float64)
    out = low_precision(*exact)
    grads = torch.autograd.grad(out, exact, [grad.double() for grad in interpreter.default_grad_outputs([run.outputs])])
    assert relative_error(run.outputs, out.detach()) < 1e-5
    assert max(relative_error(mine, want) for mine, want in zip(run.grads, grads, strict=True)) < 1e-5  # type: ignore[arg-type]
    assert run.stages == STAGES
    forward = interpreter.run_generated(lambda *x: plx.attention(*x), inputs, backward=False)
    assert forward.stages == STAGES[:1] and forward.grads == [None] * 4
