"""The operator through Dynamo, AOTAutograd, export and checkpointing, on the backends that need no lowering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support.oracle import jvp_oracle, leaves, low_precision, relative_error, with_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import parallax_compile as plx

BACKENDS = ["eager", "aot_eager"]


def operands(
    batch: int = 2, q_heads: int = 4, kv_heads: int = 2, q_length: int = 37, kv_length: int = 41, width: int = 12
) -> list[Tensor]:
    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, width, dtype=torch.float64, requires_grad=True)

    return [
        normal(q_heads, q_length),
        normal(kv_heads, kv_length),
        normal(kv_heads, kv_length),
        normal(q_heads, q_length),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", [plx.PARALLAX, plx.PARALLAX.replace(intercept=False), plx.SOFTMAX], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_equals_the_reference_with_mods_masks_and_captured_gradients(
    backend: str, spec: plx.AttentionSpec, dynamic: bool
) -> None:
    inputs = operands()
    slope = torch.randn(4, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    documents = torch.arange(64) // 17
    probe = spec.probe.kind == "learned"

    def score_mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + slope[h] * (q - k) * 0.1

    def covariance_mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(s) * gain[h, k] + 0.3

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[q] == documents[k])

    mask = plx.masks.block_mask(mask_mod, None, None, 37, 41, "cpu", BLOCK_SIZE=16)

    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return plx.attention(
            q, k, v, r if probe else None, spec=spec, score_mod=score_mod,
            covariance_mod=covariance_mod if probe else None, block_mask=mask, enable_gqa=True,
        )  # fmt: skip

    captured = [slope, gain] if probe else [slope]
    inputs = inputs if probe else [*inputs[:3], None]
    want = with_gradients(call, inputs, captured)
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)
    got = with_gradients(compiled, inputs, captured)
    assert max(map(relative_error, got, want)) < 1e-11


@dataclass(frozen=True)
class Shifted:
    """A user's mod: neither a function nor one of the library."""

    by: float

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - self.by * (q_idx - kv_idx)


@pytest.mark.parametrize("make", [lambda: plx.mods.alibi(2), lambda: Shifted(0.5)], ids=["library", "user"])
def test_mods_that_the_compiled_function_makes(make: Callable[[], Any]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return plx.attention(q, k, v, r, spec=plx.PARALLAX.replace(score_mod=make(), mask_mod=plx.masks.causal()))

    inputs = [torch.randn(1, 2, 16, 8, dtype=torch.float64) for _ in range(4)]
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), call(*inputs))


def test_reference_and_operator_agree_with_the_jvp_oracle() -> None:
    q, k, v, r = operands()
    mask = torch.ones(37, 41, dtype=torch.bool).tril()
    block_mask = plx.masks.block_mask(plx.masks.causal(), None, None, 37, 41, "cpu")
    want = with_gradients(lambda *x: jvp_oracle(*x, mask, 12**-0.5), [q, k, v, r])
    call = lambda *x: plx.attention(*x, block_mask=block_mask, enable_gqa=True)
    assert max(map(relative_error, with_gradients(call, [q, k, v, r]), want)) < 1e-11
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert max(map(relative_error, with_gradients(compiled, [q, k, v, r]), want)) < 1e-11


@pytest.mark.parametrize("intercept", [True, False])
def test_gradients_of_lse_and_probe_mean(intercept: bool) -> None:
    inputs = operands()
    spec = plx.PARALLAX.replace(intercept=intercept, mask_mod=plx.masks.causal(offset=-3))
    weights = torch.randn(3, 2, 4, 37, 12, dtype=torch.float64)

    def call(*x: Tensor) -> Tensor:
        request = plx.AuxRequest(lse=True, probe_mean=True)
        out, aux = plx.attention(*x, spec=spec, return_aux=request, enable_gqa=True)
        lse = torch.where(aux.lse.isinf(), 0.0, aux.lse)
        return out * weights[0] + lse[..., None] * weights[1] + aux.probe_mean[..., None] * weights[2]

    want = with_gradients(call, inputs)
    got = with_gradients(torch.compile(call, backend="aot_eager", fullgraph=True), inputs)
    assert max(map(relative_error, got, want)) < 1e-10


def test_one_graph_for_every_length_once_dynamic() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *x: plx.attention(*x, enable_gqa=True), backend=counter, fullgraph=True, dynamic=True
    )
    for length in (24, 40, 57):
        compiled(*operands(q_length=length, kv_length=length))
    assert counter.frame_count == 1


def test_checkpointing_recomputes_the_operator() -> None:
    inputs = operands()
    call = lambda *x: plx.attention(*x, enable_gqa=True)
    want = with_gradients(call, inputs)
    saved = torch.compile(lambda *x: checkpoint(call, *x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert max(map(relative_error, with_gradients(saved, inputs), want)) < 1e-11


def test_strict_export_keeps_the_operator() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
            return plx.attention(q, k, v, r, score_mod=lambda s, b, h, i, j: s + self.slope[h], enable_gqa=True)

    model, inputs = Model(), [tensor.detach() for tensor in operands()]
    exported = torch.export.export(model, tuple(inputs), strict=True)
    assert "parallax_attention" in exported.graph_module.code
    assert relative_error(exported.module()(*inputs), model(*inputs)) < 1e-12


def test_only_some_inputs_require_gradients() -> None:
    for position in range(4):
        inputs = operands()
        for i, tensor in enumerate(inputs):
            tensor.requires_grad_(i == position)
        call = lambda *x: plx.attention(*x, enable_gqa=True)
        want = with_gradients(call, inputs)
        got = with_gradients(torch.compile(call, backend="aot_eager", fullgraph=True), inputs)
        assert max(map(relative_error, got, want)) < 1e-11


def test_inputs_without_gradients_and_no_grad() -> None:
    inputs = leaves(operands(), torch.float64, requires_grad=False)
    call = lambda *x: plx.attention(*x, enable_gqa=True)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(*inputs), call(*inputs)) < 1e-12
    with torch.no_grad():
        assert relative_error(compiled(*operands()), compiled(*operands())) >= 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_empty_batch_rows_and_keys(backend: str) -> None:
    for sizes in ({"batch": 0}, {"q_length": 0}, {"kv_length": 0}):
        inputs = operands(**sizes)
        call = lambda *x: plx.attention(*x, enable_gqa=True)
        torch._dynamo.reset()
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        for function in (call, compiled):
            out = function(*inputs)
            assert out.shape == (*inputs[0].shape[:3], 12)
            assert not out.any()
            for gradient in torch.autograd.grad(out.sum(), inputs):
                assert not gradient.any()


def test_low_precision_oracle_is_the_definition() -> None:
    inputs = operands()
    mask = torch.ones(37, 41, dtype=torch.bool).tril()
    block_mask = plx.masks.block_mask(plx.masks.causal(), None, None, 37, 41, "cpu")
    got = low_precision(*inputs, mask=mask)
    assert relative_error(got, plx.attention(*inputs, block_mask=block_mask, enable_gqa=True)) < 1e-12
