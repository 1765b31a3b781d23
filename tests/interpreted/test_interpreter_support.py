"""The repairs of Triton's interpreter, and the memory that tells on kernels: checked before they check anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import interpreter, triton_interpreter
from support.memory import GuardedMemory, poison
from torch import Tensor

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

if interpreter.enabled():
    triton_interpreter.install()


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < n, other=0.0)
    y = tl.load(y_ptr + offset, mask=offset < n, other=0.0)
    z = tl.where(x > y, x * y + x, x - y)
    tl.store(out_ptr + offset, z, mask=offset < n)


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, N)
    tile = index[:, None] * N + index[None, :]
    total = tl.zeros([N, N], tl.float32)
    for step in tl.range(0, 2):
        offset = step.to(tl.int64) * N * N  # a tensor, as in compiled code
        total = tl.dot(tl.load(a_ptr + offset + tile), tl.load(b_ptr + offset + tile), total)
    tl.store(out_ptr + tile, total)


@triton.jit
def _write(out_ptr, first, last):  # type: ignore[no-untyped-def]
    for index in tl.range(first, last):
        tl.store(out_ptr + index, 1.0)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = torch.cat([torch.randn(4096) * 10.0**e for e in (-38, -3, 0, 3, 37)])
    special = torch.tensor(
        [1.9999999, -1.9999999, 3.9999998, 0.0, -0.0, float("inf"), -float("inf"), 1.00390625, 1.01171875]
    )
    values = torch.cat([values, special])
    want = values.to(torch.bfloat16)
    bits = triton_interpreter.narrowed(values.numpy())
    assert torch.equal(torch.from_numpy(bits.view(np.int16)), want.view(torch.int16))
    assert torch.equal(torch.from_numpy(triton_interpreter.widened(bits)), want.float())
    assert np.isnan(triton_interpreter.widened(triton_interpreter.narrowed(np.array([np.nan], np.float32)))).all()


def test_bfloat16_arithmetic_is_that_of_numbers() -> None:
    x, y = torch.randn(2, 50).to(torch.bfloat16)
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, 50, BLOCK=64)
    assert torch.equal(out, torch.where(x > y, x * y + x, x - y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_and_loops(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    _product[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out, (a.float() @ b.float()).sum(0), rtol=1e-5, atol=1e-5)


def test_memory_is_poisoned_and_guarded() -> None:
    memory = GuardedMemory()
    tensor = memory.empty_strided((4, 3), (6, 2), torch.float32)
    assert tensor.isnan().all() and tensor.stride() == (6, 2)
    copied = memory.copy(torch.ones(2, 1).expand(2, 5))
    assert copied.stride() == (1, 0) and torch.equal(copied, torch.ones(2, 5))
    assert memory.copy(torch.ones(0, 3)).shape == (0, 3)
    memory.check()


@pytest.mark.parametrize("first, last, where", [(0, 9, "behind"), (-1, 8, "before")])
def test_writes_outside_of_a_tensor_are_found(first: int, last: int, where: str) -> None:
    memory = GuardedMemory()
    tensor = memory.empty_strided((8,), (1,), torch.float32)
    _write[(1,)](tensor, first, last)
    with pytest.raises(AssertionError, match=where):
        memory.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool])
def test_poison_by_dtype(dtype: torch.dtype) -> None:
    filled: Tensor = poison(torch.zeros(3, dtype=dtype))
    assert filled.isnan().all() if dtype.is_floating_point else (filled != 0).all()


def test_ordinary_operations_around_the_kernel_run_too() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x).sum(-1, keepdim=True) * torch.erf(y) + (x @ y.mT).softmax(-1).mean()

    inputs = [torch.randn(5, 33, requires_grad=True), torch.randn(5, 33, requires_grad=True)]
    run = interpreter.run_generated(function, inputs)
    want = function(*inputs)
    torch.testing.assert_close(run.outputs, want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(want, inputs, interpreter.default_grad_outputs([want]))
    torch.testing.assert_close(run.grads, list(grads), rtol=1e-4, atol=1e-5)
