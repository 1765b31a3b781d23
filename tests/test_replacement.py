"""``replace_sdpa``: the calls of a model computed by another member, with everything they asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.oracle import relative_error
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import parallax_compile as plx
from parallax_compile import replacement
from parallax_compile.errors import InputError, InputTypeError, UnsupportedError
from parallax_compile.replacement import replacing, without_fast_path


def replaced(function: Any, spec: plx.AttentionSpec) -> Any:
    """As ``parallax_compile`` replaces, through a backend that compiles nothing: what the graph says, exactly and at once."""
    return without_fast_path(torch.compile(replacing(function, spec), backend="aot_eager", fullgraph=True))


def inputs(rows: int = 12, columns: int = 17, heads: int = 4, kv_heads: int = 4) -> list[Tensor]:
    shapes = ((heads, rows), (kv_heads, columns), (kv_heads, columns))
    return [torch.randn(2, h, length, 8, dtype=torch.float64, requires_grad=True) for h, length in shapes]


BOOL = torch.rand(12, 17, generator=torch.Generator().manual_seed(0)) > 0.3
CALLS: dict[str, dict[str, Any]] = {
    "causal, other lengths": {"is_causal": True, "scale": 0.2},
    "bool mask": {"attn_mask": BOOL},
    "float mask": {"attn_mask": torch.randn(2, 1, 12, 17, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", CALLS)
def test_softmax_in_its_own_place_changes_nothing(name: str) -> None:
    tensors, options = inputs(), CALLS[name]
    call = lambda *x: F.scaled_dot_product_attention(*x, **options)
    want = call(*tensors)
    got = replaced(call, plx.SOFTMAX)(*tensors)
    assert relative_error(got, want) < 1e-12
    weights = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, tensors, weights), torch.autograd.grad(want, tensors, weights), strict=True
    ):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("name", CALLS)
def test_local_linear_attention_in_its_place(name: str) -> None:
    tensors, options = inputs(kv_heads=2), CALLS[name]
    call = lambda *x: F.scaled_dot_product_attention(*x, **options, enable_gqa=True)
    got = replaced(call, plx.LLA)(*tensors)
    keep = options.get("attn_mask", torch.ones(12, 17, dtype=torch.bool).tril())
    bias = torch.where(keep, 0.0, -float("inf")) if keep.dtype == torch.bool else keep
    want = plx.attention(
        *tensors, spec=plx.LLA, enable_gqa=True, scale=options.get("scale"), score_mod=_added(bias.expand(2, 4, 12, 17))
    )
    assert relative_error(got, want) < 1e-10


def _added(bias: Tensor) -> Any:
    return lambda s, b, h, i, j: s + bias[b, h, i, j]


def test_a_bool_mask_at_infinite_bandwidth() -> None:
    tensors = inputs()
    call = lambda *x: F.scaled_dot_product_attention(*x, attn_mask=BOOL)
    got = replaced(call, plx.VALUE_AVERAGE)(*tensors)
    weights = BOOL.double() / BOOL.sum(-1, keepdim=True)
    assert relative_error(got, weights @ tensors[2]) < 1e-12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_module_keeps_its_weights_and_its_own_forward() -> None:
    layer = Attention()
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    plain = layer(x)
    twin = plx.parallax_compile(layer, fullgraph=True, replace_sdpa=plx.SOFTMAX)
    assert list(twin.state_dict()) == list(layer.state_dict())
    with torch.no_grad():
        assert relative_error(twin(x), plain) < 1e-12
    assert relative_error(replaced(Attention.forward, plx.LLA)(layer, x), plain) > 1e-3
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("leading", [(), (6,), (2, 3, 2)], ids=["none", "heads", "batches"])
def test_other_numbers_of_dimensions(leading: tuple[int, ...]) -> None:
    tensors = [torch.randn(*leading, length, 8, dtype=torch.float64) for length in (12, 17, 17)]
    call = lambda *x: F.scaled_dot_product_attention(*x, attn_mask=BOOL)
    assert relative_error(replaced(call, plx.SOFTMAX)(*tensors), call(*tensors)) < 1e-12


class Cached(nn.Module):
    """Attention over a cache of fixed size that is filled in place, as serving code does it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48, dtype=torch.float64)
        self.register_buffer("keys", torch.zeros(1, 2, size, 8, dtype=torch.float64))
        self.register_buffer("values", torch.zeros(1, 2, size, 8, dtype=torch.float64))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        seen = torch.arange(self.keys.size(2)) <= position[:, None]
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=seen)


@pytest.mark.parametrize("spec", [plx.LLA, plx.MESA], ids=lambda spec: spec.name)
def test_a_cache_step_by_step_is_the_whole_sequence(spec: plx.AttentionSpec) -> None:
    layer, x = Cached(12), torch.randn(1, 9, 16, dtype=torch.float64)
    whole = replaced(Cached.forward, spec)(layer, x, torch.arange(9))
    layer.keys.zero_()
    step = replaced(Cached.forward, spec)
    parts = [step(layer, x[:, :5], torch.arange(5))]
    parts += [step(layer, x[:, i : i + 1], torch.tensor([i])) for i in range(5, 9)]
    assert relative_error(torch.cat(parts, 2), whole) < 1e-11
    q, k, v = layer.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    want = plx.attention(q, k, v, spec=spec.replace(mask_mod=plx.masks.causal()))
    assert relative_error(whole, want) < 1e-10


def test_a_cache_that_grows() -> None:
    """Lengths that are one more than a symbol reach the loops of the CPU path; compiled twice, not for each length."""
    spec = plx.LLA
    member = replacing(lambda q, k, v, new: F.scaled_dot_product_attention(q, torch.cat([k, new], 2), v), spec)
    compiled = torch.compile(member, fullgraph=True)
    for length in (11, 12, 13, 14):
        q, k, v, new = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (1, length, length + 1, 1))
        want = plx.attention(q, torch.cat([k, new], 2), v, spec=spec)
        with torch.compiler.set_stance("default" if length < 13 else "fail_on_recompile"):
            assert relative_error(compiled(q, k, v, new), want) < 1e-9


FLEX: dict[str, dict[str, Any]] = {
    "plain": {},
    "block mask": {"block_mask": create_block_mask(lambda b, h, i, j: i + h >= j, 1, 4, 150, 140, device="cpu")},
    "score mod and scale": {"score_mod": lambda s, b, h, i, j: s + h * (j - i) * 0.01, "scale": 0.3},
    "all": {
        "score_mod": lambda s, b, h, i, j: torch.tanh(s),
        "block_mask": create_block_mask(lambda b, h, i, j: (j <= i) & (j != 3), 1, 1, 150, 140, device="cpu"),
        "scale": 0.3,
        "kernel_options": {"BLOCK_M": 32},
    },
}


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention(name: str) -> None:
    options = FLEX[name]
    q, k, v = (torch.randn(2, heads, length, 16) for heads, length in ((4, 150), (2, 140), (2, 140)))
    call = lambda *x: flex_attention(*x, enable_gqa=True, return_aux=AuxRequest(lse=True), **options)
    want, statistics = call(q, k, v)
    got, same = replaced(call, plx.SOFTMAX)(q, k, v)
    assert relative_error(got, want) < 1e-6 and relative_error(same.lse, statistics.lse) < 1e-6
    got, _ = replaced(call, plx.LLA)(q, k, v)
    direct = {name: option for name, option in options.items() if name != "kernel_options"}
    want = plx.attention(q.double(), k.double(), v.double(), spec=plx.LLA, enable_gqa=True, **direct)
    assert relative_error(got, want) < 1e-4


def test_flex_attention_at_infinite_bandwidth_and_uncompiled() -> None:
    q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
    want = plx.attention(q, k, v, spec=plx.MESA)
    assert relative_error(replaced(flex_attention, plx.MESA)(q, k, v), want) < 1e-4
    assert relative_error(replacing(flex_attention, plx.MESA)(q, k, v), want) < 1e-4  # as after a graph break
    modded = lambda *x: flex_attention(*x, score_mod=lambda s, b, h, i, j: s + i)
    for call, message in (
        (modded, "cannot keep a score_mod"),
        (lambda *x: flex_attention(*x, scale=0.1), "scale must be None"),
        (lambda *x: flex_attention(*x, kernel_options={"BACKEND": "FLASH"}), "FLASH"),
    ):
        with pytest.raises((UnsupportedError, InputError), match=message):
            replaced(call, plx.MESA)(q, k, v)
    operands = (lambda s, *_: s, FLEX["block mask"]["block_mask"].as_tuple(), 0.25)
    with pytest.raises(UnsupportedError, match="max_scores"):  # flex_attention itself gives them on a GPU only
        replacement._flex_attention(plx.LLA, q, k, v, *operands, {"OUTPUT_MAX": True})


PADDING = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])
ENCODER_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"src_key_padding_mask": PADDING},
    "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64), "is_causal": True},
}


@pytest.mark.parametrize("name", ENCODER_CALLS)
@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention_in_a_transformer(name: str, training: bool) -> None:
    """Where torch would take its fused layers, which have no attention call inside (eval, no gradients), too."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    model, options = nn.TransformerEncoder(layer, 1).train(training), ENCODER_CALLS[name]
    x, real = torch.randn(2, 9, 16, dtype=torch.float64), ~PADDING
    with torch.set_grad_enabled(training):
        want = model(x, **options)
        got = replaced(nn.TransformerEncoder.forward, plx.SOFTMAX)(model, x, **options)
        other = replaced(nn.TransformerEncoder.forward, plx.LLA)(model, x, **options)
        eager = without_fast_path(replacing(nn.TransformerEncoder.forward, plx.LLA))(model, x, **options)
    assert relative_error(got[real], want[real]) < 1e-12
    assert relative_error(other[real], want[real]) > 1e-3
    assert relative_error(other[real], eager[real]) < 1e-10
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_object_whose_attributes_are_set_around_the_call() -> None:
    """As caches are: what Dynamo remembers of the object must outlive the tracing of the mods."""

    class Layer:
        device: Any

    def call(q: Tensor) -> Tensor:
        layer = Layer()
        layer.ready = False  # type: ignore[attr-defined]
        out = plx.attention(q, q, q, spec=plx.SOFTMAX)
        layer.device = out.device
        return out + torch.ones((), device=layer.device)

    q = torch.randn(1, 2, 5, 4)
    assert relative_error(torch.compile(call, backend="aot_eager", fullgraph=True)(q), call(q)) < 1e-6


def test_attributes_of_tensors_in_plain_python_after_a_graph_break() -> None:
    def call(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        assert x.shape == (1, 2, 5, 4) and x.device.type == "cpu" and x.dtype == torch.float64 and x.ndim == 4
        return F.scaled_dot_product_attention(x, x, x)

    def outer(x: Tensor) -> Tensor:
        try:
            return call(x)
        finally:
            torch._dynamo.graph_break()

    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    member = torch.compile(replacing(outer, plx.LLA), backend="aot_eager")
    assert relative_error(member(x), plx.attention(x, x, x, spec=plx.LLA)) < 1e-10


def test_many_models_are_no_recompilation() -> None:
    x = torch.randn(1, 2, 5, 4)
    for _ in range(10):  # more than Dynamo's limit of recompilations
        replaced(lambda x: F.scaled_dot_product_attention(x, x, x), plx.SOFTMAX)(x)


def test_refusals() -> None:
    with pytest.raises(InputError, match="needs no new weights"):
        plx.parallax_compile(lambda x: x, replace_sdpa=plx.PARALLAX)
    with pytest.raises(InputTypeError, match="AttentionSpec or None"):
        plx.parallax_compile(lambda x: x, replace_sdpa="lla")  # type: ignore[call-overload]
    dropping = lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.1)
    with pytest.raises(UnsupportedError, match="cannot keep dropout"):
        plx.parallax_compile(dropping, fullgraph=True, replace_sdpa=plx.LLA)(*inputs())
    biased = lambda *x: F.scaled_dot_product_attention(*x, attn_mask=torch.zeros(12, 17, dtype=torch.float64))
    with pytest.raises(UnsupportedError, match="infinite bandwidth"):
        plx.parallax_compile(biased, fullgraph=True, replace_sdpa=plx.MESA)(*inputs())
    for mask, error, message in (
        (torch.zeros(3, 17, dtype=torch.bool), InputError, "must broadcast"),
        (torch.zeros(12, 17, dtype=torch.int64), InputTypeError, "bool or floating"),
    ):
        masked = lambda *x, mask=mask: F.scaled_dot_product_attention(*x, attn_mask=mask)
        with pytest.raises(error, match=message):
            replaced(masked, plx.LLA)(*inputs())
    layer, x = nn.MultiheadAttention(16, 2), torch.randn(3, 9, 16)
    with pytest.raises(UnsupportedError, match="need_weights=False"):
        replaced(lambda x: layer(x, x, x)[0], plx.LLA)(x)
    dropping_layer, wrong = nn.MultiheadAttention(16, 2, dropout=0.1), torch.zeros(9, 4, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="cannot keep dropout"):
        replaced(lambda x: dropping_layer(x, x, x, need_weights=False)[0], plx.LLA)(x)
    with pytest.raises(InputError, match="key_padding_mask must be"):
        replaced(lambda x: layer(x, x, x, key_padding_mask=wrong, need_weights=False)[0], plx.LLA)(x)
