"""Calls of ``plx.attention`` with few rows, whose keys the plan splits: the decoding kernels in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import interpreter
from support.oracle import budget, low_precision, relative_error
from torch import Tensor

import parallax_compile as plx

pytestmark = pytest.mark.skipif(not interpreter.enabled(), reason="needs TRITON_INTERPRET=1")

KEYS = 530
PARALLAX = plx.PARALLAX


def operands(
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    batch: int = 2,
    q_heads: int = 4,
    keys: int = KEYS,
    probe: bool = True,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(q_heads, rows, 24), (2, keys, 24), (2, keys, 16), (q_heads, rows, 24)]
    found = [torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return found[: 3 + probe]


def allowed(mask_mod: Any, rows: int, keys: int = KEYS) -> Tensor:
    b = h = torch.tensor(0)
    return mask_mod(b, h, torch.arange(rows)[:, None], torch.arange(keys)[None, :])


def check(
    stages: list[str],
    given: list[Tensor],
    spec: Any,
    mask: Tensor | None = None,
    *,
    dynamic: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Any, interpreter.Interpreted]:
    """The call's kernels are those of decoding; its output is the definition's, all keys of all pairs."""
    request = plx.AuxRequest(lse=True, probe_mean=True)
    call = lambda *x: plx.attention(*x, spec=spec, enable_gqa=True, return_aux=request, **more)
    compiled = interpreter.interpreted(call, dynamic=dynamic)
    with torch.no_grad():
        out, aux = compiled(*given)
    kinds = {kernel.name: kernel.stage for kernel in compiled.code.kernels}
    assert [kinds[name] for name in compiled.launches if kinds[name]] == stages
    query, key, value, *probe = given
    pieces = lambda dtype: [x.to(dtype) for x in (query, key, value)] + ([x.to(dtype) for x in probe] or [None])
    mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool) if mask is None else mask
    want = low_precision(*pieces(torch.float64), mask=mask, intercept=spec.intercept)
    rounded = low_precision(*pieces(out.dtype), mask=mask, intercept=spec.intercept)
    assert relative_error(out, want) <= budget(relative_error(rounded, want), out.dtype)
    return out, aux, compiled


CAUSAL = plx.masks.causal(offset=KEYS - 3)
CASES: dict[str, tuple[int, Any, bool, list[str]]] = {
    # Rows, mask, probe, kernels. As everywhere in plx.attention, q_idx of the mask starts at 0.
    "one row, softmax": (1, None, False, ["decode_split"]),
    "causal with an offset": (3, CAUSAL, True, ["decode_split", "decode_merge"]),
    "causal from the start": (3, plx.masks.causal(), True, ["decode_split"]),  # three keys: nothing to split
    "window": (2, plx.masks.sliding_window(37, offset=301), True, ["decode_split"]),
    "a window before all keys": (1, plx.masks.sliding_window(5, offset=-9), True, ["decode_split"]),
    "a function": (16, lambda b, h, q, k: (k % 5 != q % 5) & (k < 400), True, ["decode_split", "decode_merge"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_few_rows(name: str) -> None:
    rows, mask_mod, probe, stages = CASES[name]
    member = PARALLAX if probe else plx.SOFTMAX
    spec = member if mask_mod is None else member.replace(mask_mod=mask_mod)
    mask = None if mask_mod is None else allowed(mask_mod, rows)
    given = operands(rows, probe=probe)
    out, aux, compiled = check(stages, given, spec, mask)
    if name == "window":  # what no row can see is not read
        for tensor in given[1:3]:
            tensor[:, :, :256] = tensor[:, :, 303:] = float("nan")
        with torch.no_grad():
            assert torch.equal(compiled(*given)[0], out)
    if mask is not None:
        empty = ~mask.any(1)
        assert not out[:, :, empty].any() and (aux.lse[:, :, empty] == -float("inf")).all()


# Kinds of blocks of keys in the lists of heads. The second's last block ends far behind the last key, and all are visited.
BLOCKS = {
    "a list of each head": (2, 32, ["01021200010000002", "01000020010000002"]),
    "one list": (4, 240, ["121"]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_a_mask(name: str) -> None:
    """Blocks that are in no list are not read (their keys are NaN); in a full one the mask is not asked."""
    q_heads, kv_block, lists = BLOCKS[name]
    kinds = torch.tensor([[int(kind) for kind in kinds] for kinds in lists], dtype=torch.int8)[None, :, None]
    mask_mod = lambda b, h, q, k: (k % 3 != q) & (h < 9)
    of_keys = kinds.repeat_interleave(kv_block, 3)[..., :KEYS]
    mask = torch.where(of_keys == 1, allowed(mask_mod, 2), of_keys == 2)
    given = operands(2, torch.float32, q_heads=q_heads, batch=1)
    want = low_precision(*(x.double() for x in given), mask=mask)
    for tensor in given[1:3]:
        tensor[:, :, (of_keys == 0).all(1)[0, 0]] = float("nan")
    block_mask = plx.masks.from_kinds(kinds, (2, KEYS), (16, kv_block), mask_mod)
    compiled = interpreter.interpreted(lambda *x: plx.attention(*x, enable_gqa=True, block_mask=block_mask))
    with torch.no_grad():
        out = compiled(*given)
    assert compiled.code.kernels[0].stage == "decode_split"
    assert relative_error(out, want) < 1e-6


def test_keys_that_are_a_symbol() -> None:
    given = operands(3)
    for tensor in given[1:3]:
        torch._dynamo.mark_dynamic(tensor, 2)
    check(["decode_split", "decode_merge"], given, PARALLAX.replace(mask_mod=CAUSAL), allowed(CAUSAL, 3))
