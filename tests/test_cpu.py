"""The compiled path on CPU: values, gradients, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support.oracle import budget, leaves, low_precision, relative_error, with_gradients
from torch import Tensor

import parallax_compile as plx

CAUSAL = plx.masks.causal()
SHAPES = {
    "one chunk": (2, 4, 4, 60, 60, 16, 16),
    "odd, GQA": (1, 4, 2, 333, 333, 20, 24),
    "cross": (1, 2, 1, 600, 41, 1, 3),
}


def operands(shape: tuple[int, ...], probe: bool) -> list[Tensor | None]:
    batch, heads, kv_heads, rows, columns, width, value_width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, dtype=torch.float64)

    found = [normal(heads, rows, width), normal(kv_heads, columns, width), normal(kv_heads, columns, value_width)]
    return [*found, normal(heads, rows, width) if probe else None]


def check(call: Any, independent: Any, base: list[Tensor | None], dtype: torch.dtype, captured: Any = ()) -> None:
    """``call`` compiled and ``independent``, each in ``dtype``, against ``independent`` in float64."""
    twins = [tensor.detach().double().requires_grad_() for tensor in captured]
    want = with_gradients(lambda *x: independent(twins, *x), leaves(base, torch.float64), twins)
    rough = with_gradients(lambda *x: independent(captured, *x), leaves(base, dtype), captured)
    compiled = torch.compile(lambda *x: call(captured, *x), fullgraph=True)
    got = with_gradients(compiled, leaves(base, dtype), captured)
    for mine, theirs, exact in zip(got, rough, want, strict=True):
        # The error of a few sums depends on their order, which threads change.
        chance = 2.0 if exact.numel() < 16 else 1.0
        assert relative_error(mine, exact) <= chance * budget(relative_error(theirs, exact), dtype)


MEMBERS = {
    "parallax-fp32": (plx.PARALLAX, torch.float32, SHAPES),
    "parallax-bf16": (plx.PARALLAX, torch.bfloat16, ["odd, GQA"]),
    "no intercept-fp16": (plx.PARALLAX.replace(intercept=False), torch.float16, ["one chunk", "cross"]),
    "softmax-fp32": (plx.SOFTMAX, torch.float32, ["odd, GQA"]),
}


# Every member and dtype in the loop over chunks, a low precision without it too, and every shape in float32.
@pytest.mark.parametrize(("member", "shape"), [(name, shape) for name in MEMBERS for shape in MEMBERS[name][2]])
def test_members(member: str, shape: str) -> None:
    spec, dtype, _ = MEMBERS[member]
    base = operands(SHAPES[shape], spec.probe.kind == "learned")
    rows, columns = SHAPES[shape][3:5]
    mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    check(
        lambda _, *x: plx.attention(*x, spec=spec.replace(mask_mod=CAUSAL), enable_gqa=True),
        lambda _, *x: low_precision(*x, intercept=spec.intercept, mask=mask),
        base,
        dtype,
    )


def test_mods_with_captured_gradients_and_empty_rows() -> None:
    captured = [torch.randn(4, requires_grad=True), torch.randn(4, 300, requires_grad=True)]
    mask = torch.ones(300, 300, dtype=torch.bool).tril(-30)

    def mods(tensors: Any) -> tuple[Any, Any]:
        return (
            lambda s, b, h, i, j: s + tensors[0][h] * (i - j) * 0.05,
            lambda s, b, h, i, j: torch.tanh(s) * tensors[1][h, j] + 0.1,
        )

    def call(tensors: Any, *x: Tensor) -> Tensor:
        score, covariance = mods(tensors)
        spec = plx.PARALLAX.replace(mask_mod=plx.masks.causal(-30))
        return plx.attention(*x, spec=spec, score_mod=score, covariance_mod=covariance, enable_gqa=True)

    def independent(tensors: Any, *x: Tensor) -> Tensor:
        score, covariance = mods(tensors)
        return low_precision(*x, score=score, covariance=covariance, mask=mask)

    check(call, independent, operands((1, 4, 2, 300, 300, 16, 16), True), torch.float32, captured)


def test_one_compile_serves_every_length_and_statistics_have_gradients() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def call(*x: Tensor) -> Tensor:
        out, aux = plx.attention(*x, return_aux=plx.AuxRequest(lse=True, probe_mean=True))
        return out + aux.lse[..., None] + 0.5 * aux.probe_mean[..., None]

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for length in (70, 300, 513):
        base = leaves(operands((1, 2, 2, length, length, 16, 16), True), torch.float64)
        got, want = with_gradients(compiled, base), with_gradients(call, base)
        assert max(map(relative_error, got, want)) < 1e-11
    assert counter.frame_count == 1


def test_autocast_and_views_and_sums() -> None:
    inputs = [torch.randn(2, 70, 4, 16).transpose(1, 2).requires_grad_() for _ in range(4)]
    key = torch.randn(2, 1, 70, 16, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return plx.attention(q, k.expand(2, 4, 70, 16), v, r)

    compiled = torch.compile(call, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(inputs[0], key, *inputs[2:])
        want = call(inputs[0], key, *inputs[2:])
    assert out.dtype == want.dtype == torch.bfloat16
    assert relative_error(out, want) < 2e-2
    out = compiled(inputs[0], key, *inputs[2:])
    assert out.stride() == inputs[0].stride()
    leaves_ = (inputs[0], key, *inputs[2:])
    got = torch.autograd.grad(out.sum(), leaves_)
    want = torch.autograd.grad(call(*leaves_).sum(), leaves_)
    assert max(map(relative_error, got, want)) < 1e-5


PEAK = """
import resource, sys, torch
import parallax_compile as plx
length = int(sys.argv[1])
call = torch.compile(lambda *x: plx.attention(*x), fullgraph=True, dynamic=True)
def run(n):
    inputs = [torch.randn(1, 1, n, 64, requires_grad=True) for _ in range(4)]
    call(*inputs).sum().backward()
run(600)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(length)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_grows_with_the_length_not_its_square(tmp_path: Path) -> None:
    length, program = 16384, tmp_path / "peak.py"
    program.write_text(PEAK)
    command = [sys.executable, Path(__file__).parent / "support" / "cpp_kernels.py", program, str(length)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = float(ran.stdout.splitlines()[-1])
    square = length**2 * 4 / 2**20  # one score matrix, MB
    assert grown < square / 4, f"grew by {grown:.0f} MB; one score matrix has {square:.0f} MB"
