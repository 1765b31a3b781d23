"""Wrong input: a clear error of our own before any compile, the same compiled or not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import parallax_compile as plx
from parallax_compile.errors import InputError, InputTypeError, UnsupportedError


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K = t(2, 4, 8, 16), t(2, 2, 8, 16)
MASK_8 = plx.masks.block_mask(plx.masks.causal(), None, None, 8, 8, "cpu")
MASK_9 = plx.masks.block_mask(plx.masks.causal(), None, None, 9, 9, "cpu")
MASK_B3 = plx.masks.block_mask(plx.masks.document(torch.zeros(3, 8, dtype=torch.int64)), None, None, 8, 8, "cpu")

# name -> (call, error, what the message says)
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rank": (lambda: plx.attention(t(4, 8, 16), K, K, enable_gqa=True), InputError, "query must be 4-D"),
    "rank of value": (lambda: plx.attention(K, K, t(8, 16)), InputError, "value must be 4-D"),
    "not a tensor": (lambda: plx.attention(Q, None, K), InputTypeError, "key must be a tensor, but got NoneType"),
    "device": (lambda: plx.attention(K, t(2, 2, 8, 16, device="meta"), K), InputError, "key must be on query's device"),
    "dtypes": (lambda: plx.attention(K, K, K.bfloat16()), InputTypeError, "value must have query's dtype torch.float32"),
    "integers": (lambda: plx.attention(K.int(), K.int(), K.int()), InputTypeError, "torch.int32"),
    "batch": (lambda: plx.attention(K, t(1, 2, 8, 16), t(1, 2, 8, 16)), InputError, "batch size 2, but got 1"),
    "heads without enable_gqa": (lambda: plx.attention(Q, K, K), InputError, "enable_gqa=True"),
    "heads do not divide": (
        lambda: plx.attention(t(2, 3, 8, 16), K, K, enable_gqa=True), InputError, "multiple of key's .* 3 and 2",
    ),
    "width of key": (lambda: plx.attention(K, t(2, 2, 8, 12), K), InputError, "query's width D = 16, but got 12"),
    "width 0": (lambda: plx.attention(t(2, 2, 8, 0), t(2, 2, 8, 0), K), InputError, "at least 1"),
    "shape of probe": (lambda: plx.attention(K, K, K, t(2, 2, 8, 8)), InputError, "probe must have query's shape"),
    "length of value": (lambda: plx.attention(K, K, t(2, 2, 9, 16)), InputError, r"got \(2, 9\)"),
    "probe missing": (lambda: plx.attention(K, K, K, spec=plx.PARALLAX), InputError, "learned probe"),
    "probe not taken": (lambda: plx.attention(K, K, K, K, spec=plx.SOFTMAX), InputError, "takes no probe"),
    "score_mod as probe": (lambda: plx.attention(K, K, K, lambda s, *_: s), InputTypeError, "score_mod="),
    "spec": (lambda: plx.attention(K, K, K, spec="parallax"), InputTypeError, "AttentionSpec, but got str"),
    "scale nan": (lambda: plx.attention(K, K, K, scale=math.nan), InputError, "scale must be finite"),
    "scale tensor": (lambda: plx.attention(K, K, K, scale=t(1)), InputTypeError, "scale must be a number"),
    "scale at infinite bandwidth": (
        lambda: plx.attention(K, K, K, spec=plx.VALUE_AVERAGE, scale=1.0), InputError, "infinite bandwidth",
    ),
    "score_mod at infinite bandwidth": (
        lambda: plx.attention(K, K, K, spec=plx.VALUE_AVERAGE, score_mod=lambda s, b, h, q, k: s), InputError, "infinite",
    ),
    "covariance_mod without probe": (
        lambda: plx.attention(K, K, K, covariance_mod=lambda s, b, h, q, k: s), InputError, "needs a probe",
    ),
    "score_mod not callable": (lambda: plx.attention(K, K, K, score_mod=3), InputTypeError, "callable or None"),
    "arity": (lambda: plx.attention(K, K, K, score_mod=lambda s, b: s), InputTypeError, "q_idx, kv_idx"),
    "arity of the spec's": (
        lambda: plx.attention(K, K, K, spec=plx.SOFTMAX.replace(score_mod=lambda s: s)), InputTypeError, "q_idx, kv_idx",
    ),
    "mod returns bool": (
        lambda: plx.attention(K, K, K, score_mod=lambda s, b, h, q, k: s > 0), InputTypeError, "torch.bool",
    ),
    "mask returns float": (
        lambda: plx.attention(K, K, K, spec=plx.SOFTMAX.replace(mask_mod=lambda b, h, q, k: (q - k) * 1.0)),
        InputTypeError, "must return bool",
    ),
    "mask for other lengths": (lambda: plx.attention(K, K, K, block_mask=MASK_9), InputError, r"\(9, 9\)"),
    "mask for another batch": (lambda: plx.attention(K, K, K, block_mask=MASK_B3), InputError, "batch size 1 or 2"),
    "mask function": (
        lambda: plx.attention(K, K, K, block_mask=lambda b, h, q, k: q >= k), InputTypeError, "plx.masks.block_mask",
    ),
    "ridge without a solver": (lambda: plx.attention(K, K, K, ridge=0.1), InputError, "ridge needs a solved"),
    "ridge negative": (lambda: plx.attention(K, K, K, spec=plx.LLA, ridge=-1.0), InputError, "positive"),
    "ridge shape": (lambda: plx.attention(K, K, K, spec=plx.LLA, ridge=t(3)), InputError, "broadcast"),
    "kernel options name": (
        lambda: plx.attention(K, K, K, kernel_options={"BLOCK_Q": 64}), InputError, "unknown name BLOCK_Q",
    ),
    "kernel options value": (
        lambda: plx.attention(K, K, K, kernel_options={"fwd_BLOCK_M": 48}), InputError, "power of two",
    ),
    "solver without a solved probe": (
        lambda: plx.attention(K, K, K, kernel_options={"DIRECT": False}), InputError, "is of solved probes",
    ),
    "solver switch": (
        lambda: plx.attention(K, K, K, spec=plx.LLA, kernel_options={"solve_DIRECT": 1}), InputTypeError, "must be a bool",
    ),
    "solver of another stage": (
        lambda: plx.attention(K, K, K, spec=plx.LLA, kernel_options={"bwd_DIRECT": True}), InputError, "unknown name",
    ),
    "solver of wide keys": (
        lambda: plx.attention(*[t(2, 2, 8, 33)] * 3, spec=plx.LLA, kernel_options={"DIRECT": True}), InputError,
        "up to 32, .* but got D = 33",
    ),
    "both lse and aux": (
        lambda: plx.attention(K, K, K, return_lse=True, return_aux=plx.AuxRequest(lse=True)), InputError, "exclude",
    ),
    "aux of another type": (
        lambda: plx.attention(K, K, K, return_aux=("lse",)), InputTypeError, "plx.AuxRequest or None, but got tuple",
    ),
    "flag": (lambda: plx.attention(K, K, K, return_lse=t(1)), InputTypeError, "return_lse must be a bool, but got Tensor"),
    "warps": (lambda: plx.attention(K, K, K, kernel_options={"bwd_num_warps": 6}), InputError, "power of two of at most 32"),
    "mod returns several": (
        lambda: plx.attention(K, K, K, score_mod=lambda s, b, h, q, k: s + torch.zeros(3)), InputTypeError,
        r"score_mod must return one number .* shape \[3\]",
    ),
    "max_scores": (
        lambda: plx.attention(K, K, K, return_aux=plx.AuxRequest(max_scores=True)), InputError, "max_scores",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_uncompiled(name: str) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_compiled_says_the_same(name: str, fullgraph: bool) -> None:
    call, error, message = CASES[name]
    compiled = torch.compile(call, fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(error, match=message):
        compiled()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plx.attention(t(1, 1, 8, 300), t(1, 1, 8, 300), t(1, 1, 8, 300)), "widths up to 256"),
        (lambda: plx.attention(t(1, 1, 8, 300), t(1, 1, 8, 300), t(1, 1, 8, 4), spec=plx.LLA), "D = 300, Dv = 4"),
    ],
)
def test_what_the_compiled_path_lacks_names_the_reference(call: Callable[[], Any], message: str) -> None:
    call()
    with pytest.raises(UnsupportedError, match=f"{message}.*outside of torch.compile"):
        torch.compile(call, fullgraph=True)()


def test_dynamic_shapes_appear_in_messages() -> None:
    call = torch.compile(lambda q, k: plx.attention(q, k, k), fullgraph=True, dynamic=True)
    with pytest.raises(InputError, match="query's width D"):
        call(t(2, 2, 8, 16), t(2, 2, 8, 12))


def test_errors_are_the_builtin_kinds() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(InputTypeError, TypeError)
    assert issubclass(UnsupportedError, NotImplementedError)
